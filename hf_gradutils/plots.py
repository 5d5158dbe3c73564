"""Plots of training runs, from the ``trainer_state.json`` that a Trainer writes."""

import json
import math
import os
import pickletools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_gradutils.errors import InvalidArgumentError

_GROUP = "grad_norm/"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str
    log: list[dict[str, Any]]
    max_grad_norm: float | None
    """None if unknown."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one number in the log."""
        points = [(entry["step"], entry[key]) for entry in self.log if key in entry]
        return [step for step, _ in points], [math.nan if v is None else float(v) for _, v in points]

    def groups(self) -> list[str]:
        """Norm groups, in the order of the model."""
        return list(dict.fromkeys(key for entry in self.log for key in entry if key.startswith(_GROUP)))


def read_run(folder: Path) -> Run:
    """Read a run's log, from the folder itself or else from its newest checkpoint.

    Raises:
        InvalidArgumentError: there is none, or it was not written by a Trainer.
    """
    if not os.path.exists(folder):  # False, too, for a name that no file can have
        raise InvalidArgumentError(f"{str(folder)!r} does not exist; give the output folder of a training")
    checkpoints = sorted(
        folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[-1])
    )
    candidates = [folder] if folder.is_file() else [folder / "trainer_state.json", *reversed(checkpoints)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InvalidArgumentError(
            f"no trainer_state.json in {str(folder)!r} or in its checkpoints; it is written with every checkpoint "
            "and by trainer.save_state()"
        )
    try:
        log = json.loads(path.read_text())["log_history"]
        steps = [entry["step"] for entry in log]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"{path} was not written by a Trainer: {error!r}") from None
    if not any("loss" in entry for entry in log):
        raise InvalidArgumentError(f"{path} has {len(steps)} log entries and none with a loss; set logging_steps lower")
    name = path.parent.parent.name if path.parent.name.startswith("checkpoint-") else path.parent.name
    return Run(name=name or str(folder), log=log, max_grad_norm=_read_max_grad_norm(path.parent))


_NUMBERS = ("BINFLOAT", "FLOAT", "BININT", "BININT1", "BININT2", "INT")


def _read_max_grad_norm(folder: Path) -> float | None:
    """Read it from the arguments that a Trainer pickles, without unpickling a file of unknown origin."""
    try:
        with zipfile.ZipFile(folder / "training_args.bin") as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            operations = [(kind.name, value) for kind, value, _ in pickletools.genops(archive.read(name))]
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    places = [place for place, (_, value) in enumerate(operations) if value == "max_grad_norm"]
    # In a pickled dictionary a name is followed by its value, or by memo operations and then its value.
    following = operations[places[0] + 1 : places[0] + 4] if places else []
    return next((float(value) for kind, value in following if kind in _NUMBERS and value is not None), None)


def plot_runs(runs: Sequence[Run], path: Path, *, max_grad_norm: float | None = None) -> Path:
    """Draw runs over one another into a picture: loss, gradient norm, targets and skipped steps, norms of groups.

    Args:
        runs: At least one. Norms of groups are drawn for the first that has them.
        path: The file, of a kind that matplotlib can write; without a suffix it gets ``.png``.
        max_grad_norm: Height of the line of the clip; default: each run's own.

    Returns:
        The file that was written.

    Raises:
        InvalidArgumentError: matplotlib is not installed, or ``path`` cannot be written.
    """
    if os.path.isdir(path):
        raise InvalidArgumentError(f"{str(path)!r} is a folder; give a file, as {str(path / 'training.png')!r}")
    path = path if path.suffix else path.with_suffix(".png")
    try:
        import matplotlib
    except ImportError:
        raise InvalidArgumentError("plots need matplotlib; pip install 'hf-gradutils[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_targets = any("num_targets" in entry for run in runs for entry in run.log)
    has_skipped = any(entry.get("skipped_steps") for run in runs for entry in run.log)
    grouped = next((run for run in runs if run.groups()), None)
    heights = [3.0, 2.0, *[1.5] * (has_targets + has_skipped)]
    if grouped is not None:
        heights.append(max(2.0, len(grouped.groups()) / 4))
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, 1.6 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    lines = list(axes[: len(heights) - (grouped is not None), 0])
    for index, run in enumerate(runs):
        _draw(lines, run, f"C{index}", run.max_grad_norm if max_grad_norm is None else max_grad_norm, has_targets)
    for axis in lines:
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize="small")
    if grouped is not None:
        _draw_groups(axes[-1, 0], grouped)
    axes[-1, 0].set_xlabel("optimizer step")
    kinds = figure.canvas.get_supported_filetypes()
    try:
        if path.suffix[1:].lower() not in kinds:
            raise InvalidArgumentError(
                f"cannot draw {path.suffix} files; {str(path)!r} must end in one of {sorted(kinds)}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    finally:
        pyplot.close(figure)
    return path


def _draw(axes: Sequence[Any], run: Run, color: str, limit: float | None, has_targets: bool) -> None:
    """Draw the lines of one run into the panels for loss, norm and, if any run has them, targets and skipped steps."""
    loss, norm, *others = axes
    loss.set_ylabel("loss per target")
    loss.plot(*run.series("loss"), color=color, label=f"{run.name}, training")
    steps, values = run.series("eval_loss")
    if steps:
        loss.plot(steps, values, color=color, linestyle="--", marker="o", markersize=3, label=f"{run.name}, evaluation")
    norm.set(ylabel="gradient norm", yscale="log")
    norm.plot(*run.series("grad_norm"), color=color, label=run.name)
    if limit:
        norm.axhline(limit, color=color, linestyle=":", linewidth=1, label=f"clipped to {limit:g}")
    if has_targets:
        targets, *others = others
        targets.set_ylabel("targets per step")
        steps, totals = run.series("num_targets")
        # An entry has the targets of all steps since the one before.
        per_step = [total / max(step - last, 1) for step, last, total in zip(steps, [0, *steps], totals, strict=False)]
        targets.plot(steps, per_step, color=color, label=run.name, drawstyle="steps-mid")
    for skipped in others:
        skipped.set_ylabel("skipped steps")
        skipped.plot(*run.series("skipped_steps"), color=color, label=run.name, drawstyle="steps-post")


def _draw_groups(axis: Any, run: Run) -> None:
    groups = run.groups()
    steps = sorted({entry["step"] for entry in run.log if groups[0] in entry})
    columns = {step: index for index, step in enumerate(steps)}
    values = [[math.nan] * len(steps) for _ in groups]
    for row, group in enumerate(groups):
        for step, value in zip(*run.series(group), strict=True):
            values[row][columns[step]] = math.log10(value) if value > 0 else math.nan
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(groups) - 0.5, -0.5)
    picture = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
    axis.set_yticks(range(len(groups)), [group.removeprefix(_GROUP) for group in groups], fontsize="small")
    axis.figure.colorbar(picture, ax=axis, label=f"log10 of the norm, {run.name}")
