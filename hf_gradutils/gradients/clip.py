"""Clip some of a model's gradients by their global norm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_gradutils.gradients.plan import Ownership, plan_for_model
from hf_gradutils.gradients.scaling import clip_coefficient, scale_
from hf_gradutils.gradients.total_norm import collect_gradients, reduce_with_norm


@torch.no_grad()
def clip_parameters(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    *,
    foreach: bool = True,
    norm_type: float = 2.0,
    group: ProcessGroup | None = None,
    ownership: Ownership | None = None,
) -> Tensor:
    """:func:`clip_gradients` for some of a model's parameters, in the model's order and the same ones on all ranks."""
    plan = plan_for_model(model, parameters, group=group, ownership=ownership)
    gradients = collect_gradients(parameters, plan)
    norms, _ = reduce_with_norm(plan, gradients, norm_type, foreach=foreach)
    if not math.isinf(max_norm):
        scale_(gradients.shards, clip_coefficient(norms.total, max_norm), foreach=foreach, kind=gradients.kind)
    return norms.total
