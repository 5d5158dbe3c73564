"""Figures, and the files that they are written to."""

import os
from pathlib import Path
from typing import Any

from hf_gradutils.errors import InvalidArgumentError


def new_figure(width: float, height: float) -> Any:
    """Make a figure that pyplot does not know: a program's own figures and backend stay as they are.

    Raises:
        InvalidArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidArgumentError("plots need matplotlib; pip install 'hf-gradutils[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_can_draw(path: Path, example: str = "report.png") -> Path:
    """Check that a figure can be written there; returns the file, which gets ``.png`` if it has no suffix.

    Args:
        path: The file.
        example: Name of a file, for the error.

    Raises:
        InvalidArgumentError: it is a folder, matplotlib does not know such files, or is not installed.
    """
    if os.path.isdir(path):
        raise InvalidArgumentError(f"{str(path)!r} is a folder; give a file, as {str(path / example)!r}")
    path = path if path.suffix else path.with_suffix(".png")
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InvalidArgumentError(f"cannot draw {path.suffix} files; {str(path)!r} must end in one of {sorted(kinds)}")
    return path


def save(figure: Any, path: Path, example: str) -> Path:
    """Write a figure and return the file.

    Args:
        figure: To write.
        path: The file, as :func:`check_can_draw` takes it; folders are made.
        example: As there.

    Raises:
        InvalidArgumentError: as there, or it cannot be written.
    """
    path = check_can_draw(path, example)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    return path
