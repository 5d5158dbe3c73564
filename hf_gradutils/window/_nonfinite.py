"""The verdict on an optimizer step whose gradient is not finite; the same on every rank."""

import logging
import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from hf_gradutils._collectives import gather_objects
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from hf_gradutils.targets.counter import check_count
from hf_gradutils.window._report import WindowReport

OnNonfinite: TypeAlias = Literal["raise", "skip", "ignore"]
"""``raise``: stop, with weights, optimizer, scheduler and counters as before the step. ``skip``: go on without it.
``ignore``: take it, as ``transformers.Trainer`` does."""

_MOST_NAMES = 3
_MOST_RANKS = 4

logger = logging.getLogger("hf_gradutils.nonfinite")


class StepGuard:
    """Judges the windows of a training, one after the other; ``skip`` leaves out so many steps in a row at most."""

    def __init__(self, on_nonfinite: OnNonfinite = "raise", max_skipped_steps: int = 10):
        if on_nonfinite not in get_args(OnNonfinite):
            raise InvalidArgumentError(f"on_nonfinite must be one of {get_args(OnNonfinite)}, got {on_nonfinite!r}")
        if not (isinstance(max_skipped_steps, int) and max_skipped_steps >= 0):
            raise InvalidArgumentError(f"max_skipped_steps must be a whole number ≥ 0, got {max_skipped_steps!r}")
        self.on_nonfinite = on_nonfinite
        self.num_skipped = 0
        self._max_skipped = max_skipped_steps
        self._num_in_a_row = 0
        self._pending: tuple[WindowReport, int, _HostFlag] | None = None

    def judge(self, report: WindowReport, step: int, *, is_finite: bool | None = None) -> bool:
        """True if the optimizer may take this step.

        Args:
            report: Of the window.
            step: For messages.
            is_finite: The gradient, if the host knows it already.

        Collectives: none if it is finite; else one object gather over all ranks. Host syncs: one; none under
        ``ignore`` and with ``is_finite``.

        Raises:
            NonfiniteGradientError: it is not finite, under ``raise``, or under ``skip`` once too often in a row.
            TargetCountError: it is not finite because the targets could not be counted.
        """
        if self.on_nonfinite == "ignore" or (report.is_finite if is_finite is None else is_finite):
            self._num_in_a_row = 0
            return True
        self.num_skipped += 1
        self._num_in_a_row += 1
        # The error is kept in no variable: its traceback holds this frame, and through the callers' the model.
        if self.on_nonfinite == "raise":
            raise _error(report, step)
        if self._num_in_a_row > self._max_skipped:
            raise NonfiniteGradientError(
                f"{self._num_in_a_row} steps in a row had no finite gradient (max_skipped_steps={self._max_skipped}); "
                f"the last: {_error(report, step)}"
            )
        logger.warning("Skipped an optimizer step: %s", _error(report, step))
        return False

    def judge_later(self, report: WindowReport, step: int) -> Tensor:
        """Let an optimizer that skips on the device go on; :meth:`raise_pending` reads the flag later.

        Returns:
            True for a finite gradient: shape (), bool, on the device.

        Host syncs: none for this step; as :meth:`raise_pending` for an earlier one.
        """
        self.raise_pending()
        is_finite = report.is_finite
        self._pending = (report, step, _HostFlag(is_finite))
        return is_finite

    @property
    def is_pending(self) -> bool:
        """True if a step's verdict is still on the device."""
        return self._pending is not None

    def raise_pending(self) -> None:
        """Read the verdict of the step before. Waits for that step only, not for later work.

        Raises:
            NonfiniteGradientError: its gradient was not finite.
        """
        if self._pending is None:
            return
        (report, step, is_finite), self._pending = self._pending, None
        if not is_finite.read():
            self.num_skipped += 1
            raise _error(report, step)


class _HostFlag:
    """A bool on its way from the device to the host."""

    def __init__(self, flag: Tensor):
        self._event: torch.cuda.Event | None = None
        self._flag = flag
        if flag.device.type == "cuda":
            self._flag = torch.empty_like(flag, device="cpu", pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        if self._flag.is_cpu:
            return bool(self._flag.numpy())  # on the host already: does not wait for the device
        return bool(self._flag)


def _error(report: WindowReport, step: int) -> NonfiniteGradientError:
    """The error, with the ranks' parameters and losses. Collectives: one object gather over all ranks."""
    check_count(report.num_targets.item())  # a count of NaN makes the gradient NaN too
    record = (report.nonfinite_parameters(), [loss.item() for loss in report.micro_batch_losses])
    records = dict(enumerate(gather_objects(report.domain, record)))
    parameters = {rank: names for rank, (names, _) in records.items() if names}
    losses = {rank: values for rank, (_, values) in records.items()}

    where = [f"rank {rank}: {_some(names, _MOST_NAMES)}" for rank, names in parameters.items()]
    places = f" in {_some(where, _MOST_RANKS, '; ')}" if where else ""
    bad_losses = [
        f"micro-batch {index + 1} of {len(values)} on rank {rank}: {value}"
        for rank, values in losses.items()
        for index, value in enumerate(values)
        if not math.isfinite(value)
    ]
    if not bad_losses:
        values = [value for rank_losses in losses.values() for value in rank_losses]
        bad_losses = [f"all finite, {min(values):.4g} to {max(values):.4g}"] if values else ["none"]
    return NonfiniteGradientError(
        f"step {step}: the gradient is inf or NaN{places} (losses: {_some(bad_losses, _MOST_RANKS)}); weights, "
        "optimizer and scheduler are as before the step: look at those batches, lower the learning rate, or pass "
        "on_nonfinite='skip'",
        step=step,
        parameters=parameters,
        losses=losses,
    )


def _some(texts: list[str], most: int, separator: str = ", ") -> str:
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])
