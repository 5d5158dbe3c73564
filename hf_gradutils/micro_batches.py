"""The micro-batches of one window, each fetched when its turn comes."""

from collections.abc import Callable, Iterator
from typing import Any


class MicroBatches:
    """Stands for the list of a window's batches without holding them.

    A list of them would sit on the device before the first forward. The loader itself looks one batch ahead,
    which is how it knows the last one when it hands it out: the length shrinks then, before anybody needs to
    know whether to communicate.

    Args:
        first: The first batch, fetched already.
        rest: The loader's iterator, behind ``first``.
        num_batches: Batches of a full window.
        is_exhausted: Whether the batch that the loader gave last was its last.
    """

    def __init__(self, first: Any, rest: Iterator[Any], num_batches: int, is_exhausted: Callable[[], bool]):
        self._first: Any = first
        self._rest = rest
        self._is_exhausted = is_exhausted
        self._length = 1 if is_exhausted() else num_batches

    def __len__(self) -> int:
        """Batches of this window, as far as is known: right from the moment the last one has been handed out."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """Hand the batches out, once."""
        first, self._first = self._first, None
        yield first
        del first
        for index in range(1, self._length):
            try:
                batch = next(self._rest)
            except StopIteration:
                self._length = index
                return
            if self._is_exhausted():
                self._length = index + 1
            yield batch
            if self._length == index + 1:
                return
