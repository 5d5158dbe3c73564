"""What a loss is a mean over, and how many of those a batch holds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor

from hf_gradutils.errors import InvalidArgumentError, TargetCountError

LossUnit: TypeAlias = Literal["auto", "rows", "tokens", "shifted_tokens"]
"""What the model's loss averages over:

- ``rows``: the samples of the batch;
- ``tokens``: labels that are not -100;
- ``shifted_tokens``: the same without position 0 of each row, which causal heads never predict;
- ``auto``: rows when labels are absent or floating point, ``shifted_tokens`` for labels of two or more
  dimensions under a head that shifts, ``tokens`` otherwise.
"""

CountTargets: TypeAlias = Callable[[Mapping[str, Any]], Tensor]
"""A user's own count: batch → number of targets, shape ()."""

IGNORE_INDEX = -100
"""The label that transformers' losses skip."""

_HOW_TO_COUNT = "name the unit with loss_unit='rows', or pass count_targets=lambda batch: <0-d tensor>"


def check_loss_unit(loss_unit: str) -> None:
    """Raise InvalidArgumentError unless ``loss_unit`` is one of :data:`LossUnit`."""
    if loss_unit not in get_args(LossUnit):
        raise InvalidArgumentError(f"loss_unit must be one of {get_args(LossUnit)}, got {loss_unit!r}")


def count_rows(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the first dim of its first tensor that has one.

    Raises:
        TargetCountError: no tensor has a first dim.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise TargetCountError(
        f"expected a batch with a tensor of one dimension or more, got {_describe(batch)}; pass count_targets"
    )


def take_rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Rows ``start`` to ``stop`` of every tensor that has as many rows as the batch; the rest as it is."""
    num_rows = count_rows(batch)
    return {
        name: value[start:stop]
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == num_rows
        else value
        for name, value in batch.items()
    }


def is_divisible(batch: Mapping[str, Any]) -> bool:
    """Whether :func:`take_rows` leaves a batch that fits together: everything in it has one entry per row.

    The patches of a vision-language model, or lists of boxes, do not: rows without their patches are no batch.
    """
    num_rows = count_rows(batch)
    return all(
        value.dim() == 0 or value.shape[0] == num_rows
        if isinstance(value, Tensor)
        else not isinstance(value, Sequence | Mapping) or isinstance(value, str)
        for value in batch.values()
    )


def may_shift(batch: Mapping[str, Any]) -> bool:
    """Whether it matters for ``auto`` if the head shifts: token labels of two or more dims, not shifted yet."""
    labels = batch.get("labels")
    return "shift_labels" not in batch and _is_class_labels(labels) and labels.dim() > 1


def resolve_unit(batch: Mapping[str, Any], loss_unit: LossUnit, *, head_shifts: bool) -> LossUnit:
    """The unit that ``auto`` means for this batch; any other unit as it is.

    Raises:
        TargetCountError: the labels are of a kind that nothing can count.
    """
    if loss_unit != "auto":
        return loss_unit
    labels = batch.get("labels")
    if labels is None and "shift_labels" not in batch:
        return "rows"
    if "shift_labels" in batch or _is_class_labels(labels):
        return "shifted_tokens" if head_shifts and may_shift(batch) else "tokens"
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() > 0:
        return "rows"
    raise TargetCountError(
        f"expected labels as a tensor of integers (classes, -100 to skip) or floats (one target a row), got "
        f"{_describe({'labels': labels})}; {_HOW_TO_COUNT}"
    )


def count_targets(batch: Mapping[str, Any], unit: LossUnit) -> Tensor:
    """Targets of one micro-batch.

    Args:
        batch: What the model is called with.
        unit: A resolved unit, not ``auto``.

    Returns:
        Shape (), int64, on the labels' device (CPU for rows).

    Collectives: none. Host syncs: none.

    Raises:
        TargetCountError: the batch holds no labels of the kind that the unit needs.
    """
    if unit == "rows":
        return torch.tensor(count_rows(batch))
    labels = batch.get("shift_labels", batch.get("labels"))
    if not _is_class_labels(labels):
        raise TargetCountError(
            f"expected integer labels to count {unit}, got {_describe({'labels': labels})}; {_HOW_TO_COUNT}"
        )
    if unit == "shifted_tokens" and "shift_labels" not in batch:
        labels = labels[..., 1:]
    return labels.ne(IGNORE_INDEX).sum()


def count_with(
    batch: Mapping[str, Any], loss_unit: LossUnit, count: CountTargets | None, *, head_shifts: bool
) -> Tensor:
    """Targets by the user's own count if there is one, else by the unit.

    Raises:
        TargetCountError: the labels cannot be counted, or the user's count is no single number.
    """
    if count is None:
        return count_targets(batch, resolve_unit(batch, loss_unit, head_shifts=head_shifts))
    num_targets = torch.as_tensor(count(batch))
    if num_targets.numel() != 1:
        raise TargetCountError(f"count_targets must return one number, got shape {tuple(num_targets.shape)}")
    return num_targets.reshape(())


def with_one_target(batch: Mapping[str, Any], num_targets: Tensor) -> Mapping[str, Any]:
    """The batch, with one label of class 0 added where there is no target at all.

    A mean over nothing is 0/0, and its gradient is NaN even where it is multiplied by zero afterwards. With one
    target the backward runs on every rank, and the weight 0 removes what it gives.

    Host syncs: none; the choice is made on the device.
    """
    changed = {}
    for name in ("labels", "shift_labels"):
        labels = batch.get(name)
        if _is_class_labels(labels) and labels.numel():
            # The last position of the first row: shifted or not, it is predicted from something.
            place = torch.zeros_like(labels, dtype=torch.bool)
            place[(0,) + (-1,) * (labels.dim() - 1)] = True
            is_empty = (num_targets == 0).to(labels.device, non_blocking=True)
            changed[name] = torch.where(place & is_empty, 0, labels)
    return {**batch, **changed}


def _is_class_labels(labels: object) -> TypeGuard[Tensor]:
    return (
        isinstance(labels, Tensor)
        and labels.dim() > 0
        and not labels.is_floating_point()
        and not labels.is_complex()
        and labels.dtype != torch.bool
    )


def _describe(batch: Mapping[str, Any]) -> str:
    parts = []
    for name, value in batch.items():
        kind = f"{value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        parts.append(f"{name}: {kind}")
    return "{" + "; ".join(parts) + "}"
