"""An optimizer that takes a step the way its window was closed: skipped, or scaled on the way."""

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
    """How the optimizer is to take its next step."""

    skip: bool = False
    """Leave it out, as the host has decided."""
    skip_flag: Tensor | None = None
    """Leave it out if this is 1: shape (), float32; for a fused optimizer, which asks on the device."""
    divisor: Tensor | None = None
    """What gradients are divided by on the way: shape (), float32; for a fused optimizer."""

    def and_then(self, other: "StepOrder") -> "StepOrder":
        """Both, for a step on the gradients of two windows.

        Raises:
            InvalidArgumentError: the optimizer would have to divide some gradients by one number, some by another.
        """
        if self.divisor is not None or other.divisor is not None:
            raise InvalidArgumentError(
                "expected an optimizer for each loss with fold_into_optimizer=True, got one that steps on the "
                "gradients of two; leave out fold_into_optimizer"
            )
        flags = [flag for flag in (self.skip_flag, other.skip_flag) if flag is not None]
        flag = torch.stack(flags).amax() if flags else None
        return StepOrder(skip=self.skip or other.skip, skip_flag=flag)


class GradUtilsOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """accelerate's optimizer, with a :class:`StepOrder` for each step. See :meth:`adopt`."""

    order: StepOrder | None
    """Of the next step; used up by it."""
    awaits_update: bool
    """It has stepped through fp16's scaler, which has not settled its scale since."""
    scaler: Any
    _is_left_out: bool
    _before_step: Callable[["GradUtilsOptimizer"], None]

    @classmethod
    def adopt(
        cls, optimizer: AcceleratedOptimizer, before_step: Callable[["GradUtilsOptimizer"], None]
    ) -> "GradUtilsOptimizer":
        """Turn an optimizer, as accelerate builds it by name, into one of ours, in place.

        Args:
            optimizer: Prepared by accelerate.
            before_step: Called at each step that ends a window, before it: sees to it that gradients are the mean.
        """
        optimizer.__class__ = cls
        optimizer.order = None
        optimizer.awaits_update = False
        optimizer._is_left_out = False
        optimizer._before_step = before_step
        return optimizer

    def step(self, closure: object = None) -> None:
        """As in accelerate, in the way that was ordered.

        Raises:
            InvalidArgumentError: there is a closure, whose gradients nobody could weigh before the step.
        """
        if closure is not None:
            raise InvalidArgumentError(
                "expected gradients before the step, got a closure that makes them inside it; call "
                "accelerator.backward and then optimizer.step()"
            )
        if not self.gradient_state.sync_gradients:
            super().step()
            return
        self._before_step(self)
        order, self.order = self.order or StepOrder(), None
        self._is_left_out = order.skip
        if order.skip:
            return
        optimizer = innermost(self.optimizer)
        told = {"found_inf": order.skip_flag, "grad_scale": order.divisor}
        given = {name: value for name, value in told.items() if value is not None}
        if given and any(p.is_cpu for group in optimizer.param_groups for p in group["params"]):
            # Offloaded: torch would copy these without waiting, and its kernel on the CPU read them at once.
            given = {name: on_device(value, torch.device("cpu")) for name, value in given.items()}
        for name, value in given.items():
            setattr(optimizer, name, value)
        try:
            self._take_step()
        finally:
            for name in given:
                delattr(optimizer, name)

    def _take_step(self) -> None:
        scaler = self.scaler
        if scaler is None:
            self.optimizer.step()  # as accelerate would, after looking for lomo's installation on the disk
            return
        self.scaler = _WithoutUpdate(scaler)
        self.awaits_update = True
        try:
            super().step()
        finally:
            self.scaler = scaler

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was left out, by the scaler or by order of the host."""
        return self._is_left_out or super().step_was_skipped

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name != "_before_step"}


class _WithoutUpdate:
    """fp16's scaler, for a step after which another optimizer still steps on gradients of the same scale."""

    def __init__(self, scaler: Any):
        self._scaler = scaler

    def step(self, optimizer: Optimizer, closure: object = None) -> Any:
        return self._scaler.step(optimizer)

    def update(self) -> None:
        """Later."""


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, without what is wrapped around it."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def why_not_on_device(optimizer: Optimizer) -> str | None:
    """Why an optimizer cannot skip, or scale, on the device; None if it can.

    Others ignore what they are told and step on raw sums (RMSprop, NAdam, Muon, …), or raise.

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
    """Raise InvalidArgumentError if the scaling cannot be folded into one of these optimizers.

    Args:
        optimizers: With or without what is wrapped around them.
        scaler: fp16's; None without.
    """
    reasons = [reason for optimizer in optimizers if (reason := why_not_on_device(optimizer)) is not None]
    if scaler is not None:
        reasons.append("fp16's GradScaler puts its own scale in the same place")
    if reasons:
        raise InvalidArgumentError(
            f"expected an optimizer that scales gradients itself for fold_into_optimizer=True, but {reasons[0]}; "
            "leave out fold_into_optimizer, or use a fused AdamW: torch.optim.AdamW(…, fused=True), "
            "optim='adamw_torch_fused' of the Trainer"
        )


def as_flag(is_finite: Tensor) -> Tensor:
    """What a fused optimizer wants to be told of a non-finite gradient: 1.0, else 0.0; no other number skips."""
    return is_finite.logical_not().to(torch.float32)
