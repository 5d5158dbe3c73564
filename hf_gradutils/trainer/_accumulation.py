"""The number of micro-batches of a window, which a callback may change in mid-training."""

from collections.abc import Iterator, Sized
from typing import Any

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.trainer._batches import TrainingBatches
from hf_gradutils.trainer._ulysses import check_resumes


class Accumulation:
    """Follows ``gradient_accumulation_steps``: how many batches a window draws, and that it ends with the last one."""

    def __init__(self, trainer: Any, batches: TrainingBatches):
        self._trainer = trainer
        self._batches = batches
        self._num_skipped = 0
        """Batches of the first epoch that a checkpoint has trained."""
        self.settled: int | None = None
        """As when the loss was settled; None before."""
        self._has_changed = False
        """In this training."""
        self._epoch: Iterator[Any] | None = None
        self._num_in_epoch = self._num_in_window = 0
        """Micro-batches that have begun."""
        self.drawn: Sized | None = None
        """As long as this window, and not its batches, which would stay until the next."""

    def skip(self, num_batches: int) -> None:
        """Begin after batches that a checkpoint has trained. Raises as :func:`check_resumes`."""
        check_resumes(self._trainer, num_batches)
        self._num_skipped = num_batches

    @property
    def number(self) -> int:
        return int(self._trainer.args.gradient_accumulation_steps)

    @property
    def is_settled(self) -> bool:
        """The loss was settled for this number."""
        return self.settled == self.number

    def num_batches(self, epoch: Iterator[Any], num_batches: int) -> int:
        """Batches of a window that begins, where transformers asks for ``num_batches``.

        After a change, up to the next optimizer step: transformers steps each time that the batches of the epoch so far
        are a multiple of the number, and at the end of the epoch.
        """
        if epoch is not self._epoch:
            self._num_in_epoch = self._num_skipped if self._epoch is None else 0
            self._epoch = epoch
        self._num_in_window = 0
        self._has_changed |= self._is_other
        if not self._has_changed:
            return num_batches
        up_to_step = self.number - self._num_in_epoch % self.number
        left = self._batches.num_in_epoch - self._num_in_epoch
        return min(up_to_step, max(left, 0)) if self._batches.has_length else up_to_step

    def begin_micro_batch(self) -> None:
        """Raise InvalidArgumentError if it steps before its window ends, or does not where it ends."""
        self._num_in_epoch += 1
        self._num_in_window += 1
        self._has_changed |= self._is_other
        if self.drawn is None or not self._has_changed:
            return
        is_last = self._num_in_window == len(self.drawn)
        is_inside = self._is_other and self._num_in_window > 1
        if is_inside or is_last != self._trainer.accelerator.sync_gradients:
            raise InvalidArgumentError(
                f"gradient_accumulation_steps was changed to {self.number} where optimizer steps and the batches drawn "
                "do not fit; change it in on_step_end, or between epochs"
            )

    @property
    def _is_other(self) -> bool:
        return self.settled not in (None, self.number)
