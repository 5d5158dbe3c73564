"""Pictures of files: runs, or one report."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.plots._report import Report, plot_report
from hf_gradutils.plots._runs import read_runs
from hf_gradutils.plots._training import plot_runs


def plot_files(
    arguments: Sequence[str],
    path: Path | None,
    *,
    report_of: Callable[[dict[str, Any]], Report],
    max_grad_norm: float | None = None,
) -> Path:
    """Draw runs over one another, or one report of a check, and return the picture.

    Args:
        arguments: ``FOLDER`` or ``NAME=FOLDER`` of each run, or one report as JSON.
        path: The picture; default: training.png in the first folder, or beside the report.
        report_of: Makes a report of what its file has.
        max_grad_norm: As of :func:`plot_runs`.

    Raises:
        InvalidArgumentError: a file is neither, or there are reports beside something else.
    """
    reports = [file for file in map(Path, arguments) if _is_report(file)]
    if not reports:
        runs = read_runs(arguments)
        return plot_runs(runs, path or (runs[0].folder or Path()) / "training.png", max_grad_norm=max_grad_norm)
    if len(arguments) > 1:
        raise InvalidArgumentError(f"{str(reports[0])!r} is a report of a check; give one report, or only runs")
    try:
        report = report_of(json.loads(reports[0].read_text()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{reports[0]} is not a report of a check: {error!r}") from None
    return plot_report(report, path or reports[0].with_suffix(".png"))


def _is_report(path: Path) -> bool:
    try:
        return "comparisons" in json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return False
