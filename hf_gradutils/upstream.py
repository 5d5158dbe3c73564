"""Every private name of torch, accelerate, transformers and trl that the package leans on, and nothing else.

Checked on torch 2.11, 2.13 and 2.15, accelerate 1.15, transformers 5.17 and 5.24, trl 1.16. ``tests/test_upstream.py``,
for trl ``tests/test_trl.py``, fails when one of them moves. The private methods of ``transformers.Trainer`` that the
Trainer overrides are listed in :data:`TRAINER_METHODS` and checked by the same test.
"""

import contextlib
import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import DistributedDataParallel

TRAINER_METHODS = {
    "_clip_grad_norm": ("self", "model"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_get_num_items_in_batch": ("self", "batch_samples", "device"),
    "_init_training_state": (
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_prepare_inputs": ("self", "inputs"),
    "_update_auto_batch_size": ("self", "batch_size"),
}
"""Private methods of ``transformers.Trainer`` (5.17 to 5.24) with the parameters that the overrides rely on."""

TRAINER_ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")
"""Private attributes that ``transformers.Trainer.train`` keeps its running loss in (5.17 to 5.24)."""

ACCELERATOR_ATTRIBUTES = ("_models", "_optimizers", "_schedulers", "_dataloaders")
"""Private attributes in which accelerate's Accelerator (1.15) keeps what it has prepared; our subclass reads them."""

TRL_METRICS = ("_metrics", "_total_train_tokens")
"""Private attributes in which ``compute_loss`` of trl's trainers (1.16) keeps what they log."""

TRL_AUXILIARY = ("aux_loss_enabled",)
"""Attributes by which ``compute_loss`` of trl's trainers (1.16), if they have them, adds a mixture's auxiliary loss."""


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
    """Multiply tensors of one dtype of 16 or 32 bits by a 0-d float32 tensor, in place, rounding once.

    The multi-tensor kernel behind ``GradScaler.unscale_``: it is the one that takes a float32 factor for
    any gradient dtype without leaving its fast path. Its non-finite flag is not used. CUDA has none of it for bfloat16
    (pytorch#127176): there it is a launch per tensor.
    """
    if tensors[0].dtype == torch.bfloat16 and not tensors[0].is_cpu:
        foreach_mul_promoted_(tensors, factor)
    else:
        torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), _unused_flag(factor.device), factor)


def foreach_mul_promoted_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """The same by type promotion, for any dtype: by one call and, where dtypes differ, a launch per tensor.

    A factor without dimensions would not count beside tensors that have some, but be rounded to their dtype first.
    """
    with_dimension = factor.view(1)
    torch._foreach_mul_(list(tensors), [with_dimension if tensor.dim() else factor for tensor in tensors])


@functools.lru_cache
def _unused_flag(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode that its first user may be in
        return torch.zeros((), dtype=torch.float32, device=device)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of all tensors in one, in the dtype that holds them all; of a single tensor it may be a view."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    return flat


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


def why_ddp_has_not_averaged(module: DistributedDataParallel) -> str:
    """Why DDP would raise in its next forward: the parameters that its last backward has waited for; else empty."""
    try:
        module._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        lines = str(error).splitlines()
        return next((line for line in lines if line.startswith("Parameter")), lines[0])
    return ""


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


@contextlib.contextmanager
def sharding_tied_embeddings_together(models: Sequence[nn.Module]) -> Iterator[None]:
    """Let accelerate's FSDP2 (1.15) put all embeddings of a model that hold one weight into one group.

    T5, BART and their kin hold one as ``shared``, in the encoder and in the decoder. accelerate makes a group of the
    first and leaves the others to the root's, and torch 2.13 refuses a parameter of two groups.
    """
    from torch.distributed import fsdp

    fully_shard = fsdp.fully_shard  # accelerate imports it where it calls it

    @functools.wraps(fully_shard)
    def together(module: Any, **options: Any) -> Any:
        named = module if isinstance(module, list) else [module]
        weights = [part.weight for part in named if isinstance(part, nn.Embedding)]
        tied = [
            part
            for model in models
            for part in (model.modules() if weights else ())
            if isinstance(part, nn.Embedding) and part not in named and any(part.weight is w for w in weights)
        ]
        return fully_shard([*named, *tied], **options) if tied else fully_shard(module, **options)

    fsdp.fully_shard = together
    try:
        yield
    finally:
        fsdp.fully_shard = fully_shard


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


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, ready to read and sharing its memory; a plain tensor as it is.

    Called under ``no_grad``.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
    return tensor


def local_tensors_and_layouts(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[object]]:
    """:func:`local_tensor` of each, and :func:`layouts`, with less Python: there are hundreds, and every step asks."""
    are_dtensors = _are_dtensors(tensors)
    if are_dtensors is None:
        local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    else:
        local = list(map(_get_local_tensor, tensors) if are_dtensors else tensors)
    if AsyncCollectiveTensor in set(map(type, local)):
        local = [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in local]
    return local, _layouts(tensors, are_dtensors)


def layouts(tensors: Sequence[Tensor]) -> list[object]:
    """Mesh, placements, shape and dtype of all DTensors: equal lists for equal ones, quickly for the same objects."""
    return _layouts(tensors, _are_dtensors(tensors))


def _layouts(tensors: Sequence[Tensor], are_dtensors: bool | None) -> list[object]:
    if are_dtensors is None:
        return [t._spec for t in tensors if isinstance(t, DTensor)]
    return list(map(_get_layout, tensors)) if are_dtensors else []


_get_local_tensor = operator.attrgetter("_local_tensor")
_get_layout = operator.attrgetter("_spec")


def _are_dtensors(tensors: Sequence[Tensor]) -> bool | None:
    """Whether all of them are, or none; None if some are."""
    answers = {issubclass(kind, DTensor) for kind in set(map(type, tensors))}
    return None if len(answers) == 2 else True in answers


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """``list(model.parameters())``, without making all names on the way, at every step; not to be changed."""
    found: list[nn.Parameter | None] = []
    seen: set[Any] = {None}  # in the place of a module there may be none
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            if module._parameters:
                found += module._parameters.values()
            if module._modules:
                waiting += reversed(module._modules.values())
    known = _parameters_of.get(model)
    if known is None or len(known[0]) != len(found) or not all(map(operator.is_, known[0], found)):
        unique = {id(parameter): parameter for parameter in found if parameter is not None}
        _parameters_of[model] = known = found, list(unique.values())
    return known[1]


_parameters_of: WeakKeyDictionary[nn.Module, tuple[list[nn.Parameter | None], list[nn.Parameter]]] = WeakKeyDictionary()
"""What the modules held when a model was last asked for its parameters, and the same without None and repetitions."""


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """``[p.grad for p in parameters]``, without asking each DTensor's class whether it has its own idea of ``grad``."""
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(_get_gradient, parameters))


