"""Every head in every layout in bfloat16 and float16: ours beside the stock Trainer, against float64."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from benchmarks.exactness.float32 import NOT_ADDITIVE, NUM_SAMPLES, on_ranks
from benchmarks.exactness.half_bounds import ACCUMULATIONS, RIGHT, Cell, Cells, Closeness, Key, Result
from hf_gradutils import GradUtilsTrainer
from tests.harness.gradients import relative_error
from tests.harness.half_cases import with_scaler
from tests.harness.heads import HEADS
from tests.harness.trainer_cases import (
    CHECKPOINTING,
    make_data,
    make_model,
    micro_batches_of,
    train,
    truth_of_micro_batches,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHARDED = ("fsdp2x2", "hsdp2x2")
"""Layouts in which accelerate casts the weights; the others compute under autocast."""
LOSS_SCALE = 16.0
"""fp16's first: under it not even losses that are sums overflow."""


class Scaled:
    """fp16 with its scaler, which accelerate offers on accelerators only."""

    args: Any
    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        """Do what Trainer does, and add the scaler."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.args.fp16:
            with_scaler(self.accelerator, LOSS_SCALE, computes_in_half=True)


class ScaledOurs(Scaled, GradUtilsTrainer):
    """Ours."""


class ScaledStock(Scaled, Trainer):
    """The stock Trainer."""


TRAINERS: dict[str, type[Trainer]] = {"ours": ScaledOurs, "stock": ScaledStock}


def measure_all(heads: Sequence[str], layouts: Sequence[str], seed: int) -> Cells:
    """Every head in every layout and precision; prints as it goes."""
    cells: Cells = {}
    for precision in DTYPES:
        for layout in layouts:
            for head in heads:
                row = {trainer: measure_cells(head, layout, precision, trainer, seed) for trainer in TRAINERS}
                cells[head, layout, precision] = row
                texts = (f"{trainer}: {_line(result)}" for trainer, result in row.items())
                print(f"{precision:6}{layout:16}{head:24}" + "   ".join(texts), flush=True)
    return cells


def _line(result: Result) -> str:
    if isinstance(result, str):
        return f"crashes: {result[:120]}"
    return " ".join(f"{cell.closeness.error:.1e}" for cell in result.values())


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
            alone = in_one_process(head, splits, precision, casts=layout in SHARDED, checkpointing=checkpointing)
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


def in_one_process(
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
    ranks = on_ranks(layout, measure, head, layout, precision, trainer, seed)
    return ranks if isinstance(ranks, str) else ranks[0]
