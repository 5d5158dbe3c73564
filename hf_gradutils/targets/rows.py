"""The rows of a batch: their number, and cutting the batch between them.

``num_blocks``: the rows lie in so many blocks of equal size, and a sample is one row of each. A batch of preferences
has two, all chosen rows and then all rejected ones; most batches have one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import TargetCountError


def count_rows(batch: Mapping[str, Any], *, num_blocks: int = 1) -> int:
    """Samples in a batch: the first dim of its first tensor that has one, over the blocks.

    Raises:
        TargetCountError: no tensor has a first dim.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0] // num_blocks
    raise TargetCountError(
        f"the batch has no tensor with a dimension for rows, got {describe(batch)}; pass count_targets"
    )


def take_rows(batch: Mapping[str, Any], start: int, stop: int, *, num_blocks: int = 1) -> dict[str, Any]:
    """Samples ``start`` to ``stop`` of each value that has an entry per sample; other values unchanged."""
    num_rows = count_rows(batch, num_blocks=num_blocks)

    def take(value: Any) -> Any:
        if _is_per_row(value, num_rows):
            return value[start:stop]
        if isinstance(value, Tensor) and _is_per_row(value, num_rows * num_blocks):
            return torch.cat([block[start:stop] for block in value.chunk(num_blocks)])
        return value

    return {name: take(value) for name, value in batch.items()}


def is_divisible(batch: Mapping[str, Any], *, num_blocks: int = 1) -> bool:
    """True if :func:`take_rows` gives a valid batch: every value has an entry per sample.

    The patches of a vision-language model do not, so its rows cannot be taken.
    """
    num_rows = count_rows(batch, num_blocks=num_blocks)
    return all(
        _is_per_row(value, num_rows)
        or (isinstance(value, Tensor) and _is_per_row(value, num_rows * num_blocks))
        or (value.dim() == 0 if isinstance(value, Tensor) else _is_single(value))
        for value in batch.values()
    )


def describe(batch: Mapping[str, Any]) -> str:
    """The contents of a batch as text, for error messages."""
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
    return isinstance(value, str) or not isinstance(value, Sequence | Mapping)
