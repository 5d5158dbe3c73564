"""Every head in every layout in bfloat16 and float16: ours beside the stock Trainer, against float64.

The second part of ``benchmarks/exactness.py``, which prints and writes what is measured here.

Half precision rounds, so no gradient is exact. A cell is judged by two numbers that float64 gives:

    error    ‖g - g*‖ / ‖g*‖          at most MOST_TIMES the reference's
    scale    ⟨g, g*⟩ / ‖g*‖²          at most MOST_SCALE off the reference's: rounding averages out in it

The reference is the stock Trainer's cell where the stock Trainer is right (in float32, with the same data), and else
one process that computes the whole batch in the same precision, in plain torch. A gradient that is 1.05 times as long
has to fail in every cell, or the cell tells nothing and is a fault.
"""

import contextlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer
from tests.harness.gradients import relative_error
from tests.harness.half_cases import with_scaler
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainer_cases import (
    CHECKPOINTING,
    make_data,
    make_model,
    micro_batches_of,
    train,
    truth_of_micro_batches,
)

ACCUMULATIONS = (1, 4)
NUM_SAMPLES = 32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_TIMES = {"stock": 1.2, "one process": 1.5, "one process with a router": 4.0}
"""By reference. A router that sends a token elsewhere for a last bit moves the gradient by more than rounding."""
MOST_SCALE = {"bf16": 0.02, "fp16": 0.005}
PLANTED = 1.05
"""A scale that has to fail."""
SHARDED = ("fsdp2x2", "hsdp2x2")
"""Layouts in which accelerate casts the weights; the others compute under autocast."""
RIGHT = 1e-5
"""The stock Trainer is right where its relative error in float32 is not above this."""
LOSS_SCALE = 16.0
"""fp16's first: under it not even losses that are sums overflow."""
NOT_ADDITIVE = ("qwen3 moe aux",)
"""Heads with a term that no split leaves alone, see ``benchmarks/exactness.py``."""


class Scaled:
    """fp16 with its scaler, which accelerate offers on accelerators only."""

    args: Any
    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.args.fp16:
            with_scaler(self.accelerator, LOSS_SCALE, computes_in_half=True)


class ScaledOurs(Scaled, GradUtilsTrainer):
    """Ours."""


class ScaledStock(Scaled, Trainer):
    """The stock Trainer."""


TRAINERS: dict[str, type[Trainer]] = {"ours": ScaledOurs, "stock": ScaledStock}


@dataclass(frozen=True)
class Closeness:
    """How near one optimizer step's gradient is to float64's."""

    error: float
    scale: float

    def times(self, factor: float) -> "Closeness":
        """Of the gradient that is this many times as long."""
        # ‖f·g - g*‖² = f²·‖g‖² - 2f·⟨g, g*⟩ + ‖g*‖², in units of ‖g*‖²
        square_norm = self.error**2 + 2 * self.scale - 1
        square = factor**2 * square_norm - 2 * factor * self.scale + 1
        return Closeness(math.sqrt(max(square, 0.0)), factor * self.scale)


@dataclass(frozen=True)
class Cell:
    """One head in one layout, precision and accumulation, with activation checkpointing or without."""

    closeness: Closeness
    one_process: Closeness
    """Of one process with the whole batch in the same precision, in plain torch."""
    is_right_in_float32: bool
    """Relative error of the stock Trainer in float32 not above ``RIGHT``; False for ours, which nothing asks."""

    @property
    def is_right(self) -> bool:
        """For the stock Trainer. Right in float32 is not enough: under fp16 and native sharding it does not unscale."""
        return self.is_right_in_float32 and abs(self.closeness.scale - self.one_process.scale) < PLANTED - 1


Key = tuple[int, bool]
"""(accumulation, activation checkpointing)."""
Result = dict[Key, Cell] | str
"""What came of a trainer; or what it crashed with."""
Cells = dict[tuple[str, str, str], dict[str, Result]]
"""(head, layout, precision) → trainer → result."""


# ---- Measuring ----


