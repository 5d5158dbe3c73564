"""The rows of a batch: how many there are, and whether it can be cut between them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_gradutils.errors import TargetCountError


def count_rows(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the first dim of its first tensor that has one.

    Raises:
        TargetCountError: no tensor has a first dim.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise TargetCountError(
        f"expected a batch with a tensor of one dimension or more, got {describe(batch)}; pass count_targets"
    )


def take_rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Rows ``start`` to ``stop`` of everything that has one entry per row; the rest as it is."""
    num_rows = count_rows(batch)
    return {name: value[start:stop] if _is_per_row(value, num_rows) else value for name, value in batch.items()}


def is_divisible(batch: Mapping[str, Any]) -> bool:
    """Whether :func:`take_rows` leaves a batch that fits together: everything in it has one entry per row.

    The patches of a vision-language model do not: rows without their patches are no batch.
    """
    num_rows = count_rows(batch)
    return all(_is_per_row(value, num_rows) or _is_single(value) for value in batch.values())


def describe(batch: Mapping[str, Any]) -> str:
    """What is in a batch, for an error message."""
    parts = []
    for name, value in batch.items():
        kind = f"{value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        parts.append(f"{name}: {kind}")
    return "{" + "; ".join(parts) + "}"


def _is_per_row(value: object, num_rows: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] == num_rows
    return isinstance(value, list | tuple) and len(value) == num_rows


def _is_single(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, str) or not isinstance(value, Sequence | Mapping)
