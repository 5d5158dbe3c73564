"""Gradients that tensor-parallel ranks hold parts of: summed as they arrive, before they are accumulated.

transformers sums the *accumulated* gradient of a replicated norm (qk-norm) after every micro-batch, so that the
earlier ones are multiplied by the size of the group again each time. Summing each increment is right for every
number of micro-batches.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_gradutils.upstream.transformers import take_accumulated_all_reduces


def sum_increments(model: nn.Module) -> int:
    """Replace transformers' hooks by ones that sum each micro-batch's own gradient; returns how many modules had them.

    Collectives: from now on, one all-reduce over the tensor-parallel group per such parameter and backward, as
    before.
    """
    taken = take_accumulated_all_reduces(model)
    for module, group in taken:
        module.register_forward_pre_hook(_HookOnForward(group))
    return len(taken)


class _HookOnForward:
    """Hooks a module's parameters when they are about to be used: FSDP2 swaps them in just before."""

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._hooked: dict[str, nn.Parameter] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and self._hooked.get(name) is not parameter:
                parameter.register_hook(self._sum)  # type: ignore[no-untyped-call]
                self._hooked[name] = parameter

    def _sum(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # autograd may use what it passed for something else
        dist.all_reduce(gradient, group=self._group)
        return gradient
