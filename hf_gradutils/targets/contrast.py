"""Which parts of a batch tell a mean over the targets counted from other means.

A mean over rows passes for a mean over targets where every row has as many, and a mean with class weights passes where
both parts have the same classes. The contrast of two parts is how far part A's share of the targets is from its shares
of the rows and labels, or of the classes if that is less.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_gradutils.targets.counter import TargetCounter, is_class_labels, labels_of
from hf_gradutils.targets.rows import count_rows, take_rows

NO_RIVAL = 1.0
"""The contrast where there is nothing to confuse the unit with: a mean over rows that have no classes, or a sum."""
_TELLING, _TELLING_REDUCED = 0.01, 0.05
_MIDDLE = 1e-9
"""Of equal cuts, the one nearest to the middle."""
_NUM_CLASSES = 1024
"""Classes whose numbers are equal modulo this count as one."""


class Amounts(NamedTuple):
    """What one row has of the targets, and of what else a loss might be a mean over."""

    targets: float
    counts: tuple[float, ...]
    """Rows and labels; empty if the unit has no rival."""
    classes: Tensor | None
    """Labels of each class, shape (1024,), float64, on the CPU; None without classes."""


def least_contrast(*, is_rounded: bool) -> float:
    """The contrast from which parts tell; a larger one is needed where rounding hides small differences."""
    return _TELLING_REDUCED if is_rounded else _TELLING


def amounts_of(row: Any, counter: TargetCounter) -> Amounts:
    """Look at one row. Host syncs: up to three."""
    targets, labels = float(counter(row)), labels_of(row)
    if counter.is_sum:
        return Amounts(targets, (), None)
    if not is_class_labels(labels):
        counts_rows = counter.count is None and counter.loss_unit in ("auto", "rows")
        return Amounts(targets, () if counts_rows else (1.0,), None)
    classes = labels[labels.ne(counter.ignore_index)].flatten().to("cpu", torch.int64)
    of_each = torch.bincount(classes % _NUM_CLASSES, minlength=_NUM_CLASSES).to(torch.float64)
    return Amounts(targets, (1.0, float(classes.numel())) if labels.dim() > 1 else (), of_each)


def contrast_of(rows: Sequence[Amounts]) -> Tensor:
    """The contrast of each cut, after 1, 2, … rows: shape (rows − 1,), float64, on the CPU."""
    num_targets = torch.tensor([row.targets for row in rows], dtype=torch.float64)
    of_targets = num_targets.cumsum(0)[:-1, None] / num_targets.sum()
    contrast = torch.full((len(rows) - 1,), NO_RIVAL, dtype=torch.float64)
    if rows[0].counts:
        counts = torch.tensor([row.counts for row in rows], dtype=torch.float64)
        contrast = (_shares(counts) - of_targets).abs().nan_to_num().amax(1)
    if rows[0].classes is not None:
        classes = torch.stack([row.classes for row in rows if row.classes is not None])
        # Each class counts by its part of all labels, so that many rare ones do not look like much.
        parts = classes.sum(0) / classes.sum().clamp(min=1)
        contrast = torch.minimum(contrast, ((_shares(classes) - of_targets).abs() * parts).nan_to_num().sum(1))
    return contrast


def _shares(amounts: Tensor) -> Tensor:
    """Of (rows, kinds), each kind's part before each cut; NaN for a kind that is nowhere."""
    return amounts.cumsum(0)[:-1] / amounts.sum(0)


def contrast_of_cuts(batch: Any, counter: TargetCounter, *, num_blocks: int = 1) -> Tensor:
    """The contrast of each cut of a divisible batch of two rows or more, after 1, 2, … rows.

    Returns:
        Shape (rows − 1,), float64, on the CPU. Cuts that leave a part a single row of four or more have −1: that is too
        few for some heads' normalisation. Host syncs: up to three per row.
    """
    num_rows = count_rows(batch, num_blocks=num_blocks)
    contrast = contrast_of(
        [amounts_of(take_rows(batch, row, row + 1, num_blocks=num_blocks), counter) for row in range(num_rows)]
    )
    left = torch.arange(1, num_rows)
    contrast += _MIDDLE * torch.minimum(left, num_rows - left)
    if num_rows >= 4:
        contrast[0] = contrast[-1] = -1.0
    return contrast
