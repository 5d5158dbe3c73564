"""Gradients as whole tensors, their norm and how far they are from others."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name, without those of wrappers, → gradient: a copy, whole, in float64, on the CPU."""
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            whole = grad.detach().to("cpu", torch.float64, copy=True)
            gradients[name.removeprefix("module.").removeprefix("_orig_mod.")] = whole
    return gradients


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """‖got − want‖ / ‖want‖; a gradient that one of them lacks is zero there."""
    pairs = [(got.get(name), want.get(name)) for name in set(got) | set(want)]
    difference = sum(float(((0 if g is None else g) - (0 if w is None else w)).square().sum()) for g, w in pairs)
    return math.sqrt(difference / sum(float(w.square().sum()) for w in want.values()))


def norm_of(gradients: dict[str, Tensor], p: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in gradients.values()]), p))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For what a model makes in the default dtype, as detectors make the weights of classes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
