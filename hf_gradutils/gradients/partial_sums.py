"""Partial gradients of tensor-parallel ranks, summed as they arrive, before they are accumulated.

transformers sums the *accumulated* gradient of a replicated norm (qk-norm) after every micro-batch, which multiplies
earlier ones by the group's size each time. Summing each increment is right for any number of micro-batches.
"""

import functools
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_gradutils.upstream.transformers import take_accumulated_all_reduces


def sum_increments(model: nn.Module) -> int:
    """Replace transformers' hooks by ones that sum each micro-batch's own gradient; returns the number of modules.

    Collectives: from now on, as before, one all-reduce over the tensor-parallel group per such parameter and backward.
    """
    hooked = take_accumulated_all_reduces(model)
    for module, group in hooked:
        module.register_forward_pre_hook(_HookOnForward(group))
    return len(hooked)


class _HookOnForward:
    """Hooks a module's parameters just before its forward, when FSDP2 has swapped them in."""

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._hooked: dict[str, nn.Parameter] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and self._hooked.get(name) is not parameter:
                # Not a method: a parameter that holds this object is freed only by a garbage collection.
                parameter.register_hook(functools.partial(_sum, self._group))  # type: ignore[no-untyped-call]
                self._hooked[name] = parameter


def _sum(group: ProcessGroup, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()  # autograd may use its tensor elsewhere
    dist.all_reduce(gradient, group=group)
    return gradient
