"""The micro-batches of an epoch, each fetched when it is needed.

A list of a window's batches would sit on the device before the first forward, as it does with counts first. Else only
whether a batch is the last one must be known early, and that takes a look-ahead of one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.trainer_utils import has_length

from hf_gradutils._collectives import add_up, find_largest, world_domain
from hf_gradutils.accelerator import another
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets.trl_generating import makes_batches
from hf_gradutils.trainer._ulysses import check_lengths


class BatchStream:
    """One epoch of a rank's batches.

    Args:
        batches: The loader's iterator.
        is_last: True if the iterator's latest batch was its last; None if unknown: the stream then fetches one ahead.
        padding: A batch of an earlier epoch to pad with if this one has none.
    """

    def __init__(self, batches: Iterator[Any], is_last: Callable[[], bool | None], padding: Any = None):
        self._batches = batches
        self._is_last = is_last
        self._fetched: list[Any] = []
        self.paddings: list[Any] = []
        """Batches of the latest window that :meth:`take` has made up."""
        self._is_exhausted = self._looks_ahead = False
        self.padding = padding
        """Stands in for a missing batch; None if this rank never had any."""
        self._fetch()

    def has_more(self) -> bool:
        """True if there is another batch."""
        return bool(self._fetched) or not self._is_exhausted

    def peek(self) -> Any:
        """The batch that :meth:`take` returns next, where it is the first of the stream."""
        return self._fetched[0] if self._fetched else self.padding

    def take(self) -> Any:
        """The next batch, or padding if there is none."""
        if not self.has_more():
            self.paddings.append(another(self.padding))
            return self.paddings[-1]
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
            is_last = self._is_last()
            self._is_exhausted, self._looks_ahead = bool(is_last), is_last is None


class MicroBatches:
    """Acts as the list of a window's batches without holding them.

    Args:
        stream: Source of the batches.
        num_batches: Batches of a full window.
        pads: Fill the last window up with padding; else it is shorter.
    """

    def __init__(self, stream: BatchStream, num_batches: int, *, pads: bool):
        self._stream = stream
        self._length = num_batches if pads or stream.has_more() else 0
        self._pads = pads
        self._num_taken = 0

    def __len__(self) -> int:
        """Batches of this window; an upper bound until the last one is taken."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        while self._num_taken < self._length:
            self._num_taken += 1
            batch = self._stream.take()
            if not self._pads and not self._stream.has_more():
                self._length = self._num_taken
            yield batch


class Draws:
    """An epoch's iterator as a user's ``get_batch_samples`` sees it: as many batches as it takes, padded to a window's.

    Args:
        stream: Source of the batches.
        num_padded: Batches that a rank without any is given all the same.
    """

    def __init__(self, stream: BatchStream, num_padded: int):
        self._stream = stream
        self._num_padded = num_padded

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._num_padded -= 1
        if self._stream.has_more() or self._num_padded >= 0:
            return self._stream.take()
        raise StopIteration


