"""Every head in every layout in float32: ours beside the stock Trainer, against float64."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.page import short_reason
from benchmarks.trainings import TRAINERS, silence
from tests.harness.gradients import norm_of, relative_error
from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainer_cases import make_data, micro_batches_of, train, truth_of_micro_batches

ACCUMULATIONS = (1, 4, 8)
NUM_SAMPLES = 32
WRONG = 1e-5
NOT_ADDITIVE = ("qwen3 moe aux",)
"""Heads with a term that no split leaves alone: the truth is the mean of the micro-batches', weighted by targets."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of one optimizer step."""

    gradient: float
    norm: float
    loss: float


Result = list[Errors] | str
"""One for each accumulation; or what it crashed with."""
Cells = dict[tuple[str, str], dict[str, Result]]
"""(head, layout) → trainer → result."""


def measure(head: str, layout: str, trainer: str, seed: int) -> list[Errors]:
    """Errors at each accumulation. Runs on every rank of the layout."""
    logging.disable(logging.WARNING)
    data = make_data(head, NUM_SAMPLES, seed=seed)
    return [_errors(head, layout, accumulation, trainer, data) for accumulation in ACCUMULATIONS]


def _errors(head: str, layout: str, accumulation: int, trainer: str, data: Any) -> Errors:
    splits = micro_batches_of(data, layout, accumulation) if head in NOT_ADDITIVE else [data]
    want, want_loss = truth_of_micro_batches(head, splits)
    done, tap = train(
        head,
        accumulation,
        layout=layout,
        data=data,
        trainer_class=TRAINERS[trainer],
        arguments={"train_sampling_strategy": "sequential"},
    )
    entry = done.state.log_history[0]
    return Errors(
        gradient=relative_error(tap.steps[0], want),
        norm=abs(entry["grad_norm"] / norm_of(want) - 1),
        loss=abs(entry["loss"] / want_loss - 1),
    )


def measure_cell(head: str, layout: str, trainer: str, seed: int) -> Result:
    """The largest errors of any rank at each accumulation; or what it crashed with."""
    ranks = on_ranks(layout, measure, head, layout, trainer, seed)
    if isinstance(ranks, str):
        return ranks
    return [max(errors, key=lambda e: max(e.gradient, e.norm, e.loss)) for errors in zip(*ranks, strict=True)]


def on_ranks(layout: str, function: Callable[..., Any], *args: Any) -> list[Any] | str:
    """The results of a function on each rank of a layout, or the error of the rank that failed first."""
    try:
        with silence():
            return run_ranks(function, LAYOUTS[layout].num_ranks, *args, deadline_s=180)
    except RankFailure as failure:
        failures = [report for report in failure.reports if report.is_failure]
        return min(failures, key=lambda report: (report.is_echo, report.time_s)).summary.removeprefix("raised ")


def measure_all(heads: list[str], layouts: list[str], seed: int) -> Cells:
    """Every head in every layout; prints as it goes."""
    cells: Cells = {}
    for layout in layouts:
        for head in heads:
            row = cells[head, layout] = {t: measure_cell(head, layout, t, seed) for t in TRAINERS}
            print(f"{layout:16}{head:24}" + "   ".join(f"{t}: {_line(r)}" for t, r in row.items()), flush=True)
    return cells


def _line(result: Result) -> str:
    if isinstance(result, str):
        return f"crashes: {short_reason(result)[:120]}"
    return " ".join(f"{error.gradient:.1e}" for error in result)


# ---- Recorded ----


def why_neither_runs(row: dict[str, Any]) -> str:
    """The reason of ours, and the stock Trainer's where it is another one."""
    return "; stock: ".join(dict.fromkeys(short_reason(reason) for reason in row.values()))


def record(cells: Cells) -> dict[str, Any]:
    """Layout → what its table shows: errors of the gradient by head, and why heads do not run with either Trainer."""
    layouts: dict[str, Any] = {}
    for (head, layout), row in cells.items():
        found = layouts.setdefault(layout, {"largest": dict.fromkeys(asdict(Errors(0, 0, 0)), 0.0)})
        if is_out_of_reach(row):
            found.setdefault("neither", {})[head] = why_neither_runs(row)
            continue
        found.setdefault("heads", {})[head] = {
            trainer: short_reason(result) if isinstance(result, str) else [errors.gradient for errors in result]
            for trainer, result in row.items()
        }
        for errors in row["ours"] if not isinstance(row["ours"], str) else ():
            for name, value in asdict(errors).items():
                found["largest"][name] = max(value, found["largest"][name])
    return layouts


# ---- Judged ----


def is_out_of_reach(row: dict[str, Result]) -> bool:
    """Neither Trainer runs, and not because of either."""
    return all(isinstance(result, str) for result in row.values())


def faults(cells: Cells) -> list[str]:
    """Cells in which ours is wrong, or crashes where stock does not."""
    found = []
    for (head, layout), row in cells.items():
        if isinstance(row["ours"], str):
            if not isinstance(row["stock"], str):
                found.append(f"{head}, {layout}: only ours crashes: {row['ours']}")
        else:
            wrong = [e for e in row["ours"] if not max(e.gradient, e.norm, e.loss) <= WRONG]
            found += [f"{head}, {layout}: {error}" for error in wrong]
    return found


def unmeasured(cells: Cells, layouts: Iterable[str]) -> list[str]:
    """Layouts in which nothing ran at all, which no table would show as a fault."""
    ran = {layout for (_, layout), row in cells.items() if not is_out_of_reach(row)}
    return [f"{layout}: neither trainer ran, with any head" for layout in layouts if layout not in ran]