def closeness(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Closeness:
    square = sum(float(w.square().sum()) for w in want.values())
    product = sum(float((got[name] * w).sum()) for name, w in want.items() if name in got)
    return Closeness(relative_error(dict(got), dict(want)), product / square)


def measure(head: str, layout: str, precision: str, trainer: str, seed: int) -> dict[Key, Cell]:
    """All cells of a trainer. Runs on every rank of the layout; rank 0 looks at the gradients."""
    logging.disable(logging.WARNING)
    data = make_data(head, NUM_SAMPLES, seed=seed)
    cells = {}
    for accumulation in ACCUMULATIONS:
        splits = micro_batches_of(data, layout, accumulation) if head in NOT_ADDITIVE else [data]
        steps = {}
        for checkpointing in (False, True) if can_checkpoint(head) else (False,):
            steps[checkpointing] = _gradient(
                head, layout, precision, accumulation, trainer, data, checkpointing=checkpointing
            )
        # Ours in float32 is the matter of the first part.
        wide = _gradient(head, layout, None, accumulation, trainer, data) if trainer == "stock" else None
        if dist.is_initialized() and dist.get_rank() > 0:
            continue
        want, _ = truth_of_micro_batches(head, splits)
        is_right = wide is not None and relative_error(wide, want) <= RIGHT
        for checkpointing, got in steps.items():
            alone = _in_one_process(head, splits, precision, casts=layout in SHARDED, checkpointing=checkpointing)
            cells[accumulation, checkpointing] = Cell(closeness(got, want), closeness(alone, want), is_right)
    return cells


def can_checkpoint(head: str) -> bool:
    return bool(getattr(HEADS[head].build(), "supports_gradient_checkpointing", False))


def _gradient(
    head: str,
    layout: str,
    precision: str | None,
    accumulation: int,
    trainer: str,
    data: Any,
    *,
    checkpointing: bool = False,
) -> dict[str, Tensor]:
    arguments: dict[str, Any] = {"train_sampling_strategy": "sequential", CHECKPOINTING: checkpointing}
    arguments["max_grad_norm"] = 1e9  # clips nothing, but sees to it that stock unscales fp16 before the tap
    # Checkpointing turns it off. The process group of one rank has DDP around the model too.
    arguments["ddp_find_unused_parameters"] = True if layout in ("one_rank", "ddp2", "ddp4") else None
    if precision is not None:
        arguments[precision] = True
    done, tap = train(
        head, accumulation, layout=layout, data=data, trainer_class=TRAINERS[trainer], arguments=arguments
    )
    assert (done.accelerator.scaler is not None) == (precision == "fp16")
    assert getattr(done.model, f"is_{CHECKPOINTING}", False) == checkpointing
    return tap.steps[0]


def _in_one_process(
    head: str, micro_batches: Sequence[Any], precision: str, *, casts: bool, checkpointing: bool
) -> dict[str, Tensor]:
    """The gradient that plain torch computes in this precision, in float64."""
    dtype = DTYPES[precision]
    model = make_model(head)
    model = model.to(dtype) if casts else model
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    batches = [HEADS[head].collate(rows) for rows in micro_batches]
    counts = [HEADS[head].targets(batch) for batch in batches]
    scale = LOSS_SCALE if precision == "fp16" else 1.0
    total: dict[str, Tensor] = {}
    for batch, count in zip(batches, counts, strict=True):
        if casts:
            batch = {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}
        with contextlib.nullcontext() if casts else torch.autocast("cpu", dtype):
            loss = model(**batch)["loss"]
        (loss.float() * (scale * count / sum(counts))).backward()
        _add_gradients(total, model, 1 / scale)
    return total


def _add_gradients(total: dict[str, Tensor], model: nn.Module, factor: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            total[name] = total.get(name, 0.0) + parameter.grad.double() * factor
            parameter.grad = None


def measure_cells(head: str, layout: str, precision: str, trainer: str, seed: int) -> Result:
    """The cells; or what it crashed with."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ranks = run_ranks(
                measure, LAYOUTS[layout].num_ranks, head, layout, precision, trainer, seed, deadline_s=180
            )
    except RankFailure as failure:
        failures = [report for report in failure.reports if report.is_failure]
        return min(failures, key=lambda report: (report.is_echo, report.time_s)).summary.removeprefix("raised ")
    cells: dict[Key, Cell] = ranks[0]
    return cells


# ---- Judging ----


def reference_of(head: str, row: Mapping[str, Result], key: Key) -> tuple[str, Closeness]:
    """What ours is held against: the name of it, and how near it is."""
    ours, stock = row["ours"], row["stock"]
    assert not isinstance(ours, str)
    if not isinstance(stock, str) and stock[key].is_right:
        return "stock", stock[key].closeness
    return "one process with a router" if "moe" in head else "one process", ours[key].one_process


def why_wrong(got: Closeness, name: str, reference: Closeness, precision: str) -> str:
    """In which of the two numbers it is off; empty if in none."""
    if not got.error <= MOST_TIMES[name] * reference.error:
        return f"error {got.error:.1e}, {name} {reference.error:.1e}"
    if not abs(got.scale - reference.scale) <= MOST_SCALE[precision]:
        return f"scale {got.scale:.4f}, {name} {reference.scale:.4f}"
    return ""


def faults(cells: Cells) -> list[str]:
    """What must not be: ours wrong or crashing where stock does not, and cells that a planted scale passes."""
    found = []
    for (head, layout, precision), row in cells.items():
        ours = row["ours"]
        where = f"{head}, {layout}, {precision}"
        if isinstance(ours, str):
            if not isinstance(row["stock"], str):
                found.append(f"{where}: only ours crashes: {ours}")
            continue
        for key, cell in ours.items():
            reference = reference_of(head, row, key)
            place = f"{where}, accumulation {key[0]}{', checkpointing' if key[1] else ''}"
            if why := why_wrong(cell.closeness, *reference, precision):
                found.append(f"{place}: {why}")
            elif not why_wrong(cell.closeness.times(PLANTED), *reference, precision):
                found.append(f"{place}: a scale of {PLANTED} passes as well")
    return found
