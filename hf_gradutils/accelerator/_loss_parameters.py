"""Trained parameters of a loss that no model has: their gradients are averaged here, and scaled but not clipped.

As in the libraries that have such losses, whose clipping is given the model's parameters only.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_gradutils._collectives import all_reduce_, world_domain
from hf_gradutils._devices import on_device


class LossParameters:
    """Parameters of a loss, whole on every rank.

    Args:
        parameters: The same on every rank, in one order.

    Collectives: a broadcast, after which all ranks have the values of the first.
    """

    def __init__(self, parameters: Sequence[nn.Parameter] = ()):
        self.parameters = tuple(parameters)
        if dist.is_initialized():
            for parameter in self.parameters:
                dist.broadcast(parameter.data, 0)

    @property
    def ids(self) -> set[int]:
        """Of the parameters, as objects."""
        return {id(parameter) for parameter in self.parameters}

    @torch.no_grad()
    def close(self, scale: Tensor) -> None:
        """Average gradients over all ranks and multiply them by ``scale``, shape ().

        Collectives: one all-reduce, if there are parameters. Host syncs: likewise one.
        """
        if not self.parameters:
            return
        domain, device = world_domain(), self.parameters[0].device
        present = torch.tensor([float(p.grad is not None) for p in self.parameters], device=device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([present, *(grad.reshape(-1) for grad in grads)])  # in float32 or wider
        flat = all_reduce_(domain, flat)
        num_with = flat[: len(grads)].tolist()
        sums = torch.split(flat[len(grads) :], [grad.numel() for grad in grads])
        factor = on_device(scale, device).to(flat.dtype) / domain.num_ranks
        for parameter, num, total in zip(self.parameters, num_with, sums, strict=True):
            if num:
                mean = (total * factor).reshape(parameter.shape).to(parameter.dtype)
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)
