"""Contexts that restore a model's modes and all random states, or fix what is drawn."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from hf_gradutils._devices import device_of
from hf_gradutils.upstream.sentence_transformers import cannot_go_back_in_evaluation

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Modules whose statistics change in each forward in training mode."""
_SMALL = 2**20
"""Elements."""
_DDP_FLAG = "require_forward_param_sync"
"""Attribute by which a forward without gradients says that the next one need not send buffers."""


def random_states(device: torch.device) -> Callable[[], None]:
    """A function that puts back the random states of Python, numpy and torch, on the CPU and on a device."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    of_cpu = torch.get_rng_state()
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    of_device = accelerator.get_rng_state(device) if accelerator else None

    def put_back() -> None:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(of_cpu)
        if accelerator:
            accelerator.set_rng_state(of_device, device)

    return put_back


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """The random states of Python, numpy and torch, on the CPU and on a device, are as before afterwards."""
    put_back = random_states(device)
    try:
        yield
    finally:
        put_back()


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The same random numbers on every rank, for data made on the CPU; random states are as before afterwards."""
    with random_states_kept(device):
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


def kept_buffers(model: nn.Module) -> tuple[Callable[[], None], list[Tensor]]:
    """A function that puts back buffers that forwards change, as often as it is called; and the buffers.

    Those of floating point, of any size, such as a queue of negatives, and small ones; there is no second copy of
    quantized weights. DDP sends them again: a forward without gradients says that the next one need not.
    """
    kept = [buffer for buffer in model.buffers() if is_plain(buffer) and _is_kept(buffer)]
    values = [buffer.detach().clone() for buffer in kept]
    versions = [buffer._version for buffer in kept]
    batch_norms = (module for module in model.modules() if isinstance(module, BATCH_NORMS))
    unnoticed = {id(buffer) for module in batch_norms for buffer in module.buffers(recurse=False)}  # no new version
    named = [(vars(module)["_buffers"], dict(vars(module)["_buffers"])) for module in model.modules()]
    flags = {_DDP_FLAG: vars(model)[_DDP_FLAG]} if isinstance(model, DistributedDataParallel) else {}

    @torch.no_grad()
    def put_back() -> None:
        for buffers, objects in named:
            buffers.update(objects)
        for index, (buffer, value) in enumerate(zip(kept, values, strict=True)):
            if buffer._version != versions[index] or id(buffer) in unnoticed:
                buffer.copy_(value)
                versions[index] = buffer._version
        vars(model).update(flags)

    return put_back, kept


def _is_kept(buffer: Tensor) -> bool:
    return buffer.numel() <= _SMALL or (buffer.is_floating_point() and buffer.element_size() > 1)


def is_plain(tensor: Tensor) -> bool:
    """True for what is neither a parameter nor spread over ranks."""
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_inference()


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are as before afterwards, as :func:`kept_buffers` has them."""
    put_back, _ = kept_buffers(model)
    try:
        yield
    finally:
        put_back()


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for modules without a backward in it; modes and random states are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    with random_states_kept(device_of(model)):
        model.eval()
        for module in filter(cannot_go_back_in_evaluation, modes):
            module.training = True
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


class RowsDrawAlike(TorchFunctionMode):
    """torch's random numbers depend on nothing but their shape, and are the same for every entry of the first dim.

    A loss that draws for each row, in this context, is a function of the rows that may be cut between them. Numbers of
    a generator that is named are left alone.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        drawn = func(*args, **(kwargs or {}))
        draw = _DRAWS.get(func)
        if draw is None or not drawn.numel() or (kwargs or {}).get("generator") is not None:
            return drawn
        shape = (1, *drawn.shape[1:]) if drawn.dim() else ()
        values = torch.empty(shape, dtype=torch.float64, device="cpu")  # rounded to any precision
        draw(values, torch.Generator().manual_seed(0))
        with torch.no_grad():
            return drawn.copy_(values)


def _uniform(values: Tensor, generator: torch.Generator) -> None:
    values.uniform_(generator=generator)


def _normal(values: Tensor, generator: torch.Generator) -> None:
    values.normal_(generator=generator)


_DRAWS: dict[Any, Callable[[Tensor, torch.Generator], None]] = {
    torch.rand: _uniform,
    torch.rand_like: _uniform,
    torch.randn: _normal,
    torch.randn_like: _normal,
}
"""What is called → a draw from the same distribution."""
