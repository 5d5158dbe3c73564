"""Gradients as whole tensors, their norm and how far they are from others."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead


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


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A batch or a row with its floating-point tensors in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: cast(part, dtype) for name, part in value.items()}
    return type(value)(cast(part, dtype) for part in value) if isinstance(value, list | tuple) else value


def loss_of_micro_batches(loss_of: WholeBatchHead, head: nn.Module, rows: Sequence[Tensors]) -> Tensor:
    """The loss of the whole batch, from the rows of each micro-batch with their graph."""
    return loss_of.loss(tuple(torch.cat(kind) for kind in zip(*rows, strict=True)), loss_of.shared(head))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For what a model makes in the default dtype, as detectors make the weights of classes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
