"""The ways to clip that are compared: ours, and others as their own training loops call them."""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from hf_gradutils.window import AccumulationWindow

MAX_NORM = 1.0
"""Far below the norm of the gradients here: every method has to scale."""

OURS, FOLDED = "ours", "ours, folded"
TORCH, ACCELERATE, TRAINER, AUTOMODEL = "torch", "accelerate", "Trainer", "Automodel"

HAS_AUTOMODEL = importlib.util.find_spec("nemo_automodel") is not None


Method = Callable[[nn.Module], Callable[[], Tensor]]
"""Model → the call to measure, which returns the norm."""


def _ours(model: nn.Module, *, scales: bool) -> Callable[[], Tensor]:
    window = AccumulationWindow(torch.device("cpu"))
    window.weigh(torch.ones(()), torch.tensor(1))
    return lambda: window.close(model, MAX_NORM, scales=scales).grad_norm


def _torch(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


def _accelerate(model: nn.Module) -> Callable[[], Tensor]:
    accelerator = Accelerator(cpu=True)
    return lambda: accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)


def _trainer(model: nn.Module) -> Callable[[], Tensor]:
    trainer = object.__new__(Trainer)  # with what its clipping looks at, and no data, optimizer or output folder
    trainer.args = SimpleNamespace(max_grad_norm=MAX_NORM, fp16=False)
    trainer.accelerator = Accelerator(cpu=True)
    trainer._mixed_mesh_grads = None
    return lambda: trainer._clip_grad_norm(model)


def _automodel(model: nn.Module) -> Callable[[], Tensor]:
    with warnings.catch_warnings(action="ignore"):  # of torch's compiler, which its import loads
        from nemo_automodel.components.training.utils import clip_grad_norm

    return lambda: clip_grad_norm(MAX_NORM, [model])


METHODS: dict[str, Method] = {
    OURS: functools.partial(_ours, scales=True),
    FOLDED: functools.partial(_ours, scales=False),
    TORCH: _torch,
    ACCELERATE: _accelerate,
    TRAINER: _trainer,
} | ({AUTOMODEL: _automodel} if HAS_AUTOMODEL else {})
"""Name → method, in the order in which they take their turns."""
