"""An optimizer that applies the decision made when its window closed: take the step, skip it, or scale on the way."""

import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from hf_gradutils._devices import on_device
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.torch import takes_a_scale


@dataclass(frozen=True, slots=True)
class StepOrder:
    """A window's decision about the next step of an optimizer."""

    skip: bool = False
    """Skip it, decided on the host."""
    skip_flag: Tensor | None = None
    """Skip it if this is 1: shape (), float32; read by a fused optimizer on the device."""
    divisor: Tensor | None = None
    """A fused optimizer divides gradients by it: shape (), float32."""

    def and_then(self, other: "StepOrder") -> "StepOrder":
        """Both orders, for a step on the gradients of two windows.

        Raises:
            InvalidArgumentError: the optimizer would have to divide gradients by two different numbers.
        """
        if self.divisor is not None or other.divisor is not None:
            raise InvalidArgumentError(
                "fold_into_optimizer=True needs an optimizer for each loss, but this one steps on the gradients of "
                "two; leave out fold_into_optimizer"
            )
        flags = [flag for flag in (self.skip_flag, other.skip_flag) if flag is not None]
        flag = torch.stack(flags).amax() if flags else None
        return StepOrder(skip=self.skip or other.skip, skip_flag=flag)


class GradUtilsOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """accelerate's optimizer, with a :class:`StepOrder` for each step. See :meth:`adopt`."""

    order: StepOrder | None
    """For the next step, which clears it."""
    awaits_update: bool
    """It has stepped through fp16's scaler, whose scale has not been updated since."""
    scaler: Any
    _is_left_out: bool
    _before_step: Callable[[], Callable[["GradUtilsOptimizer"], None] | None]
    """A weak reference: the optimizer keeps neither its Accelerator alive nor the models."""

    @classmethod
    def adopt(
        cls, optimizer: AcceleratedOptimizer, before_step: Callable[["GradUtilsOptimizer"], None]
    ) -> "GradUtilsOptimizer":
        """Turn an optimizer of accelerate, which builds it by name, into one of ours, in place.

        Args:
            optimizer: Prepared by accelerate.
            before_step: A method, called before each step that ends a window; closes the window if nothing has.
        """
        optimizer.__class__ = cls
        optimizer.order = None
        optimizer.awaits_update = False
        optimizer._is_left_out = False
        optimizer._before_step = weakref.WeakMethod(before_step)
        return optimizer

    def step(self, closure: object = None) -> None:
        """Take the step, or skip it, as :attr:`order` says.

        Raises:
            InvalidArgumentError: a closure is passed; or no Accelerator knows this optimizer, whose window stays open.
        """
        if closure is not None:
            raise InvalidArgumentError(
                "optimizer.step takes no closure here, because gradients made inside it would not be weighted; call "
                "accelerator.backward and then optimizer.step()"
            )
        if not self.gradient_state.sync_gradients:
            super().step()
            return
        before_step = self._before_step()
        if before_step is None:
            raise InvalidArgumentError(
                "no Accelerator knows this optimizer: its own is gone, or this is a copy; keep the Accelerator while "
                "it is used, and prepare a copy again: optimizer = accelerator.prepare(optimizer)"
            )
        before_step(self)
        order, self.order = self.order or StepOrder(), None
        self._is_left_out = order.skip
        if order.skip:
            return
        optimizer = innermost(self.optimizer)
        options = {"found_inf": order.skip_flag, "grad_scale": order.divisor}
        inputs = {name: value for name, value in options.items() if value is not None}
        if inputs and any(p.is_cpu for group in optimizer.param_groups for p in group["params"]):
            # Offloaded: torch would copy these without waiting, and its kernel on the CPU read them at once.
            inputs = {name: on_device(value, torch.device("cpu")) for name, value in inputs.items()}
        for name, value in inputs.items():
            setattr(optimizer, name, value)
        try:
            self._take_step()
        finally:
            for name in inputs:
                delattr(optimizer, name)

    def _take_step(self) -> None:
        scaler = self.scaler
        if scaler is None:
            self.optimizer.step()  # accelerate does the same, but first looks for lomo's installation on the disk
            return
        # No update: other optimizers may still step on gradients of the same scale.
        self.scaler = types.SimpleNamespace(step=lambda optimizer, _: scaler.step(optimizer), update=lambda: None)
        self.awaits_update = True
        try:
            super().step()
        finally:
            self.scaler = scaler

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Like accelerate's; an order for gradients that are gone is gone too."""
        super().zero_grad(set_to_none)
        if self.gradient_state.sync_gradients:
            self.order = None

    @property
    def step_was_skipped(self) -> bool:
        """True if the last step was skipped, by the scaler or by the host's order."""
        return self._is_left_out or super().step_was_skipped

    def __getstate__(self) -> dict[str, object]:
        # A scheduler of torch puts a step in front of the class's, which steps the optimizer that it was made for.
        return {name: v for name, v in super().__getstate__().items() if name not in ("_before_step", "step")}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._before_step = lambda: None  # until an Accelerator prepares the copy


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer without wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def why_not_on_device(optimizer: Optimizer) -> str | None:
    """The reason why an optimizer cannot skip or scale on the device; None if it can.

    Others ignore the flags and step on raw sums (RMSprop, NAdam, Muon, …), or raise.

    Source: torch 2.11 to 2.15, ``torch.optim``.
    """
    inner = innermost(optimizer)
    kind = type(inner)
    if kind not in (Adam, AdamW, SGD, Adagrad) or not takes_a_scale(inner):
        return f"{kind.__name__} is not a fused Adam, AdamW, SGD or Adagrad of torch"
    if not all(group.get("fused") for group in inner.param_groups):
        return f"{kind.__name__} is not fused in every parameter group (fused=True)"
    parameters = (p for group in inner.param_groups for p in group["params"])
    if kind in (SGD, Adagrad) and any(isinstance(p, DTensor) for p in parameters):
        return f"fused {kind.__name__} has no kernel for DTensors"
    return None


def check_can_scale(optimizers: Sequence[Optimizer], scaler: object) -> None:
    """Raise InvalidArgumentError if the scaling cannot be folded into one of these optimizers."""
    reasons = [reason for optimizer in optimizers if (reason := why_not_on_device(optimizer)) is not None]
    if scaler is not None:
        reasons.append("fp16's GradScaler puts its own scale in the same place")
    if reasons:
        raise InvalidArgumentError(
            f"fold_into_optimizer=True needs an optimizer that scales gradients itself, but {reasons[0]}; leave out "
            "fold_into_optimizer, or use a fused AdamW: torch.optim.AdamW(…, fused=True), optim='adamw_torch_fused' "
            "of the Trainer"
        )


def as_flag(is_finite: Tensor) -> Tensor:
    """The ``found_inf`` of a fused optimizer: 1.0 for a non-finite gradient, else 0.0; only 1.0 skips."""
    return is_finite.logical_not().to(torch.float32)
