"""Sums over optimizer steps for a Trainer's log."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets.counter import check_count
from hf_gradutils.window import WindowReport


@contextlib.contextmanager
def nan_filter(args: Any, value: bool) -> Iterator[None]:
    """Let a Trainer replace losses that are not finite by a mean of earlier ones, or not."""
    before, args.logging_nan_inf_filter = args.logging_nan_inf_filter, value
    try:
        yield
    finally:
        args.logging_nan_inf_filter = before


class RunningLog:
    """Sums over the optimizer steps since the last log, on the device."""

    def __init__(self, device: torch.device):
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._last: WindowReport | None = None
        self._loss_before = self._targets_before = self._loss = self._num_targets = self._zero
        self._taken_before = self._num_taken = self._num_steps = 0

    @property
    def total_targets(self) -> Tensor:
        """Targets of all steps so far, taken or not; shape (), float64."""
        return self._targets_before + self._num_targets

    def add(self, report: WindowReport, *, is_taken: bool, starts_anew: bool) -> None:
        """Count one step; the first one after a log entry ``starts_anew``."""
        if starts_anew:
            self._loss_before = self._loss_before + self._loss
            self._taken_before += self._num_taken
            self._targets_before = self.total_targets
            self._loss = self._num_targets = self._zero
            self._num_taken = self._num_steps = 0
        self._last = report
        self._num_steps += 1
        if is_taken:
            self._num_taken += 1
            self._loss = self._loss + report.loss
            self._num_targets = self._num_targets + report.num_targets
        else:
            self._targets_before = self._targets_before + report.num_targets

    @property
    def loss(self) -> Tensor:
        """A sum that Trainer divides by all steps since the last log, which gives the mean of the taken ones.

        If none was taken, the mean of all before: one bad step must not turn the mean of the training into NaN.
        """
        loss, num_taken = (self._loss, self._num_taken) if self._num_taken else (self._loss_before, self._taken_before)
        return loss if num_taken == self._num_steps else loss * (self._num_steps / max(num_taken, 1))

    def check_targets(self, num_steps: int) -> None:
        """Raise TargetCountError if no step so far had a target on any rank, or targets could not be counted."""
        total = self.total_targets.item()
        check_count(total)
        if not total:
            raise TargetCountError(
                f"no batch had a target in the first {num_steps} optimizer steps, on any rank: every label is -100; "
                "look at how the labels are masked and truncated"
            )

    def entries(self, *, has_groups: bool) -> dict[str, float]:
        """Number of targets and norms of groups for one entry of the log. Host syncs."""
        assert self._last is not None
        entries: dict[str, float] = {"num_targets": round(self._num_targets.item())}
        if not self._num_taken:
            entries["loss"] = math.nan
        if has_groups:
            norms = self._last.group_norms
            values = torch.stack(list(norms.values())).tolist()
            entries |= {f"grad_norm/{group}": value for group, value in zip(norms, values, strict=True)}
        return entries
