"""Private names of torch's DTensor, and of fp16's scaler where it meets them (torch 2.11 to 2.15)."""

import contextlib
import operator
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor as it is. Called under ``no_grad``."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
    return tensor


def local_tensors_and_layouts(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[object]]:
    """:func:`local_tensor` of each, and :func:`layouts_of`, with less Python: called for hundreds at every step."""
    are_dtensors = _are_dtensors(tensors)
    if are_dtensors is None:
        local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    else:
        local = list(map(_get_local_tensor, tensors) if are_dtensors else tensors)
    if AsyncCollectiveTensor in set(map(type, local)):
        local = [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in local]
    return local, _layouts(tensors, are_dtensors)


def layouts_of(tensors: Sequence[Tensor]) -> list[object]:
    """Mesh, placements, shape and dtype of all DTensors; lists compare quickly if they hold the same objects."""
    return _layouts(tensors, _are_dtensors(tensors))


def _layouts(tensors: Sequence[Tensor], are_dtensors: bool | None) -> list[object]:
    if are_dtensors is None:
        return [t._spec for t in tensors if isinstance(t, DTensor)]
    return list(map(_get_layout, tensors)) if are_dtensors else []


_get_local_tensor = operator.attrgetter("_local_tensor")
_get_layout = operator.attrgetter("_spec")


def _are_dtensors(tensors: Sequence[Tensor]) -> bool | None:
    """True if all of them are, False if none is, None if some are."""
    answers = {issubclass(kind, DTensor) for kind in set(map(type, tensors))}
    return None if len(answers) == 2 else True in answers


@contextlib.contextmanager
def unscaling_local_parts(scaler: Any) -> Iterator[dict[int, list[Tensor]]]:
    """Let ``GradScaler.unscale_`` (torch 2.11 to 2.15) take plain gradients and DTensors of any meshes side by side.

    It puts all of them into one list, which DTensor refuses. Each rank inspects its own parts only; the caller makes
    ranks agree.

    Yields:
        id of an unscaled optimizer → its flag on each device; a flag above 0 skips the step.
    """
    found_inf: dict[int, list[Tensor]] = {}
    unscale = scaler._unscale_grads_

    def of_local_parts(optimizer: Any, *args: Any) -> dict[torch.device, Tensor]:
        flags: dict[torch.device, Tensor] = unscale(_local_parts(optimizer), *args)
        found_inf[id(optimizer)] = list(flags.values())
        return flags

    scaler._unscale_grads_ = of_local_parts
    try:
        yield found_inf
    finally:
        del scaler._unscale_grads_


def _local_parts(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer for ``GradScaler``, with this rank's parts in place of DTensors."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return optimizer
    parts = [local_tensor(gradient) for gradient in gradients]
    parameters = [part.detach() for part in parts]
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part
    return types.SimpleNamespace(param_groups=[{"params": parameters}])
