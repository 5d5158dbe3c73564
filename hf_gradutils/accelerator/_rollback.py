"""Counters to restore after a step that the device has skipped."""

import copy
from typing import Any

from torch import Tensor


class Counters:
    """Global step, scheduler and learning rates before a step that the device may skip."""

    def __init__(self, global_step: int, scheduler: Any, optimizer: Any):
        self._global_step = global_step
        self._scheduler = copy.deepcopy(scheduler.state_dict())
        # A rate that is a tensor is changed in place.
        self._rates = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]

    def restore(self, scheduler: Any, optimizer: Any) -> int:
        """Restore the scheduler and the learning rates; returns the global step."""
        scheduler.load_state_dict(self._scheduler)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        return self._global_step
