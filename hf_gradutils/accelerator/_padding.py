"""Padding: a rank with fewer batches than others repeats one, which counts for nothing.

All ranks must run the same number of micro-batches, because layers communicate in them. A Trainer pads where it draws
its batches (:func:`another`); in other loops the loader pads, here. Either way the micro-batch is marked, and
``GradUtilsAccelerator.backward`` gives it no targets and no weight.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard


def another(batch: Any) -> Any:
    """The same batch, of the same type, as an object of its own, by which padding is told from data."""
    copied = copy.copy(batch)
    if copied is not batch or not isinstance(batch, tuple):
        return copied
    return batch._make(batch) if hasattr(batch, "_make") else type(batch)(list(batch))


class PaddedShard(BatchSamplerShard):  # type: ignore[misc]
    """One rank's part of the batches, with one more where other ranks have one more."""

    ends_in_padding = False
    """True once a batch of padding has been drawn."""

    def __iter__(self) -> Iterator[list[int]]:
        num_all, self.ends_in_padding = len(self.batch_sampler), False
        num_ranks = 1 if self.split_batches else self.num_processes
        most = num_all // num_ranks if self.drop_last else -(-num_all // num_ranks)
        num_own, batch = 0, [0]  # for a rank without batches: any row
        for batch in super().__iter__():
            num_own += 1
            yield batch
        if num_own < most:
            self.ends_in_padding = True
            yield batch


@contextlib.contextmanager
def padded_to_the_same_number(loaders: Iterable[Any], even_batches: bool) -> Iterator[None]:
    """Let loaders that accelerate has prepared give every rank equally many batches.

    Args:
        loaders: Those without samplers (iterable datasets) fill up by themselves.
        even_batches: accelerate's option: True fills up with samples that count twice.
    """
    shards = [loader.batch_sampler for loader in loaders if type(loader.batch_sampler) is BatchSamplerShard]
    before = [shard.even_batches for shard in shards]
    for shard in shards:
        shard.even_batches = even_batches
        shard.__class__ = PaddedShard
    try:
        yield
    finally:
        for shard, value in zip(shards, before, strict=True):
            shard.even_batches = value
            shard.__class__ = BatchSamplerShard


def is_padding(loader: Any) -> bool:
    """True if the batch that a loader has just given is padding."""
    return bool(
        loader is not None
        and loader.end_of_dataloader
        and getattr(getattr(loader, "batch_sampler", None), "ends_in_padding", False)
    )
