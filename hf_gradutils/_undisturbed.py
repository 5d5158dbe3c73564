"""Contexts that restore a model's modes and torch's random states."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from hf_gradutils._devices import device_of


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states are as before afterwards."""
    with in_evaluation_mode(model), torch.no_grad():
        yield


def random_states_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Torch's random states, on the CPU and on a device, are as before afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])  # looking for a GPU would start CUDA
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.random.fork_rng([index], device_type=device.type)


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes and torch's random states are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    with random_states_kept(device_of(model)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
