"""Questions to a loss, without changing any state.

Names, signatures and tables are wrong for dozens of heads; two questions to the loss are not:

- *Does the head shift?* Labels at position 0 alone are no targets to a head that shifts: its loss is the same as
  without any labels.
- *Is the loss a mean over the targets counted?* For a batch of two parts A and B, L(AB)·n(AB) = L(A)·n(A) + L(B)·n(B).
  A loss that fails this has another unit, or none (contrastive losses, a square root of a mean).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.counter import IGNORE_INDEX, TargetCounter
from hf_gradutils.targets.rows import count_rows, entries_of, take_rows, with_entries

LossOf: TypeAlias = Callable[[Any], Tensor]
"""Batch → its mean loss in training, shape ()."""

TOLERANCE = 2e-5
"""Relative error of additivity in float32: right units stay below 6e-6 and wrong ones start at 2e-5 on 799 heads."""
TOLERANCE_REDUCED = 5e-3
"""Relative error if a batch's composition changes its rounding (half precision, autocast, TF32), beyond the rounding of
the loss itself and that of few targets."""
_SMALLEST_LOSS = 1e-6
"""A mean loss nearer to 0 than this is rounding of larger numbers that cancel; it is not compared."""

LATER_STEPS = (1, 10, 100, 1000)
"""Optimizer steps after which training is looked at again, for what the first could not show."""

HOW_TO_FIX = (
    "set loss_unit or count_targets to what the loss averages over: loss_unit='rows' for a mean of rows' means, "
    "loss_unit='sum' for a sum, count_targets=lambda batch: weights[batch['labels']].sum() for class weights. A loss "
    "that compares all rows of the batch (contrastive) is exact in two passes: GradUtilsTrainer does so for heads that "
    "it knows, and for one of your own with whole_batch_loss=WholeBatchLoss(embed, loss, parameters). A loss that adds "
    "means over different targets is exact if compute_loss returns [(loss, count), …]. Otherwise train on one "
    "process with gradient_accumulation_steps=1, or accept the mean of the micro-batches' losses with "
    "check_loss_unit=False, as for rows that belong together where check_invariance passes"
)


@dataclass(frozen=True, slots=True)
class Parts:
    """A batch, and the two parts that it was cut into or collated from."""

    whole: Any
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class Additivity:
    """Both sides of L(AB)·n(AB) = L(A)·n(A) + L(B)·n(B) on one rank; NaN if unchecked."""

    whole: float
    parts: tuple[float, float]
    num_targets: float
    rounding: float = 0.0
    """Largest error of the equation from the rounding of half precision."""

    @property
    def difference(self) -> float:
        """|whole − Σ parts|."""
        return abs(self.whole - sum(self.parts))

    @property
    def relative_error(self) -> float:
        """The difference beyond rounding, over the larger sum of magnitudes; NaN if unchecked."""
        scale = max(abs(self.whole), sum(map(abs, self.parts)))
        difference = max(self.difference - self.rounding, 0.0)
        return difference / scale if scale > _SMALLEST_LOSS * self.num_targets else math.nan


UNCHECKED = Additivity(math.nan, (math.nan, math.nan), 0.0)


def loss_ignores_first_position(loss_of: LossOf, batch: Any) -> bool | None:
    """True if position 0 of the labels, classes of two or more dimensions, is no target of the loss.

    Two forwards. None for a head that fails without labels: if it shifts all the same, the check of additivity fails.
    """
    labels = entries_of(batch)["labels"]
    nothing = torch.full_like(labels, IGNORE_INDEX)
    only_first = nothing.clone()
    only_first[..., 0] = labels.clamp(min=0).amax()  # a class that exists
    try:
        with_first, without = (float(loss_of(with_entries(batch, {"labels": x}))) for x in (only_first, nothing))
    except torch.AcceleratorError as error:
        raise LossUnitError(
            "the head takes the label -100 for a class, which made CUDA unusable in this process when the shift was "
            "probed; set loss_unit='tokens' or 'shifted_tokens', or pass count_targets"
        ) from error
    except Exception:  # whatever a head raises that cannot do without labels
        return None
    return with_first == without or (math.isnan(with_first) and math.isnan(without))


def cut_after(batch: Any, num_rows: int, *, num_blocks: int = 1) -> Parts:
    """The batch and its parts, A with ``num_rows`` rows."""
    ends = (0, num_rows), (num_rows, count_rows(batch, num_blocks=num_blocks))
    return Parts(batch, *(take_rows(batch, *rows, num_blocks=num_blocks) for rows in ends))


def compare(loss_of: LossOf, parts: Parts, counter: TargetCounter, *, rounding: float = 0.0) -> Additivity:
    """Both sides of the equation for a batch and its parts. Three forwards; one host sync each.

    Args:
        loss_of: Called without gradients, in evaluation mode.
        parts: Of this rank.
        counter: Batch → targets.
        rounding: The distance from 1 to the next number of the coarsest dtype that the model computes in; 0 for
            float32 or better.
    """
    counts = [counter(part) for part in (parts.whole, parts.first, parts.second)]  # before a forward, if that fails
    sums, error = [], 0.0
    for part, num_targets in zip((parts.whole, parts.first, parts.second), counts, strict=True):
        weight = float(counter.weight(num_targets))
        loss = loss_of(part)
        value = float(loss)
        sums.append(value * weight if weight else 0.0)
        error += _rounding_of_loss(value, loss.dtype, rounding) * weight
    # Each target's loss has an error of its own where products are rounded; those of many targets cancel.
    fewest = max(min(map(float, counts[1:])), 1.0)
    error += 4 * rounding / math.sqrt(fewest) * abs(sums[0]) if math.isfinite(sums[0]) else 0.0
    return Additivity(sums[0], (sums[1], sums[2]), float(counts[0]), error)


def tolerance_for(rounding: float) -> float:
    """The largest relative error of a right unit; ``rounding`` as for :func:`compare`."""
    return TOLERANCE_REDUCED if rounding else TOLERANCE


def _rounding_of_loss(loss: float, dtype: torch.dtype, rounding: float) -> float:
    """The rounding error of a loss in half precision: two steps to the next such number; else 0.

    The dtype does not always show it: a head may compute in half precision and return float32, so there a value that
    fits half precision counts as one. One step would do for a loss rounded once; torch's cross entropy on the CPU also
    sums in half precision, and is off by up to 1.8 steps, for 8 targets as for 30,000. Of other losses, one in 65,536
    passes for a bfloat16 and one in 8,192 for a float16.
    """
    for half in (torch.bfloat16, torch.float16):
        fits = rounding and loss and float(torch.tensor(loss, dtype=torch.float64).to(half)) == loss
        if math.isfinite(loss) and loss and (dtype == half or fits):
            return float(2 * torch.finfo(half).eps * 2.0 ** math.floor(math.log2(abs(loss))))
    return 0.0