_get_gradient = operator.attrgetter("grad")


_PARTIAL_STYLE = "ReplicatedWithGradAllReduce"
"""The tensor-parallel style of transformers whose hook all-reduces an accumulated gradient."""


def take_accumulated_all_reduces(model: nn.Module) -> list[tuple[nn.Module, ProcessGroup]]:
    """Remove the hooks of transformers' tensor parallelism that all-reduce ``.grad``, the accumulated gradient.

    Returns:
        The modules whose own parameters' gradients have to be summed over the group instead. 5.17 hooks the
        module's backward, 5.23 its parameters, on the first forward.
    """
    taken = []
    for module in model.modules():
        forward: Any = vars(module).get("forward")
        if _PARTIAL_STYLE in getattr(forward, "__qualname__", ""):
            names = inspect.getclosurevars(forward).nonlocals
            module.forward = names["original_forward"]
            for parameter in names["is_already_hooked"].values():
                _drop(parameter._post_accumulate_grad_hooks)
            taken.append((module, inspect.getclosurevars(names["_all_reduce_grad"]).nonlocals["mesh"].get_group()))
        for hook in _drop(module._backward_hooks):
            taken.append((module, inspect.getclosurevars(hook).nonlocals["mesh"].get_group()))
    return taken


def _drop(hooks: dict[int, Any]) -> list[Any]:
    """Remove transformers' hooks from a dict of hooks; returns them."""
    theirs = {key: hook for key, hook in hooks.items() if _PARTIAL_STYLE in getattr(hook, "__qualname__", "")}
    for key in theirs:
        del hooks[key]
    return list(theirs.values())


@contextlib.contextmanager
def without_accelerate_state() -> Iterator[None]:
    """Let transformers' detection losses divide by this rank's own boxes.

    They ask accelerate's state for other ranks to average the number over, and divide by it once too often.
    """
    from accelerate import PartialState

    state, PartialState._shared_state = PartialState._shared_state, {}
    try:
        yield
    finally:
        PartialState._shared_state = state


def trainer_no_sync(trainer: Any, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """What ``transformers.Trainer`` (5.17 to 5.24) runs a micro-batch in that does not end its window."""
    from transformers.distributed.fsdp import is_fsdp_managed_module

    if getattr(trainer, "is_distributed_loading_by_transformers", False) and is_fsdp_managed_module(trainer.model):
        deferred: contextlib.AbstractContextManager[None] = trainer._defer_fsdp_gradient_reduction()
        return deferred
    waiting: contextlib.AbstractContextManager[None] = trainer.accelerator.no_sync(model)
    return waiting


@contextlib.contextmanager
def unscaling_local_parts(scaler: Any) -> Iterator[dict[int, list[Tensor]]]:
    """Let ``GradScaler.unscale_`` (torch 2.11 to 2.15) take plain gradients and DTensors of any meshes side by side.

    By itself it puts all of them into one list, which DTensor refuses. Each rank looks at its own parts only here: that
    ranks agree on what they found is up to the caller.

    Yields:
        id of an unscaled optimizer → for each device, the flag that its step will ask: above 0 leaves the step out.
    """
    found: dict[int, list[Tensor]] = {}
    unscale = scaler._unscale_grads_

    def of_local_parts(optimizer: Any, *args: Any) -> dict[torch.device, Tensor]:
        flags: dict[torch.device, Tensor] = unscale(_local_parts(optimizer), *args)
        found[id(optimizer)] = list(flags.values())
        return flags

    scaler._unscale_grads_ = of_local_parts
    try:
        yield found
    finally:
        del scaler._unscale_grads_


def _local_parts(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer as ``GradScaler`` sees it, with this rank's parts in place of DTensors."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return optimizer
    parts = [_with_gradient(local_tensor(gradient)) for gradient in gradients]
    return types.SimpleNamespace(param_groups=[{"params": parts}])


def _with_gradient(gradient: Tensor) -> Tensor:
    parameter = gradient.detach()
    parameter.grad = gradient
    return parameter


def optimizers_of(accelerator: Any) -> list[Any]:
    """What accelerate's Accelerator has prepared as optimizers (accelerate 1.15)."""
    return list(accelerator._optimizers)


def takes_a_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer of torch reads ``grad_scale`` and ``found_inf`` on the device: the mark of fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
