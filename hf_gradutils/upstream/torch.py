"""Private names of torch itself (2.11 to 2.15)."""

import functools
import operator
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel


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


def why_ddp_has_not_averaged(module: DistributedDataParallel) -> str:
    """Why DDP would raise in its next forward: the parameters that its last backward has waited for; else empty."""
    try:
        module._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        lines = str(error).splitlines()
        return next((line for line in lines if line.startswith("Parameter")), lines[0])
    return ""


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


def takes_a_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer of torch reads ``grad_scale`` and ``found_inf`` on the device: the mark of fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
