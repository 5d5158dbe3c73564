"""Private names of torch itself (2.11 to 2.15)."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


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
    """Multiply by type promotion, for any dtype, in one call; a launch per tensor if dtypes differ.

    A 0-d factor takes no part in promotion beside tensors with dimensions: it would be rounded to their dtype first.
    """
    with_dimension = factor.view(1)
    torch._foreach_mul_(list(tensors), [with_dimension if tensor.dim() else factor for tensor in tensors])


@functools.lru_cache
def _unused_flag(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode that its first user may be in
        return torch.zeros((), dtype=torch.float32, device=device)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of all tensors in one tensor of the promoted dtype; a view, perhaps, of a single tensor."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    return flat


def why_ddp_has_not_averaged(module: DistributedDataParallel) -> str:
    """The parameters that DDP's last backward waits for, for which its next forward would raise; else empty."""
    try:
        module._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        lines = str(error).splitlines()
        return next((line for line in lines if line.startswith("Parameter")), lines[0])
    return ""


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that have, or may get, a gradient, in the model's order; a tied one once.

    Called at every step: ``model.parameters()`` builds their names too, which takes three times as long.
    """
    found: list[nn.Parameter | None] = []
    seen: set[Any] = {None}  # a module may be None
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            if module._parameters:
                found += module._parameters.values()
            if module._modules:
                waiting += reversed(module._modules.values())
    unique = dict(zip(map(id, found), found, strict=True)).values()
    with _without_overrides():
        return [p for p in unique if p is not None and (p.requires_grad or p.grad is not None)]


def _without_overrides() -> contextlib.AbstractContextManager[None]:
    """Read attributes of DTensors without dispatch to their class, which takes five times as long."""
    context: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def grads_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter."""
    with _without_overrides():
        return [parameter.grad for parameter in parameters]


def backward_hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of its parameter or module, hook) of each hook of a user's that is called in a backward."""
    for name, p in model.named_parameters():
        for hook in (*_hooks(p._backward_hooks), *_hooks(getattr(p, "_post_accumulate_grad_hooks", None))):
            yield name, hook
    for name, module in model.named_modules():
        for hook in (*_hooks(module._backward_hooks), *_hooks(module._backward_pre_hooks)):
            yield name or type(module).__name__, hook


def copy_gradient_hooks(source: Tensor, target: Tensor) -> None:
    """Register the hooks on a parameter's gradient, of users only, on a copy of it too."""
    for hook in _hooks(source._backward_hooks):
        target.register_hook(hook)  # type: ignore[no-untyped-call]
    for hook in _hooks(getattr(source, "_post_accumulate_grad_hooks", None)):
        target.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def has_users_hook_after_accumulation(parameter: Tensor) -> bool:
    """True if a user's hook runs when the gradient has been added: it may do anything, even step."""
    return bool(_hooks(getattr(parameter, "_post_accumulate_grad_hooks", None)))


_PLUMBING = (
    *("hf_gradutils.", "accelerate.", "deepspeed.", "torch.distributed.", "torch.nn.parallel."),
    *("transformers.distributed.", "transformers.integrations.", "transformers.trainer."),
)
"""Modules whose hooks sum or move gradients, whatever their scale."""


def _hooks(hooks: dict[int, Any] | None) -> list[Any]:
    """The hooks of users, and of libraries that read gradients."""
    return [hook for hook in (hooks or {}).values() if not _module_of(hook).startswith(_PLUMBING)]


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or ''}."


def tensors_in(outputs: Any) -> list[Tensor]:
    """All tensors of a module's outputs."""
    leaves = tree_leaves(outputs)
    fields = [field for leaf in leaves if dataclasses.is_dataclass(leaf) for field in vars(leaf).values()]
    return [leaf for leaf in (*leaves, *tree_leaves(fields)) if isinstance(leaf, Tensor)]


def finds_unused_parameters(model: nn.Module) -> bool:
    """True for DDP that takes parameters for unused which no output of the forward depends on."""
    return isinstance(model, DistributedDataParallel) and bool(model.find_unused_parameters)


def depending_on(outputs: Any, parameters: Sequence[Tensor]) -> Any:
    """Outputs of the same values, the first tensor of which depends on these parameters too, with a gradient of 0."""
    leaves, structure = tree_flatten(outputs)
    first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad)
    nothing = torch.stack([parameter.float().sum() for parameter in parameters]).sum() * 0
    leaves[first] = leaves[first] + nothing.to(leaves[first])
    return tree_unflatten(leaves, structure)


_DDP_SINK = "_DDPSink"
_NOT_LINEAR = (
    *("Add", "Sub", "Rsub", "Sum", "Lerp"),
    *("Clamp", "Pow", "Exp", "Abs", "Log", "Sqrt", "Relu", "Softplus", "Sigmoid", "Tanh", "Where", "Masked"),
)
"""Beginnings of the names of nodes that add terms or bend one."""


def is_multiple(loss: Tensor, of: Tensor) -> bool:
    """True if a loss is another one times constants, by its graph: not where terms were added."""
    return is_multiple_of_node(loss, of.grad_fn)


def is_multiple_of_node(loss: Tensor, of: Any) -> bool:
    """:func:`is_multiple` of what a node of the graph has computed, whatever was done to its tensor in place."""
    node = loss.grad_fn
    while node is not None and node is not of:
        following = [n for n, _ in node.next_functions if n is not None]
        if node.name().startswith(_DDP_SINK):  # all outputs of the model go through one node
            return of in following
        if len(following) != 1 or node.name().startswith(_NOT_LINEAR):
            return False
        node = following[0]
    return node is not None


def takes_a_scale(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer of torch reads ``grad_scale`` and ``found_inf`` on the device, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextlib.contextmanager
def calls_redirected(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Let a call of the first module of each pair call the second, past the hooks of the first."""
    before = [(old, vars(old).get("_compiled_call_impl")) for old, _ in pairs]
    for old, new in pairs:
        vars(old)["_compiled_call_impl"] = new.__call__
    try:
        yield
    finally:
        for old, call in before:
            if call is None:
                del vars(old)["_compiled_call_impl"]
            else:
                vars(old)["_compiled_call_impl"] = call
