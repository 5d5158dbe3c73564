"""Loops of users on tiny float64 nets, for GradUtilsAccelerator on some ranks and for torch alone on one."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from tests.harness.layouts import LAYOUTS
from tests.harness.trainer_cases import reset_accelerate

SIZES = {1: ([12], [8]), 2: ([5, 7], [3, 5]), 4: ([1, 5, 2, 4], [2, 1, 4, 1])}
"""Rows of each micro-batch, for a first and a second loss."""


def rows_of(window):
    """x and y of a loss, and z of another, which has fewer rows."""
    generator = torch.Generator().manual_seed(window)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 4), (12, 1), (8, 4))]


def nets():
    torch.manual_seed(3)
    return [nn.Linear(4, 4).double(), nn.Linear(4, 1).double(), nn.Linear(4, 1).double()]


class Alone:
    """One process with torch alone, and the whole batch."""

    sync_gradients = True

    def prepare(self, *objects):
        return objects if len(objects) > 1 else objects[0]

    def accumulate(self, *models):
        return contextlib.nullcontext()

    def unwrap_model(self, model):
        return model

    def start_window(self, num_targets, model=None):
        pass

    def backward(self, loss, num_targets=None, model=None):
        loss.backward()
        self.loss = loss.item()

    def clip_grad_norm_(self, parameters, max_norm):
        return nn.utils.clip_grad_norm_(parameters, max_norm)


def ours(accumulation=1, handlers=None, **settings):
    reset_accelerate()
    plugin = GradUtilsPlugin(num_steps=accumulation, **settings)
    return GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=plugin, kwargs_handlers=handlers)


def play(loop, layout, accumulation, *options, models=None, **settings):
    """The models that a loop has trained on this rank's micro-batches, and the Accelerator."""
    models, ranks = models or nets(), LAYOUTS[layout].num_ranks

    def batches(window):
        x, y, z = rows_of(window)
        first, second = SIZES[ranks * accumulation]
        parts = list(zip(x.split(first), y.split(first), z.split(second), strict=True))
        return parts[dist.get_rank() if ranks > 1 else 0 :: ranks]

    accelerator = ours(accumulation, **settings)
    loop(accelerator, batches, models, *options)
    return models, accelerator


def alone(loop, *options, models=None):
    models, accelerator = models or nets(), Alone()
    loop(accelerator, lambda window: [rows_of(window)], models, *options)
    return models, accelerator


def are_close(models, others):
    pairs = zip(nn.ModuleList(models).parameters(), nn.ModuleList(others).parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


def sgd(*modules):
    return torch.optim.SGD({p: None for module in modules for p in module.parameters()}, lr=0.1)


def square(model, x, y=0.5):
    return (model(x) - y).square().mean()


# ---- Backwards that are not linear ----


class Constant(torch.autograd.Function):
    """Adds the gradient of an auxiliary loss, whatever that of the loss is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.saved_tensors[0] / ctx.saved_tensors[0].numel()


class Clamped(Constant):
    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.01, 0.01)


class Sign(Constant):
    @staticmethod
    def backward(ctx, gradient):
        return gradient.sign()
