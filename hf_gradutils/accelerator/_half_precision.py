"""Sums over micro-batches and ranks in float32, for models that compute in half precision.

    mixed precision under FSDP2    gradients are accumulated and reduced in float32; layers' outputs stay half
    parameters in half precision   ``.grad`` is float32 between micro-batches, and rounded when the window ends

A sum of n gradients in bfloat16 is off by about 1.1e-3 · √n of its norm (docs/exactness.md).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.sync import Communicates
from hf_gradutils.upstream.fsdp import fsdp2_honours_grad_dtype

AccumulateInFloat32: TypeAlias = bool | Literal["auto"]

MANY_MICRO_BATCHES = 32
"""From here on, accumulating in bfloat16 rounds away as much as computing in it does."""

_HALF = (torch.bfloat16, torch.float16)


def check_accumulate_in_float32(value: object) -> None:
    """Raise InvalidArgumentError unless the value is True, False or ``"auto"``."""
    if not (isinstance(value, bool) or value == "auto"):
        raise InvalidArgumentError(f"accumulate_in_float32 must be True, False or 'auto', got {value!r}")


def accumulates_in_float32(setting: AccumulateInFloat32, num_micro_batches: int) -> bool:
    """True if gradients of half-precision parameters are accumulated in float32 in a window of this size."""
    return num_micro_batches >= MANY_MICRO_BATCHES if setting == "auto" else setting


def reduce_in_float32(accelerator: Accelerator) -> bool:
    """Let FSDP2 accumulate and reduce gradients in float32 where accelerate's default is half precision.

    A sum over many ranks and micro-batches loses most of bfloat16's 8 bits. Layers' outputs stay as accelerate has
    them: a wider output does not fit the next layer's weights, and activation checkpointing would store it.

    Returns:
        True if FSDP2 accumulates gradients in float32 that stock accelerate accumulates in half precision.
    """
    plugin = _fsdp2_plugin(accelerator)
    policy = plugin.mixed_precision_policy if plugin is not None else None
    if policy is None or policy.param_dtype not in _HALF:
        return False
    if policy.reduce_dtype == policy.output_dtype == policy.param_dtype:  # accelerate's default
        plugin.mixed_precision_policy = policy = replace(policy, reduce_dtype=torch.float32)
    return bool(policy.reduce_dtype == torch.float32)


def reduce_parameters_in_float32(accelerator: Accelerator, model: nn.Module) -> None:
    """Let FSDP2 do so for a model with half-precision parameters, before accelerate shards it."""
    plugin = _fsdp2_plugin(accelerator)
    if plugin is not None and plugin.mixed_precision_policy is None and any(p.dtype in _HALF for p in _trained(model)):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def _fsdp2_plugin(accelerator: Accelerator) -> Any:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin if plugin is not None and plugin.fsdp_version == 2 else None


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True, slots=True)
class HalfParameters:
    """The trained half-precision parameters of a model, by the wrapper that averages their gradients."""

    averaged: list[nn.Parameter]
    """Parameters in DDP, whose buckets take gradients of the parameter's own dtype only."""
    sharded: list[nn.Parameter]
    """Parameters in FSDP2 from torch 2.15 on, where gradients may be wider than their parameter."""
    others: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, *, with_shards: bool = True) -> "HalfParameters":
        """Find them in a wrapped model, but not where the wrapper fixes the dtype: FSDP1, FSDP2 before torch 2.15."""
        half = [p for p in _trained(model) if p.dtype in _HALF]

        def inside(kind: Any) -> set[nn.Parameter]:
            return {p for m in model.modules() if half and isinstance(m, kind) for p in m.parameters()}

        ddp, fsdp1 = inside(DistributedDataParallel), inside(FullyShardedDataParallel)
        fsdp2 = {p for p in inside(FSDPModule) if isinstance(p, DTensor)}
        return cls(
            averaged=[p for p in half if p in ddp],
            sharded=[p for p in half if p in fsdp2] if with_shards and fsdp2_honours_grad_dtype() else [],
            others=[p for p in half if p not in ddp | fsdp1 | fsdp2],
        )

    def begin(self, communicates: Communicates, *, is_last: bool) -> None:
        """Let a micro-batch add its gradients in float32 where its communication allows."""
        _set_gradient_dtype(self.sharded, torch.float32)
        _set_gradient_dtype(self.averaged, None if communicates.replicas else torch.float32)
        if not is_last:  # a window of one micro-batch adds nothing
            _set_gradient_dtype(self.others, torch.float32)

    def round(self) -> None:
        """Round gradients to the dtype of their parameters, which optimizers need."""
        for parameters in (self.averaged, self.sharded, self.others):
            _set_gradient_dtype(parameters, None)


def _set_gradient_dtype(parameters: list[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Set the dtype of present and future gradients; None is the parameter's own."""
    for parameter in parameters:
        wanted = dtype or parameter.dtype
        if parameter.grad_dtype != wanted:
            gradient: Tensor | None = parameter.grad
            parameter.grad = None  # the two must match at any time
            parameter.grad_dtype = wanted
            parameter.grad = gradient if gradient is None else gradient.to(wanted)
