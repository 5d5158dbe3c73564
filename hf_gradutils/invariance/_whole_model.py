"""The whole model of a layout on one rank, for the comparison with one process."""

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
from hf_gradutils.invariance._deepspeed import whole_state
from hf_gradutils.upstream.deepspeed import drop_hooks, is_engine, is_partitioned
from hf_gradutils.upstream.torch import copy_gradient_hooks
from hf_gradutils.upstream.trl import rebind_forward

MakeModel: TypeAlias = Callable[[], nn.Module]
"""Makes the whole model if it cannot be built from a configuration."""


def whole_model(model: nn.Module, *, make_model: MakeModel | None = None) -> nn.Module | None:
    """A copy of the model on rank 0, without wrappers and unsharded; None on the others.

    Args:
        model: Wrapped and sharded by anything. A sharded one is built anew from its configuration.
        make_model: Builds it instead; called on rank 0.

    Collectives: one gather per sharded parameter; every rank must call.

    Raises:
        InvalidArgumentError: it is sharded, and has no configuration to build it from.
    """
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    is_sharded = any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in inside.modules()) or any(
        isinstance(p, DTensor) for p in inside.parameters()
    )
    is_in_partitions = any(map(is_partitioned, inside.parameters()))
    if not (is_sharded or is_in_partitions):
        return _copy(inside) if is_first else None
    build = make_model or _builder_of(inside)
    state: dict[str, Any]
    if is_in_partitions:
        state = whole_state(inside, keeps=is_first)
    else:
        state = get_model_state_dict(inside, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not is_first:
        return None
    built = build()
    state = {unwrapped_name(name): value for name, value in state.items()}
    built.load_state_dict({name: state[name] for name in built.state_dict() if name in state})
    for new, old in zip(built.parameters(), inside.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    device: Any = model.device if is_engine(model) else device_of(inside)
    return built.to(device)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, on its mesh's device, whose ranks can communicate; a plain tensor as it is. One gather."""
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
        copied = copy.deepcopy(model)
        for old, new in zip(model.parameters(), copied.parameters(), strict=True):
            copy_gradient_hooks(old, new)
        rebind_forward(model, copied)
        drop_hooks(copied)
        return copied
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient


def _builder_of(model: nn.Module) -> Callable[[], nn.Module]:
    config = getattr(model, "config", None)
    # fully_shard makes a class of its own in front of the model's.
    kind: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    if config is None or not hasattr(config, "to_dict") or hasattr(model, "peft_config"):
        raise InvalidArgumentError(
            f"a sharded {kind.__name__} cannot be built anew on one process, because it has no configuration of "
            "transformers; pass make_model=…, a function that makes it"
        )

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            built: nn.Module = kind(copy.deepcopy(config))
        return built

    return build
