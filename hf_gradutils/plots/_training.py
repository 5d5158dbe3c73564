"""Runs drawn over one another."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gradutils.plots._picture import new_figure, save
from hf_gradutils.plots._runs import GROUP, Run, with_different_names

_HEIGHTS = {"loss": 3.0, "norm": 2.0, "ratio": 1.5, "targets": 1.5, "skipped": 1.5}
"""Panels in their order, and their heights."""


def plot_runs(runs: Sequence[Run], path: Path, *, max_grad_norm: float | None = None) -> Path:
    """Draw runs over one another into a picture: loss, gradient norm, targets and skipped steps, norms of groups.

    Where runs logged norms of the same steps, one panel has their ratios to those of the first run that counts its
    targets, else of the first run. Where only some runs count targets, the legend says which those are: their losses
    are per target, and others are what a stock Trainer logs.

    Args:
        runs: At least one. Norms of groups are drawn for the first that has them.
        path: The file, of a kind that matplotlib can write; without a suffix it gets ``.png``.
        max_grad_norm: Height of the line of the clip; default: each run's own.

    Returns:
        The file that was written.

    Raises:
        InvalidArgumentError: matplotlib is not installed, or ``path`` cannot be written.
    """
    return save(draw_runs(runs, max_grad_norm), path, "training.png")


def draw_runs(runs: Sequence[Run], max_grad_norm: float | None = None) -> Any:
    """The figure of :func:`plot_runs`."""
    runs = with_different_names(runs)
    ratios = _ratios(runs)
    norms = [norm for run in runs for norm in run.series("grad_norm")[1] if math.isfinite(norm)]
    has = {
        "loss": True,
        "norm": bool(norms),
        "ratio": bool(ratios),
        "targets": any(run.counts_targets for run in runs),
        "skipped": any(entry.get("skipped_steps") for run in runs for entry in run.log),
    }
    panels = [name for name in _HEIGHTS if has[name]]
    heights = [_HEIGHTS[name] for name in panels]
    grouped = next((run for run in runs if run.groups()), None)
    if grouped is not None:
        heights.append(max(2.0, len(grouped.groups()) / 4))
    figure = new_figure(9.0, 1.6 * sum(heights))
    grid = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    axes = dict(zip(panels, grid, strict=False))
    _label(axes, runs, any(norm > 0 for norm in norms))
    for index, run in enumerate(runs):
        _draw(axes, run, _note(run, runs), f"C{index}")
    if "norm" in axes:
        _draw_limits(axes["norm"], [run.max_grad_norm if max_grad_norm is None else max_grad_norm for run in runs])
    for color, label, steps, values in ratios:
        _line(axes["ratio"], steps, values, color=color, label=label)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best", fontsize="small")
    if grouped is not None:
        _draw_groups(grid[-1], grouped)
    grid[-1].set_xlabel("optimizer step")
    return figure


def _label(axes: dict[str, Any], runs: Sequence[Run], has_positive_norm: bool) -> None:
    from matplotlib import ticker

    names = {"loss": "loss per target", "norm": "gradient norm", "ratio": "ratio of norms"}
    names |= {"targets": "targets per step", "skipped": "skipped steps"}
    if not all(run.counts_targets for run in runs):
        names["loss"] = "loss as logged"
    for panel, axis in axes.items():
        axis.set_ylabel(names[panel])
    # A logarithmic axis without a positive number warns.
    for panel in ("norm", "ratio"):
        if panel in axes and (panel == "ratio" or has_positive_norm):
            axes[panel].set_yscale("log")
            axes[panel].yaxis.set_major_formatter(ticker.LogFormatter())
            axes[panel].yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    if "ratio" in axes:
        axes["ratio"].axhline(1.0, color="0.4", linestyle=":", linewidth=1)


def _note(run: Run, runs: Sequence[Run]) -> str:
    """Words about the loss of a run, where runs differ in it."""
    if len({other.counts_targets for other in runs}) == 1:
        return ""
    return " (per target)" if run.counts_targets else " (stock Trainer)"


def _ratios(runs: Sequence[Run]) -> list[tuple[str, str, list[float], list[float]]]:
    """Color, label, steps and ratios for each run but one, of the steps that have a norm in both."""
    first = next((run for run in runs if run.counts_targets), runs[0])
    below = dict(zip(*first.series("grad_norm"), strict=True))
    result = []
    for index, run in enumerate(runs):
        if run is first:
            continue
        norms = dict(zip(*run.series("grad_norm"), strict=True))
        common = {step: norms[step] / below[step] for step in sorted(norms) if below.get(step, 0.0) > 0}
        if any(math.isfinite(ratio) and ratio > 0 for ratio in common.values()):
            result.append((f"C{index}", f"{run.name} ÷ {first.name}", list(common), list(common.values())))
    return result


def _draw(axes: dict[str, Any], run: Run, note: str, color: str) -> None:
    """Draw the lines of one run into the panels."""
    _line(axes["loss"], *run.series("loss"), color=color, label=f"{run.name}, training{note}")
    steps, values = run.series("eval_loss")
    style = {"linestyle": "--", "marker": "o", "markersize": 3}
    _line(axes["loss"], steps, values, color=color, label=f"{run.name}, evaluation", **style)
    if "norm" in axes:
        _line(axes["norm"], *run.series("grad_norm"), color=color, label=run.name)
    if "targets" in axes:
        _line(axes["targets"], *run.targets_per_step(), color=color, label=run.name, drawstyle="steps-mid")
    if "skipped" in axes:
        _line(axes["skipped"], *run.series("skipped_steps"), color=color, label=run.name, drawstyle="steps-post")


def _draw_limits(axis: Any, limits: Sequence[float | None]) -> None:
    """Draw a line for each norm that gradients are clipped to, in the color of its run if there are several."""
    several = len({limit for limit in limits if limit}) > 1
    for index, limit in enumerate(limits):
        if limit and limit not in limits[:index]:
            color = f"C{index}" if several else "0.4"
            axis.axhline(limit, color=color, linestyle=":", linewidth=1, label=f"clipped to {limit:g}")


def _line(axis: Any, steps: list[float], values: list[float], **style: Any) -> None:
    """Draw a line, with a marker on each point that has no neighbor, and a gap where steps begin anew."""
    if not any(map(math.isfinite, values)):
        return
    drawn: list[tuple[float, float]] = []
    for step, value in zip(steps, values, strict=True):
        if drawn and step < drawn[-1][0]:
            drawn.append((step, math.nan))
        drawn.append((step, value if math.isfinite(value) else math.nan))
    padded = [math.nan, *(value for _, value in drawn), math.nan]
    alone = [
        i
        for i, (before, value, after) in enumerate(zip(padded, padded[1:], padded[2:], strict=False))
        if math.isfinite(value) and math.isnan(before) and math.isnan(after)
    ]
    if alone and "marker" not in style:
        style |= {"marker": "o", "markersize": 3, "markevery": alone}
    axis.plot(*zip(*drawn, strict=True), **style)


def _draw_groups(axis: Any, run: Run) -> None:
    groups = run.groups()
    steps = sorted({entry["step"] for entry in run.log if any(group in entry for group in groups)})
    columns = {step: index for index, step in enumerate(steps)}
    values = [[math.nan] * len(steps) for _ in groups]
    for row, group in enumerate(groups):
        for step, value in zip(*run.series(group), strict=True):
            values[row][columns[step]] = math.log10(value) if 0 < value < math.inf else math.nan
    # Cells end halfway between steps, and the outer ones are symmetric.
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    first = 2 * steps[0] - middles[0] if middles else steps[0] - 0.5
    last = 2 * steps[-1] - middles[-1] if middles else steps[-1] + 0.5
    rows = [row - 0.5 for row in range(len(groups) + 1)]
    picture = axis.pcolormesh([first, *middles, last], rows, values, cmap="viridis", rasterized=True)
    axis.invert_yaxis()
    axis.set_yticks(range(len(groups)), [group.removeprefix(GROUP) for group in groups], fontsize="small")
    axis.figure.colorbar(picture, ax=axis, label=f"log10 of the norm, {run.name}")
