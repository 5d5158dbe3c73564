"""A batch whose collator draws random numbers, as for masked language models: collated once, and cut between rows."""

import copy
from collections import UserDict
from typing import Any

import torch
from torch import Tensor


def alike(a: Any, b: Any) -> bool:
    """True if two batches have equal contents; objects of unknown types count as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict | UserDict) and isinstance(b, dict | UserDict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return not isinstance(a, int | float | str | type(None)) or a == b


def can_be_cut(batch: Any, num_rows: int, of_one_row: Any) -> bool:
    """True if each entry of a batch has a row for each sample, or is the same for any number of them.

    Args:
        batch: Of ``num_rows`` samples, more than one.
        num_rows: Of the batch.
        of_one_row: The batch of one of the samples.
    """
    if not isinstance(batch, dict | UserDict) or not isinstance(of_one_row, dict | UserDict):
        return False
    if batch.keys() != of_one_row.keys():
        return False
    has_rows = {name: _has_rows(batch[name], num_rows) and _has_rows(of_one_row[name], 1) for name in batch}
    is_same = {name: alike(batch[name], of_one_row[name]) and not _has_rows(batch[name], num_rows) for name in batch}
    return any(has_rows.values()) and all(has_rows[name] or is_same[name] for name in batch)


def cut(batch: Any, num_rows: int, start: int, stop: int) -> Any:
    """Some rows of a batch that can be cut, as one of the same type with memory of its own."""
    entries = {name: _cut(value, num_rows, start, stop) for name, value in batch.items()}
    if not isinstance(batch, UserDict):
        return entries
    part = copy.copy(batch)
    part.data = entries
    return part


def _cut(value: Any, num_rows: int, start: int, stop: int) -> Any:
    if not _has_rows(value, num_rows):
        return copy.deepcopy(value)
    return value[start:stop].clone() if isinstance(value, Tensor) else copy.deepcopy(value[start:stop])


def _has_rows(value: Any, num_rows: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == num_rows
    return isinstance(value, list) and len(value) == num_rows
