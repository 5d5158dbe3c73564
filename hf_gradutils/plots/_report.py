"""A report of a check of invariance as a picture."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hf_gradutils.plots._picture import new_figure, save

_RIGHT, _WRONG = "#0072b2", "#d55e00"  # told apart by color-blind readers; marker and words say it too
_WIDTH = 9.0
_LINE = 0.19
"""Height of a line of small text, in inches."""


class _Comparison(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def gradient_error(self) -> float: ...
    @property
    def problem(self) -> str: ...
    @property
    def not_compared(self) -> str: ...
    @property
    def decides(self) -> bool: ...


class Report(Protocol):
    """The part of an :class:`~hf_gradutils.InvarianceReport` that is drawn."""

    @property
    def comparisons(self) -> Sequence[_Comparison]: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def what(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def answer(self) -> str: ...


def plot_report(report: Report, path: str | Path) -> Path:
    """Draw the error of each comparison of an :class:`~hf_gradutils.InvarianceReport` beside the tolerance.

    An error of 0 is drawn at the left edge, inf and NaN at the right one. The title is the report's answer; below the
    axis are the rows without an error, and why. Markers are open for rows that do not decide the answer.

    Args:
        report: Only read, on one rank.
        path: The file, of a kind that matplotlib can write; without a suffix it gets ``.png``.

    Returns:
        The file that was written.

    Raises:
        InvalidArgumentError: matplotlib is not installed, or ``path`` cannot be written.

    Collectives: none.
    """
    return save(draw_report(report), Path(path), "report.png")


def draw_report(report: Report) -> Any:
    """The figure of :func:`plot_report`."""
    rows = [row for row in report.comparisons if row.problem or not math.isnan(row.gradient_error)]
    title = textwrap.wrap(report.answer, 84, max_lines=3, placeholder=" …")
    below = [f"{report.what}, tolerance {report.tolerance:.0e}"]
    below += [f"not compared: {row.name}: {row.not_compared}" for row in report.comparisons if row.not_compared]
    others = [row.name for row in report.comparisons if row not in rows and not row.not_compared]
    below += [f"ok, without a gradient to compare: {', '.join(others)}"] if others else []
    lines = [line for text in below for line in textwrap.wrap(text, 128, subsequent_indent="    ", max_lines=2)]
    figure = new_figure(_WIDTH, 0.3 * len(title) + 0.38 * max(len(rows), 1) + 0.6 + _LINE * len(lines))
    color = {"passed": _RIGHT, "FAILED": _WRONG}.get(report.verdict, "0.3")
    figure.suptitle("\n".join(title), x=0.01, ha="left", fontsize="large", fontweight="bold", color=color)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small", color="0.3")
    axis = figure.subplots()
    low, high = _range(rows, report.tolerance)
    axis.set(xscale="log", xlim=(low, high), ylim=(max(len(rows), 1) - 0.5, -0.5))
    names = ["\n".join(textwrap.wrap(row.name, 42, max_lines=2)) for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize="small")
    axis.set_xlabel("relative error of the gradient", fontsize="small")
    axis.tick_params(axis="x", labelsize="small")
    axis.minorticks_off()
    axis.grid(alpha=0.3, axis="x")
    _draw_rows(axis, rows, report.tolerance, (low, high))
    return figure


def _range(rows: Sequence[_Comparison], tolerance: float) -> tuple[float, float]:
    """Ends of the axis: whole powers of ten around all errors and the tolerance, with room for words on the right."""
    shown = [row.gradient_error for row in rows if 0 < row.gradient_error < math.inf]
    low = min([*shown, tolerance / 1e3])
    high = max([*shown, tolerance * 1e3])
    low_power, high_power = math.floor(math.log10(low)) - 0.5, math.ceil(math.log10(high))
    return 10.0**low_power, 10.0 ** (high_power + (high_power - low_power) * 0.25)


def _draw_rows(axis: Any, rows: Sequence[_Comparison], tolerance: float, ends: tuple[float, float]) -> None:
    """Draw the tolerance, and for each row a stem, a marker, and its error in words."""
    from matplotlib.ticker import LogFormatter

    axis.xaxis.set_major_formatter(LogFormatter())
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # the line of the tolerance does not cross words
    words = {"textcoords": "offset points", "fontsize": "small", "va": "center", "bbox": box}
    axis.axvline(tolerance, color="0.3", linestyle="--", linewidth=1, label="tolerance")
    axis.annotate("tolerance", (tolerance, -0.5), (-4, -7), ha="right", color="0.3", **words)
    if not rows:
        axis.text(0.5, 0.5, "no gradient was compared", transform=axis.transAxes, ha="center", va="center")
    low, high = ends
    for index, row in enumerate(rows):
        position = high if math.isnan(row.gradient_error) else min(max(row.gradient_error, low), high)
        color = _WRONG if row.problem else _RIGHT
        fill = "full" if row.decides else "none"
        axis.hlines(index, low, position, color=color, linewidth=1.5)
        axis.plot(
            [position], [index], "X" if row.problem else "o", color=color, markersize=7, fillstyle=fill, clip_on=False
        )
        place, side = ((-9, 7), "right") if position == high else ((9, 0), "left")
        axis.annotate(_in_words(row), (position, index), place, ha=side, **words)


def _in_words(row: _Comparison) -> str:
    error = row.gradient_error
    text = f"{error:.1e}" if 0 < error < math.inf else f"{error:g}".replace("nan", "NaN")
    if not row.problem:
        return f"{text} ok"
    text += " WRONG" if row.decides else ", not as you train"
    return f"{text}, the loss" if "the gradient is right" in row.problem else text
