"""Contexts that restore a model's modes and all random states."""

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn

from hf_gradutils._devices import device_of


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """The random states of Python, numpy and torch, on the CPU and on a device, are as before afterwards."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with _torchs_kept(device):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The same random numbers on every rank, for data made on the CPU; random states are as before afterwards."""
    with random_states_kept(device):
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


def _torchs_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])  # looking for a GPU would start CUDA
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.random.fork_rng([index], device_type=device.type)


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes and random states are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    with random_states_kept(device_of(model)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
