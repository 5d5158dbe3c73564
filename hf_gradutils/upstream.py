"""Every private name of torch that the package leans on, and nothing else.

Checked on torch 2.11, 2.13 and 2.15. ``tests/test_upstream.py`` fails when one of them moves. The private methods of
``transformers.Trainer`` that :mod:`hf_gradutils.trainer` overrides are listed in :data:`TRAINER_METHODS`
and checked by the same test.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

TRAINER_METHODS = {
    "_clip_grad_norm": ("self", "model"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_get_num_items_in_batch": ("self", "batch_samples", "device"),
    "_prepare_input": ("self", "data"),
    "_update_auto_batch_size": ("self", "batch_size"),
}
"""Private methods of ``transformers.Trainer`` (5.17 to 5.23) with the parameters that the overrides rely on."""

TRAINER_ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")
"""Private attributes that ``transformers.Trainer.train`` keeps its running loss in (5.17 to 5.23)."""


def default_store() -> Store:
    """The store of the default process group. ValueError when there is no such group."""
    return distributed_c10d._get_default_store()


def foreach_norm(tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype) -> list[Tensor]:
    """p-norm of every tensor, accumulated in ``dtype``; one launch for all of them where there is a kernel."""
    return list(torch._foreach_norm(list(tensors), norm_type, dtype=dtype))


def foreach_mul_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every tensor by a 0-d tensor, in place."""
    torch._foreach_mul_(list(tensors), factor)


def foreach_mul_in_fp32_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply half-precision tensors by a 0-d float32 tensor, in place, rounding once.

    The multi-tensor kernel behind ``GradScaler.unscale_``: it is the one that takes a float32 factor for
    any gradient dtype without leaving its fast path. Its non-finite flag is not used.
    """
    found_nonfinite = torch.zeros((), dtype=torch.float32, device=factor.device)
    torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), found_nonfinite, factor)


def fsdp2_sync_flags(module: FSDPModule) -> list[tuple[Any, bool, bool]]:
    """``(parameter group, reduce_grads, all_reduce_grads)`` of one FSDP2 module, not of its children.

    FSDP2 has public setters for these flags and no getters; restoring the prior state needs to read it.
    A module has one group in torch 2.11, or none, and a list of them from 2.13 on.
    """
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [(g, g.reduce_grads, g.all_reduce_grads) for g in groups if g is not None]


def restore_fsdp2_sync_flags(flags: Sequence[tuple[Any, bool, bool]]) -> None:
    """Write back what :func:`fsdp2_sync_flags` read."""
    for group, reduce_grads, all_reduce_grads in flags:
        group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads


@torch.no_grad()
def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, ready to read and sharing its memory; a plain tensor as it is."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
    return tensor
