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


def fsdp2_shards(module: FSDPModule) -> list[nn.Parameter]:
    """The parameters that hold gradients between backwards, also where the module has whole ones now, in a forward."""
    return [parameter.sharded_param for group in _fsdp2_groups(module) for parameter in group.fsdp_params]


def fsdp2_sync_flags(module: FSDPModule) -> list[tuple[Any, bool, bool]]:
    """``(parameter group, reduce_grads, all_reduce_grads)`` of one FSDP2 module, without its children.

    FSDP2 has public setters for these flags, but no getters.
    """
    return [(group, group.reduce_grads, group.all_reduce_grads) for group in _fsdp2_groups(module)]


def restore_fsdp2_sync_flags(flags: Sequence[tuple[Any, bool, bool]]) -> None:
    """Restore the flags from :func:`fsdp2_sync_flags`."""
    for group, reduce_grads, all_reduce_grads in flags:
        group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads


def fsdp1_sync_flag(module: FullyShardedDataParallel) -> bool:
    """True if the backward of one FSDP1 module reduces gradients. Its ``no_sync`` can only switch this off."""
    return bool(module._sync_gradients)


def set_fsdp1_sync_flag(module: FullyShardedDataParallel, value: bool) -> None:
    """Set :func:`fsdp1_sync_flag`."""
    vars(module)["_sync_gradients"] = value  # a plain attribute, which nn.Module's type does not know


def fsdp2_honours_grad_dtype() -> bool:
    """True if shards of gradients have the ``grad_dtype`` of their parameter: from torch 2.15 on."""
    return hasattr(FSDPParam, "unsharded_grad_dtype")


def fsdp2_has_not_run(module: FSDPModule) -> bool:
    """True if a backward that defers its reduction would raise because a group has never been gathered.

    Before torch 2.15, if gradients are accumulated in another dtype than they come in, it reads the gradient of
    gathered parameters, also in groups without a forward so far. For one FSDP2 module, without its children.
    """
    return not fsdp2_honours_grad_dtype() and any(
        parameter.mp_policy.reduce_dtype not in (None, parameter.mp_policy.param_dtype)
        and not hasattr(parameter, "_unsharded_param")
        for group in _fsdp2_groups(module)
        for parameter in group.fsdp_params[:1]  # all of a group are gathered together
    )


@contextlib.contextmanager
def fsdp2_widened_new_gradients(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """The context of a backward in which first gradients get the dtype of the accumulated ones of other parameters.

    Before torch 2.15 gradients accumulated without a reduction are in ``reduce_dtype`` and new ones of the last
    micro-batch are not; reducing both raises (pytorch#160279).
    """
    widened = []
    for group in () if fsdp2_honours_grad_dtype() else [g for module in modules for g in _fsdp2_groups(module)]:
        dtype = getattr(group, "_reduce_dtype", None)  # absent before the first forward
        num_accumulated = sum(parameter.unsharded_accumulated_grad is not None for parameter in group.fsdp_params)
        if dtype is None or not group.reduce_grads or num_accumulated in (0, len(group.fsdp_params)):
            continue
        for parameter in group.fsdp_params:
            unsharded = getattr(parameter, "_unsharded_param", None)
            if parameter.unsharded_accumulated_grad is None and unsharded is not None and unsharded.grad is None:
                unsharded.grad_dtype = dtype
                widened.append(parameter)
    try:
        yield
    finally:
        for parameter in widened:
            unsharded = parameter._unsharded_param
            gradient, unsharded.grad, unsharded.grad_dtype = unsharded.grad, None, unsharded.dtype
            if gradient is not None:  # not reduced after all
                parameter.unsharded_accumulated_grad = gradient


def fsdp2_keep_losses(module: Any) -> None:
    """Let a root of FSDP2 return scalars in the dtype of the model; other outputs are cast by its policy."""
    state = module._get_fsdp_state()
    dtype = state._mp_policy.output_dtype
    if dtype is not None:
        state._mp_policy = dataclasses.replace(state._mp_policy, output_dtype=None)
        module.register_forward_hook(functools.partial(_cast_outputs, dtype))


def _cast_outputs(dtype: torch.dtype, module: nn.Module, args: Any, outputs: Any) -> Any:
    return _apply_to_tensors(lambda t: t.to(dtype) if t.dim() and t.is_floating_point() else t, outputs)


def fsdp2_adds_shards_by_position() -> bool:
    """True if HSDP adds reduced shards to those of earlier micro-batches by position alone: before torch 2.15."""
    return not hasattr(FSDPParamGroup, "_get_partial_reduce_grad")


def fsdp2_loses_gradients(module: FSDPModule, *, is_last: bool) -> bool:
    """True if HSDP's gradients between reduce-scatter and all-reduce lack a parameter, or were never all-reduced.

    Until torch 2.13 they are one flat buffer of the parameters that had a gradient; the next micro-batch adds its own
    to it, and a group without gradients in the last micro-batch does not all-reduce it. torch 2.15 records the layout
    of the buffer.
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
    """Bytes that the whole gradients of FSDP2's parameters in ``model`` take beyond their shards."""
    # By identity: a group of several modules (the last norm and the head) is found at each of them.
    groups = {id(g): g for module in model.modules() if isinstance(module, FSDPModule) for g in _fsdp2_groups(module)}
    num_bytes = 0
    for group in groups.values():
        for parameter in group.fsdp_params:
            policy, shard = parameter.mp_policy, parameter.sharded_param
            if not shard.requires_grad:
                continue
            # By default torch 2.15 accumulates in the parameter's own dtype, torch 2.13 in that of the backward.
            own = shard.dtype if hasattr(type(parameter), "unsharded_grad_dtype") else policy.param_dtype or shard.dtype
            whole = parameter._orig_size.numel() * (policy.reduce_dtype or own).itemsize
            is_offloaded = shard.device.type != group.device.type
            num_bytes += whole - (0 if is_offloaded else shard.to_local().numel() * shard.dtype.itemsize)
    return num_bytes


def discard_fsdp2_gradients(module: FSDPModule) -> None:
    """Drop every gradient of one FSDP2 module, deferred or not, and the state of an iteration that has failed."""
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
