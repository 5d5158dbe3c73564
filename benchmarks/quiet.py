"""Trainings that leave no files and print nothing."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-bench"),  # nothing is saved there
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
"""Arguments of any Trainer here."""


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """A context in which this process prints nothing."""
    return contextlib.redirect_stdout(io.StringIO())
