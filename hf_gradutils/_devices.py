"""Devices and dtypes of tensors, and moving between devices."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; itself, without a call, if it is there.

    Host syncs: one from an accelerator to the CPU, where it could be read before it has arrived; else none.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


class Kind(NamedTuple):
    """Device and dtype of some tensors; None if they differ."""

    device: torch.device | None
    dtype: torch.dtype | None


def common_kind(tensors: Sequence[Tensor]) -> Kind:
    """The common device and dtype of tensors. Called at every step, so without making hundreds of device objects."""
    if not tensors:
        return Kind(None, None)
    numbers = set(map(Tensor.get_device, tensors))  # -1 is the CPU; a process has one kind of accelerator
    dtypes = set(map(_get_dtype, tensors))
    return Kind(tensors[0].device if len(numbers) == 1 else None, tensors[0].dtype if len(dtypes) == 1 else None)


_get_dtype = operator.attrgetter("dtype")


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's computation: its parameters' device, or their mesh's if they are offloaded."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.device("cpu")
    kind = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device.type
    if kind == parameter.device.type:
        return parameter.device
    return torch.device(kind, torch.accelerator.current_device_index())


def widened(value: Tensor) -> Tensor:
    """Half precision as float32; other dtypes as they are."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
