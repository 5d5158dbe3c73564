"""Probe the loss on the first batch, without changing any state.

Names, signatures and tables are wrong for dozens of heads; two probes of the loss are not:

- *Does the head shift?* Labels at position 0 alone are no targets to a head that shifts: its loss is the same as
  without any labels.
- *Is the loss a mean over the targets counted?* For a batch split into A and B, L(AB)·n(AB) = L(A)·n(A) + L(B)·n(B).
  A loss that fails this has another unit, or none (contrastive losses, a square root of a mean).
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.counter import IGNORE_INDEX, TargetCounter
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows

LossOf: TypeAlias = Callable[[Mapping[str, Any]], Tensor]
"""Batch → its mean loss in training, shape ()."""

TOLERANCE = 2e-5
"""Relative error of additivity in float32: right units stay below 6e-6 and wrong ones start at 2e-5 on 799 heads."""
TOLERANCE_REDUCED = 5e-3
"""Relative error if a batch's composition changes its rounding (half precision, autocast, TF32), beyond the rounding of
the loss itself."""
_SMALLEST_LOSS = 1e-6
"""A mean loss nearer to 0 than this is rounding of larger numbers that cancel; it is not compared."""

HOW_TO_FIX = (
    "set loss_unit or count_targets to what the loss averages over; a loss that is no mean of its samples' losses "
    "(contrastive) has no exact accumulation: train it on one process with gradient_accumulation_steps=1, or accept "
    "the mean of its micro-batches with check_loss_unit=False"
)


@dataclass(frozen=True, slots=True)
class Additivity:
    """Both sides of L(AB)·n(AB) = L(A)·n(A) + L(B)·n(B) on one rank; NaN if unchecked."""

    whole: float
    parts: tuple[float, float]
    num_targets: float
    rounding: float = 0.0
    """Largest error of the equation from the head's rounding of the three losses."""

    @property
    def relative_error(self) -> float:
        """|whole − Σ parts| beyond rounding, over the larger sum of magnitudes; NaN if unchecked."""
        scale = max(abs(self.whole), sum(map(abs, self.parts)))
        difference = max(abs(self.whole - sum(self.parts)) - self.rounding, 0.0)
        return difference / scale if scale > _SMALLEST_LOSS * self.num_targets else math.nan


UNCHECKED = Additivity(math.nan, (math.nan, math.nan), 0.0)


def loss_ignores_first_position(loss_of: LossOf, batch: Mapping[str, Any]) -> bool:
    """True if position 0 of the labels, classes of two or more dimensions, is no target of the loss.

    Two forwards, the same on every rank; ``loss_of`` is called under :func:`undisturbed`.
    """
    labels = batch["labels"]
    nothing = torch.full_like(labels, IGNORE_INDEX)
    only_first = nothing.clone()
    only_first[..., 0] = labels.clamp(min=0).amax()  # a class that exists
    try:
        with_first, without = (float(loss_of({**batch, "labels": x})) for x in (only_first, nothing))
    except torch.AcceleratorError as error:
        raise LossUnitError(
            "the head takes the label -100 for a class, which made CUDA unusable in this process when the shift was "
            "probed; set loss_unit='tokens' or 'shifted_tokens', or pass count_targets"
        ) from error
    except (RuntimeError, IndexError, ValueError):
        return False  # a head that needs labels; if it shifts all the same, the check of additivity fails
    return with_first == without or (math.isnan(with_first) and math.isnan(without))


def check_additivity(
    loss_of: LossOf,
    batch: Mapping[str, Any],
    counter: TargetCounter,
    *,
    num_blocks: int = 1,
    exact_arithmetic: bool = True,
) -> Additivity:
    """Both sides of the equation for a batch. Three forwards on every rank, even if nothing can be split.

    Args:
        loss_of: Called under :func:`undisturbed`.
        batch: One row, or a batch that is not divisible, gives NaN.
        counter: Batch → targets.
        num_blocks: As in :mod:`hf_gradutils.targets.rows`.
        exact_arithmetic: Losses are in float32 or better, even if their values fit half precision.
    """
    num_rows = count_rows(batch, num_blocks=num_blocks)
    take = functools.partial(take_rows, batch, num_blocks=num_blocks)
    is_cut = num_rows > 1 and is_divisible(batch, num_blocks=num_blocks)
    cut = _most_telling_cut([counter(take(row, row + 1)) for row in range(num_rows)]) if is_cut else 0
    parts = [batch, take(0, cut), take(cut, num_rows)] if cut else [batch] * 3
    sums, rounding = [], 0.0
    for part in parts:
        weight = float(counter.weight(counter(part)))
        loss = float(loss_of(part))
        sums.append(loss * weight if weight else 0.0)
        rounding += 0.0 if exact_arithmetic else _rounding(loss) * weight
    if not cut:
        return UNCHECKED
    return Additivity(sums[0], (sums[1], sums[2]), float(counter(batch)), rounding)


def _rounding(loss: float) -> float:
    """The rounding error of a loss whose value fits half precision: two steps to the next such number; else 0.

    The dtype does not show it: a head may compute in half precision and return float32. One step would do for a loss
    rounded once; torch's cross entropy on the CPU also sums in half precision, and is off by up to 1.8 steps, for 8
    targets as for 30,000. Of other losses, one in 65,536 passes for a bfloat16 and one in 8,192 for a float16.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if loss and math.isfinite(loss) and float(torch.tensor(loss, dtype=torch.float64).to(dtype)) == loss:
            return float(2 * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(loss))))
    return 0.0


def _most_telling_cut(targets_of_rows: list[Tensor]) -> int:
    """Rows of part A for which its share of the targets differs most from its share of the rows.

    If both shares are equal, a mean over rows passes for a mean over targets.
    """
    num_rows = len(targets_of_rows)
    num_targets = torch.stack(targets_of_rows).to("cpu", torch.float64)  # where cumsum is deterministic
    in_a, rows_in_a = num_targets.cumsum(0), torch.arange(1, num_rows + 1)
    contrast = (in_a - in_a[-1] * rows_in_a / num_rows).abs().nan_to_num()
    least = 2 if num_rows >= 4 else 1  # a single row is too few for some heads' normalisation
    contrast[: least - 1], contrast[num_rows - least :] = -1.0, -1.0
    return int(contrast.argmax()) + 1 if contrast.amax() > 0 else num_rows // 2
