"""Private names of torch's FSDP1 and FSDP2 (2.11 to 2.15)."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.utils import _apply_to_tensors


def _fsdp2_groups(module: FSDPModule) -> list[Any]:
    """The parameter groups of one FSDP2 module: one or none in torch 2.11, a list from 2.13 on."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def fsdp2_sync_flags(module: FSDPModule) -> list[tuple[Any, bool, bool]]:
    """``(parameter group, reduce_grads, all_reduce_grads)`` of one FSDP2 module, not of its children.

    FSDP2 has public setters for these flags and no getters; restoring the prior state needs to read it.
    """
    return [(group, group.reduce_grads, group.all_reduce_grads) for group in _fsdp2_groups(module)]


def restore_fsdp2_sync_flags(flags: Sequence[tuple[Any, bool, bool]]) -> None:
    """Write back what :func:`fsdp2_sync_flags` read."""
    for group, reduce_grads, all_reduce_grads in flags:
        group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads


def fsdp1_sync_flag(module: FullyShardedDataParallel) -> bool:
    """Whether the backward of one FSDP1 module reduces gradients. Its ``no_sync`` can only switch this off."""
    return bool(module._sync_gradients)


def set_fsdp1_sync_flag(module: FullyShardedDataParallel, value: bool) -> None:
    """Set what :func:`fsdp1_sync_flag` reads."""
    vars(module)["_sync_gradients"] = value  # a plain attribute, which nn.Module's type does not know


def fsdp2_honours_grad_dtype() -> bool:
    """Whether shards of gradients take the dtype that ``grad_dtype`` of their parameter says: from torch 2.15 on."""
    return hasattr(FSDPParam, "unsharded_grad_dtype")


def fsdp2_has_not_run(module: FSDPModule) -> bool:
    """Whether a backward that defers its reduction would raise, because a group has never been gathered.

    Before torch 2.15 it looks for the gradient of gathered parameters, also in groups that took no part in any forward
    so far, if gradients are accumulated in another dtype than they come in. Of one FSDP2 module, not of its children.
    """
    return not fsdp2_honours_grad_dtype() and any(
        parameter.mp_policy.reduce_dtype not in (None, parameter.mp_policy.param_dtype)
        and not hasattr(parameter, "_unsharded_param")
        for group in _fsdp2_groups(module)
        for parameter in group.fsdp_params[:1]  # all of a group are gathered together
    )


@contextlib.contextmanager
def fsdp2_widened_new_gradients(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """A backward in which parameters get their first gradient in the dtype of those that others have accumulated.

    Before torch 2.15 gradients that were accumulated without being reduced are in ``reduce_dtype`` already and the last
    micro-batch's own ones are not, and a reduction of both raises (pytorch#160279).
    """
    widened = [] if fsdp2_honours_grad_dtype() else [p for module in modules for p in _widen_new_gradients(module)]
    try:
        yield
    finally:
        for parameter in widened:
            unsharded = parameter._unsharded_param
            gradient, unsharded.grad, unsharded.grad_dtype = unsharded.grad, None, unsharded.dtype
            if gradient is not None:  # not reduced after all
                parameter.unsharded_accumulated_grad = gradient


def _widen_new_gradients(module: FSDPModule) -> list[Any]:
    widened = []
    for group in _fsdp2_groups(module):
        dtype = getattr(group, "_reduce_dtype", None)  # not there before the first forward
        if dtype is None or not group.reduce_grads:
            continue
        has_gradient = [parameter.unsharded_accumulated_grad is not None for parameter in group.fsdp_params]
        if not any(has_gradient) or all(has_gradient):
            continue
        for parameter in group.fsdp_params:
            unsharded = getattr(parameter, "_unsharded_param", None)
            if parameter.unsharded_accumulated_grad is None and unsharded is not None and unsharded.grad is None:
                unsharded.grad_dtype = dtype
                widened.append(parameter)
    return widened


def fsdp2_keep_losses(module: Any) -> None:
    """Let a root of FSDP2 hand out scalars as the model computed them; all else is cast as its policy says."""
    state = module._get_fsdp_state()
    dtype = state._mp_policy.output_dtype
    if dtype is not None:
        state._mp_policy = dataclasses.replace(state._mp_policy, output_dtype=None)
        module.register_forward_hook(functools.partial(_cast_outputs, dtype))


def _cast_outputs(dtype: torch.dtype, module: nn.Module, args: Any, outputs: Any) -> Any:
    return _apply_to_tensors(lambda t: t.to(dtype) if t.dim() and t.is_floating_point() else t, outputs)


def fsdp2_adds_shards_by_position() -> bool:
    """Whether HSDP adds reduced shards to those of earlier micro-batches by position alone: before torch 2.15."""
    return not hasattr(FSDPParamGroup, "_get_partial_reduce_grad")


def fsdp2_loses_gradients(module: FSDPModule, *, is_last: bool) -> bool:
    """Whether what HSDP has reduce-scattered and not yet all-reduced lacks a parameter, or was left behind.

    Until torch 2.13 it is one flat buffer of the parameters that had a gradient, to which the next micro-batch adds
    those of its own, and a group without gradients in the last micro-batch does not all-reduce it. torch 2.15 knows
    who is where in the buffer.
    """
    for group in _fsdp2_groups(module):
        if group._partial_reduce_output is not None and not hasattr(group, "_partial_reduce_output_layout"):
            trained = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
            if is_last or group._partial_reduce_output.numel() < sum(
                p.padded_sharded_param_size.numel() for p in trained
            ):
                return True
    return False


def fsdp2_deferred_bytes(model: nn.Module) -> int:
    """Bytes that the whole gradients of all that FSDP2 shards in ``model`` take beyond their shards."""
    # By identity: a group of several modules (the last norm and the head) is found at each of them.
    groups = {id(g): g for module in model.modules() if isinstance(module, FSDPModule) for g in _fsdp2_groups(module)}
    num_bytes = 0
    for group in groups.values():
        for parameter in group.fsdp_params:
            policy, shard = parameter.mp_policy, parameter.sharded_param
            if not shard.requires_grad:
                continue
            # Where nothing else is said, torch 2.15 accumulates in the parameter's own dtype, 2.13 in that of backward.
            own = shard.dtype if hasattr(type(parameter), "unsharded_grad_dtype") else policy.param_dtype or shard.dtype
            whole = parameter._orig_size.numel() * (policy.reduce_dtype or own).itemsize
            is_offloaded = shard.device.type != group.device.type
            num_bytes += whole - (0 if is_offloaded else shard.to_local().numel() * shard.dtype.itemsize)
    return num_bytes


def discard_fsdp2_gradients(module: FSDPModule) -> None:
    """Drop every gradient of one FSDP2 module, deferred or not, and what an exception left of the iteration."""
    state = module._get_fsdp_state()
    if state._is_root and hasattr(module, "reset_iter_state"):  # from torch 2.13 on
        module.reset_iter_state()
    for group in _fsdp2_groups(module):
        for parameter in group.fsdp_params:
            parameter.sharded_param.grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
            if "unsharded_accumulated_grad" in vars(parameter):  # until torch 2.13; then a property of the above
                parameter.unsharded_accumulated_grad = None
        group._partial_reduce_output = None
        getattr(group, "_partial_reduce_output_layout", {}).clear()
