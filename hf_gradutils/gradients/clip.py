"""Clip some of a model's gradients by their global norm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_gradutils.gradients.of_model import gradients_of
from hf_gradutils.gradients.ownership import Ownership
from hf_gradutils.gradients.scaling import clip_coefficient, scale_
from hf_gradutils.gradients.total_norm import total_norm


@torch.no_grad()
def clip_parameters(
    model: nn.Module,
    parameters: Sequence[nn.Parameter] | None,
    max_norm: float,
    *,
    foreach: bool = True,
    norm_type: float = 2.0,
    group: ProcessGroup | None = None,
    ownership: Ownership | None = None,
) -> Tensor:
    """:func:`hf_gradutils.clip_gradients` for some of a model's parameters, in its order; None for all trained ones."""
    gradients = gradients_of(model, parameters, group=group, ownership=ownership).read()
    norms, _ = total_norm(gradients, norm_type, foreach=foreach)
    if not math.isinf(max_norm):
        scale_(gradients.shards, clip_coefficient(norms.total, max_norm), foreach=foreach, kind=gradients.kind)
    return norms.total
