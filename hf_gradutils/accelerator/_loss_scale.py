"""The loss scale of fp16: removed once per step, agreed on by all ranks, changed between windows."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from hf_gradutils._devices import on_device
from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer, as_flag, innermost
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.dtensor import unscaling_local_parts
from hf_gradutils.window import WindowReport


class LossScale:
    """The optimizers of this step whose gradients have lost the scale of ``accelerator.scaler``."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._unscaled: list[Optimizer] = []
        self._found_inf: dict[int, list[Tensor]] = {}
        """id of an unscaled optimizer → the flags by which its step is skipped."""

    @property
    def scaler(self) -> Any:
        """Torch's GradScaler; None without fp16."""
        return self._accelerator.scaler

    @property
    def is_removed(self) -> bool:
        """True if any gradients have lost the scale in this step."""
        return bool(self._unscaled)

    def unscale(self, optimizers: Sequence[Optimizer]) -> None:
        """Remove the scale from the gradients of these optimizers; repeated calls in one step change nothing."""
        if self.scaler is None:
            return
        new = [o for o in optimizers if not self._is_unscaled(o)]
        with unscaling_local_parts(self.scaler) as found_inf:
            Accelerator.unscale_gradients(self._accelerator, new)
        self._unscaled += new
        self._found_inf |= found_inf

    def agree_on_overflow(self, optimizers: Sequence[Optimizer], report: WindowReport) -> None:
        """Let the scaler skip the step on every rank if it would on one, by the reduced norm."""
        for optimizer in optimizers:
            for flag in self._found_inf.get(id(innermost(optimizer)), ()):
                torch.maximum(flag, on_device(as_flag(report.is_finite), flag.device), out=flag)

    def update(self) -> None:
        """Let the scale change; only between windows, because the gradients of a window share one scale."""
        stepped = [o for o in self._unscaled if isinstance(o, GradUtilsOptimizer) and o.awaits_update]
        if stepped:
            self.scaler.update()
            self._unscaled.clear()
            self._found_inf.clear()
            for optimizer in stepped:
                optimizer.awaits_update = False

    def release(self) -> None:
        """Hold no optimizer any more."""
        self.update()
        self._unscaled.clear()
        self._found_inf.clear()

    def check_is_on(self, optimizers: Sequence[GradUtilsOptimizer]) -> None:
        """Raise InvalidArgumentError if a backward would add to gradients whose scale is already removed."""
        if any(self._is_unscaled(optimizer) and not optimizer.awaits_update for optimizer in optimizers):
            raise InvalidArgumentError(
                "backward was called after gradients of this step had been unscaled or clipped (fp16); clip after the "
                "backward of every model that the optimizer steps on"
            )

    def _is_unscaled(self, optimizer: Optimizer) -> bool:
        return any(optimizer is other for other in self._unscaled)
