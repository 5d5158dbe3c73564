"""The whole model of a layout on one rank, for a comparison with one process."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_gradutils._devices import device_of
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.names import unwrapped_name

MakeModel: TypeAlias = Callable[[], nn.Module]
"""Makes the whole model, for one that cannot be built anew from a configuration."""


def whole_model(model: nn.Module, *, make_model: MakeModel | None = None) -> nn.Module | None:
    """A copy of the model on rank 0, without wrappers and unsharded; None on the others.

    Args:
        model: Wrapped and sharded by anything. What is sharded is built anew from its configuration.
        make_model: Builds it, where there is no configuration; called on rank 0.

    Collectives: one gather per sharded parameter; every rank calls.

    Raises:
        InvalidArgumentError: it is sharded and cannot be built anew from a configuration.
    """
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    is_mine = not dist.is_initialized() or dist.get_rank() == 0
    is_sharded = any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in inside.modules()) or any(
        isinstance(p, DTensor) for p in inside.parameters()
    )
    if not is_sharded:
        return _copy(inside) if is_mine else None
    build = make_model or _builder_of(inside)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(inside, options=options)
    if not is_mine:
        return None
    built = build()
    known = built.state_dict().keys()
    state = {unwrapped_name(name): value for name, value in state.items()}
    built.load_state_dict({name: value for name, value in state.items() if name in known})
    for new, old in zip(built.parameters(), inside.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return built.to(device_of(inside))


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, on its mesh's device, where its ranks can talk; a plain tensor as it is. One gather."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh_device = tensor.device_mesh.device_type
    there: Any = tensor if tensor.device.type == mesh_device else tensor.to(mesh_device)
    whole: Tensor = there.full_tensor()
    return whole


def _copy(model: nn.Module) -> nn.Module:
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    for p in gradients:
        p.grad = None
    try:
        return copy.deepcopy(model)
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient


def _builder_of(model: nn.Module) -> Callable[[], nn.Module]:
    config = getattr(model, "config", None)
    # fully_shard makes a class of its own in front of the model's.
    kind: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    if config is None or not hasattr(config, "to_dict") or hasattr(model, "peft_config"):
        raise InvalidArgumentError(
            f"expected a model of transformers, which can be built anew on one process, got a sharded {kind.__name__}; "
            "pass make_model=…, a function that makes it"
        )

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            built: nn.Module = kind(copy.deepcopy(config))
        return built

    return build
