"""The rows of a batch: their number, and cutting the batch between them.

A batch is a mapping, a tuple or a list of tensors; what is made of it has its type. Other objects have no entries that
could be looked at, and only a count of the user's own counts them.

``num_blocks``: the rows lie in so many blocks of equal size, and a sample is one row of each. A batch of preferences
has two, all chosen rows and then all rejected ones; most batches have one.
"""

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import TargetCountError

_ONE_ENTRY_PER_ROW = ("input_ids", "inputs_embeds", "attention_mask", "start_positions")
"""Names whose first dim is the rows' where other tensors have another: pieces of images, nodes, tables of positions."""


def entries_of(batch: Any) -> Mapping[Any, Any]:
    """The entries of a batch by name, or by position; none of an object that is neither a mapping nor a sequence."""
    if isinstance(batch, Mapping):
        return batch
    return dict(enumerate(batch)) if isinstance(batch, list | tuple) else {}


def with_entries(batch: Any, changed: Mapping[Any, Any]) -> Any:
    """A batch of the same type with some entries replaced; the batch itself is left as it is."""
    if isinstance(batch, MutableMapping):
        replaced: Any = copy.copy(batch)
        for name, value in changed.items():
            replaced[name] = value
        return replaced
    values = {**entries_of(batch), **changed}
    if isinstance(batch, Mapping):
        return values
    return type(batch)(*values.values()) if hasattr(batch, "_fields") else type(batch)(values.values())


def with_own_tensors(batch: Any) -> Any:
    """A copy whose containers and tensors a loss may change; objects of other types inside are shared."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, Mapping | list | tuple):
            return with_entries(value, {name: own(entry) for name, entry in entries_of(value).items()})
        return value

    return own(batch) if isinstance(batch, Mapping | list | tuple) else copy.copy(batch)


def count_rows(batch: Any, *, num_blocks: int = 1) -> int:
    """Samples in a batch: the first dim of its labels, or else of all its tensors, over the blocks.

    Raises:
        TargetCountError: no tensor has a first dim, or tensors without labels have different ones.
    """
    entries = entries_of(batch)
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor) and value.dim() > 0}
    if "labels" in tensors:
        return tensors["labels"].shape[0] // num_blocks
    first_dims = {value.shape[0] for value in tensors.values()}
    if len(first_dims) == 1:
        return first_dims.pop() // num_blocks
    if not tensors:
        raise TargetCountError(
            f"the batch has no tensor with a dimension for rows, got {describe(batch)}; pass count_targets"
        )
    for name in _ONE_ENTRY_PER_ROW:
        # One row that is longer than the others are many may hold all samples, one after the other.
        if name in tensors and tensors[name].shape[0] > 1:
            return tensors[name].shape[0] // num_blocks
    raise TargetCountError(
        f"the tensors of the batch have different first dims and none is labels, so that nothing tells its rows, got "
        f"{describe(batch)}; pass count_targets"
    )


def take_rows(batch: Any, start: int, stop: int, *, num_blocks: int = 1) -> Any:
    """Samples ``start`` to ``stop`` of each value that has an entry per sample; other values unchanged."""
    num_rows = count_rows(batch, num_blocks=num_blocks)

    def take(value: Any) -> Any:
        if _is_per_row(value, num_rows):
            return value[start:stop]
        if isinstance(value, Tensor) and _is_per_row(value, num_rows * num_blocks):
            return torch.cat([block[start:stop] for block in value.chunk(num_blocks)])
        return value

    return with_entries(batch, {name: take(value) for name, value in entries_of(batch).items()})


def is_divisible(batch: Any, *, num_blocks: int = 1) -> bool:
    """True if :func:`take_rows` gives a valid batch: every value has an entry per sample.

    The patches of a vision-language model do not, so its rows cannot be taken.
    """
    try:
        num_rows = count_rows(batch, num_blocks=num_blocks)
    except TargetCountError:
        return False
    return all(
        _is_per_row(value, num_rows)
        or (isinstance(value, Tensor) and _is_per_row(value, num_rows * num_blocks))
        or (value.dim() == 0 if isinstance(value, Tensor) else _is_single(value))
        for value in entries_of(batch).values()
    )


def describe(batch: Any) -> str:
    """The contents of a batch as text, for error messages."""
    if not isinstance(batch, Mapping | list | tuple):
        return f"an object of type {type(batch).__name__}"
    parts = []
    for name, value in entries_of(batch).items():
        kind = f"{value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        parts.append(f"{name}: {kind}")
    return "{" + "; ".join(parts) + "}"


def _is_per_row(value: object, num_rows: int) -> bool:
    if isinstance(value, Tensor):
        return _has_rows(value) and value.dim() > 0 and value.shape[0] == num_rows
    return isinstance(value, list | tuple) and len(value) == num_rows


def _has_rows(value: Tensor) -> bool:
    """False for a sparse or nested tensor, which cannot be cut."""
    return value.layout == torch.strided and not value.is_nested


def _is_single(value: object) -> bool:
    return isinstance(value, str) or not isinstance(value, Sequence | Mapping)