class TrainingBatches:
    """A rank's batches, window by window; ranks with fewer batches than others pad theirs."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._stream: BatchStream | None = None
        self._epoch: Iterator[Any] | None = None
        self._pads = False
        self.has_length = True
        self.num_in_epoch = 0
        """Batches of the longest rank, with a length."""
        self.num_ranks_with_data: float | Tensor = 0.0
        """Ranks that have batches for another window, after the last one."""

    def plan(self, dataloader: Any) -> Any:
        """Return the loader, with the length of the longest rank's. Collectives: one all-gather over all ranks."""
        self._epoch = None
        self.has_length = has_length(dataloader)
        num_batches = len(dataloader) if self.has_length else 0
        extremes = find_largest(world_domain(), most=num_batches, minus_least=-num_batches)
        most, least = int(extremes["most"]), -int(extremes["minus_least"])
        self.num_in_epoch = most * self._trainer.get_sp_size()
        # Where batches are generated, accelerate gives every rank equally many, and padding would generate others.
        self._pads = most != least or not (self.has_length or makes_batches(self._trainer))
        if most != least:
            check_lengths(self._trainer, num_batches)
        return _OfLength(dataloader, most) if most != least else dataloader

    def trained_without_length(self, max_steps: int) -> tuple[int, int]:
        """(epochs, batches of the next one) that a checkpoint has trained, by its epoch, of data without a length."""
        state, args = self._trainer.state, self._trainer.args
        num_epochs = int(state.epoch)
        num_batches = round((state.epoch - num_epochs) * max_steps * args.gradient_accumulation_steps)
        return num_epochs, 0 if args.ignore_data_skip else num_batches

    def window(self, epoch: Iterator[Any], num_batches: int) -> Sequence[Any] | MicroBatches:
        """The next window's batches; none at the end of the epoch.

        Collectives: where ranks pad, one all-reduce over all ranks at the start of an epoch.
        """
        stream = self._stream_of(epoch)
        return [] if self._is_over(stream) else MicroBatches(stream, num_batches, pads=self._pads)

    def draws(self, epoch: Iterator[Any], num_batches: int) -> Iterator[Any]:
        """The next batches for an override that draws them itself. Collectives: as :meth:`window`."""
        stream = self._stream_of(epoch)
        return iter(()) if self._is_over(stream) else Draws(stream, num_batches if self._pads else 0)

    def _stream_of(self, epoch: Iterator[Any]) -> BatchStream:
        if self._stream is None or epoch is not self._epoch:
            self._stream, self._epoch = self._start_epoch(epoch), epoch
        self._stream.paddings.clear()
        return self._stream

    def _is_over(self, stream: BatchStream) -> bool:
        return self._pads and not stream.has_more() and not float(self.num_ranks_with_data)

    def first(self) -> Any:
        """The first batch of the epoch, or padding."""
        assert self._stream is not None
        return self._stream.peek()

    def is_padding(self, batch: Any) -> bool:
        """True for a batch that stands in for one that this rank lacks."""
        return self._stream is not None and any(batch is padding for padding in self._stream.paddings)

    def check_padding(self, batches: Sequence[Any]) -> None:
        """Raise InvalidArgumentError if an override has put other objects in the place of padding."""
        num_kept = sum(map(self.is_padding, batches))
        if self._stream is not None and num_kept < len(self._stream.paddings):
            raise InvalidArgumentError(
                "get_batch_samples must return the batches that it was given, or fewer: copies cannot be told from "
                "data on a rank that has run out of it; change a batch in training_step or in the collator"
            )

    @property
    def has_data_left(self) -> bool | None:
        """True if this rank has batches for another window; None if ranks need not agree on it."""
        return self._stream.has_more() if self._pads and self._stream is not None else None

    def _start_epoch(self, epoch: Iterator[Any]) -> BatchStream:
        state = self._trainer.accelerator.gradient_state
        left = id(state.active_dataloader)  # of a training that has stopped before the end of its epoch
        stream = BatchStream(
            epoch,
            # A loader that accelerate has not prepared does not say which batch is its last.
            lambda: state.end_of_dataloader if id(state.active_dataloader) != left else None,
            padding=self._stream.padding if self._stream is not None else None,
        )
        if self._pads:
            has_none = not stream.has_more() and stream.padding is None
            ranks = add_up(world_domain(), self._trainer.args.device, with_data=stream.has_more(), without_any=has_none)
            self.num_ranks_with_data = ranks["with_data"]
            if ranks["without_any"] and ranks["with_data"]:
                raise InvalidArgumentError(
                    f"{ranks['without_any']:.0f} of {self._trainer.accelerator.num_processes} ranks have no data in "
                    "the first epoch; use fewer ranks, or split the dataset into more shards"
                )
        return stream


class _OfLength:
    """A loader with another length."""

    def __init__(self, dataloader: Any, length: int):
        self._dataloader = dataloader
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)
