"""Iterable data whose last batch accelerate fills up with copies: how many rows of it are none.

Without ``dispatch_batches`` every rank reads all the data and takes its slice of each group of batches; the last group
is filled with rows of the first one. Only the reader sees where the data ends, perhaps in a worker process.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from accelerate.data_loader import IterableDatasetShard


class FilledBatch(NamedTuple):
    """A batch of the last group."""

    batch: Any
    num_real_rows: int
    """Rows of this rank that are no copies; perhaps 0."""
    real_input_ids: list[Any]
    """Those of these rows, for a batch that does not keep rows apart."""


class _Row(NamedTuple):
    row: Any
    num_real_rows: int | None
    """Of its batch; None if its group is full."""


class MarkingShard(IterableDatasetShard):  # type: ignore[misc]
    """accelerate's shard, whose rows know about their batch."""

    def __iter__(self) -> Iterator[_Row]:
        num_slices = self.num_processes
        size = self.batch_size // num_slices if self.split_batches else self.batch_size
        shard, counted = copy.copy(self), _Counted(self.dataset)
        shard.__class__, shard.dataset = IterableDatasetShard, counted
        for row in shard:
            num_left = counted.num_read % (size * num_slices)
            yield _Row(row, max(0, min(size, num_left - self.process_index * size)) if num_left else None)


class _Counted:
    """A dataset that counts the rows that are read."""

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self.num_read = 0

    def __iter__(self) -> Iterator[Any]:
        for row in self._dataset:
            self.num_read += 1
            yield row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


@dataclass(frozen=True, slots=True)
class _Collate:
    collate: Callable[[list[Any]], Any]

    def __call__(self, rows: list[_Row]) -> Any:
        samples, num_real = [row.row for row in rows], rows[0].num_real_rows
        batch = self.collate(samples)
        if num_real is None:
            return batch
        real = [sample for sample in samples[:num_real] if isinstance(sample, Mapping)]
        return FilledBatch(batch, num_real, [sample.get("input_ids", ()) for sample in real])


class MarkedLoader:
    """A loader that keeps what is known about its latest batch.

    Args:
        loader: Prepared by accelerate.
    """

    def __init__(self, loader: Any):
        self._loader = loader
        self.filled: FilledBatch | None = None
        """The latest batch, if its group was filled up."""

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.filled = batch if isinstance(batch, FilledBatch) else None
            yield batch if self.filled is None else self.filled.batch
        self.filled = None

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while it is copied
            raise AttributeError(name)
        return getattr(self._loader, name)


@contextlib.contextmanager
def marking_filled_batches(loader: Any) -> Iterator[Any]:
    """Let a loader over a shard of an iterable dataset be a :class:`MarkedLoader`; another one stays as it is."""
    shard, base = getattr(loader, "dataset", None), getattr(loader, "base_dataloader", None)
    if type(shard) is not IterableDatasetShard or base is None:
        yield loader
        return
    collate = base.collate_fn
    shard.__class__, base.collate_fn = MarkingShard, _Collate(collate)
    try:
        yield MarkedLoader(loader)
    finally:
        shard.__class__, base.collate_fn = IterableDatasetShard, collate
