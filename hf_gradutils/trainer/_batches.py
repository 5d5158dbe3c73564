"""The micro-batches of an epoch, each fetched when its turn comes.

A list of a window's batches would sit on the device before the first forward. What must be known early is only
whether a batch is the last one, and that takes a look-ahead of one.
"""

from collections.abc import Callable, Iterator
from typing import Any


class Padding(dict[str, Any]):
    """A batch that takes the place of one which this rank does not have: it is trained with and counts for nothing.

    Ranks have to run the same number of micro-batches, because the model's own communication runs in them.
    """


class BatchStream:
    """One epoch of a rank's batches.

    Args:
        batches: The loader's iterator.
        is_last: Whether the batch that the iterator gave last was its last; None if nobody can tell, and the
            stream then fetches one batch ahead itself.
        padding: A batch of an earlier epoch to pad with, should there be none in this one.
    """

    def __init__(self, batches: Iterator[Any], is_last: Callable[[], bool | None], padding: Any = None):
        self._batches = batches
        self._is_last = is_last
        self._fetched: list[Any] = []
        self._is_exhausted = self._looks_ahead = False
        self.padding = padding
        """What stands in for a missing batch; None if this rank never had any."""
        self._fetch()

    def has_more(self) -> bool:
        """Whether there is another batch."""
        return bool(self._fetched) or not self._is_exhausted

    def take(self) -> Any:
        """The next batch, or padding if there is none."""
        if not self.has_more():
            return Padding(self.padding)
        if not self._fetched:
            self._fetch()
        batch = self._fetched.pop()
        if self._looks_ahead:
            self._fetch()
        if not self.has_more():
            self.padding = batch
        return batch

    def _fetch(self) -> None:
        try:
            self._fetched.append(next(self._batches))
        except StopIteration:
            self._is_exhausted = True
        else:
            told = self._is_last()
            self._is_exhausted, self._looks_ahead = bool(told), told is None


class MicroBatches:
    """Stands for the list of a window's batches without holding them.

    Args:
        stream: Where they come from.
        num_batches: Batches of a full window.
        pads: Fill the window up with padding; else it is as short as what is left.
    """

    def __init__(self, stream: BatchStream, num_batches: int, *, pads: bool):
        self._stream = stream
        self._length = num_batches
        self._pads = pads
        self._num_taken = 0
        if not pads and not stream.has_more():
            self._length = 0

    def __len__(self) -> int:
        """Batches of this window, as far as is known: right from the moment the last one has been handed out."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """Hand the batches out, once."""
        while self._num_taken < self._length:
            self._num_taken += 1
            batch = self._stream.take()
            if not self._pads and not self._stream.has_more():
                self._length = self._num_taken
            yield batch
