"""Documented utilities on lists of parameters: the gradient norm over explicit groups, and clipping by it."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from hf_gradutils._collectives import domain_of
from hf_gradutils._devices import on_device
from hf_gradutils.errors import InvalidArgumentError, ReplicaMismatchError
from hf_gradutils.gradients.of_model import Gradients
from hf_gradutils.gradients.plan import plan_by_count
from hf_gradutils.gradients.power_sums import check_norm_type, power_sums
from hf_gradutils.gradients.scaling import check_max_norm, clip_coefficient, scale_
from hf_gradutils.gradients.total_norm import total_norm
from hf_gradutils.upstream.dtensor import local_tensor


@torch.no_grad()
def clip_grad_by_total_norm_(
    parameters: Tensor | Sequence[Tensor],
    max_grad_norm: int | float,
    total_norm: float | Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Scale gradients in place by ``max_grad_norm / (total_norm + 1e-6)`` when that is below 1.

    Args:
        parameters: Tensors or DTensors; those without ``grad`` are skipped. Gradients of any float dtype.
        max_grad_norm: Greater than 0.
        total_norm: The global norm, a number or a 0-d tensor on any device (a DTensor is gathered). If it is not
            finite, nothing is scaled, and the non-finite gradients can be found.
        dtype: Precision of the coefficient.

    Collectives: none. Host syncs: none for a tensor norm on the gradients' device.

    Raises:
        InvalidArgumentError: ``max_grad_norm`` ≤ 0, or ``dtype`` is no float dtype.
    """
    max_norm = check_max_norm(max_grad_norm)
    grads = [local_tensor(p.grad) for p in _as_list(parameters) if p.grad is not None]
    if isinstance(total_norm, DTensor):
        total_norm = total_norm.full_tensor()
    norm = total_norm if isinstance(total_norm, Tensor) else torch.tensor(float(total_norm), dtype=torch.float64)
    scale_(grads, clip_coefficient(norm.double(), max_norm).to(_checked_float(dtype)))


def get_grad_norm(
    parameters: Tensor | Sequence[Tensor],
    dp_cp_group: ProcessGroup | None,
    tp_group: ProcessGroup | None,
    norm_type: int | float = 2,
    dtype: torch.dtype = torch.float32,
    *,
    plain_sharded_over: Sequence[Literal["dp_cp", "tp"]] = (),
) -> float:
    """p-norm of the gradients viewed as one vector, each element counted once.

    DTensors know their shards and replicas. Plain tensors are replicas over both groups, unless ``plain_sharded_over``
    says that a group's ranks hold different parts.

    Args:
        parameters: Tensors or DTensors, the same ones on every rank; a ``grad`` of None counts as zero. A rank without
            any plain gradient contributes nothing; its replicas count them.
        dp_cp_group: Ranks of (sharded) data and context parallelism, or None.
        tp_group: Ranks of tensor parallelism, or None.
        norm_type: p, greater than 0; ``inf`` is the largest element.
        dtype: Precision of the result, if it can hold it. The sum itself runs in float64.
        plain_sharded_over: Groups over which plain tensors are different parts.

    Returns:
        The norm; 0.0 without gradients.

    Collectives: one all-reduce per axis of the grid spanned by the groups and the DTensors' meshes (one in
        all when it covers every rank); all-gathers for p = inf; a gradient with Partial placements adds one of
        its own. Every rank of the grid must call. Host syncs: one, the result.

    Raises:
        InvalidArgumentError: ``norm_type`` ≤ 0, a ``dtype`` that is no float dtype, an unknown name in
            ``plain_sharded_over``, or groups that overlap without forming a grid.
        ReplicaMismatchError: replicas have different norms.
    """
    p = check_norm_type(norm_type)
    tensors = _as_list(parameters)
    groups = {"dp_cp": dp_cp_group, "tp": tp_group}
    if unknown := set(plain_sharded_over) - set(groups):
        raise InvalidArgumentError(f"plain_sharded_over takes 'dp_cp' and 'tp', got {sorted(unknown)}")
    mesh_groups = [g for t in tensors if isinstance(t, DTensor) for g in t.device_mesh.get_all_groups()]
    domain = domain_of([dp_cp_group, tp_group, *dict.fromkeys(mesh_groups)])

    num_plain_shards = 1
    for name in set(plain_sharded_over):
        if (group := groups[name]) is not None:
            num_plain_shards *= dist.get_world_size(group)
    plan = plan_by_count(tensors, domain, num_plain_shards)
    gradients = Gradients(tensors, plan).read()

    # Replicas that differ show in the spread of the ranks' own norms s: [ranks with replicas, Σ s, Σ s²].
    device = gradients.slots.zeros.device
    spread = torch.zeros(3, dtype=torch.float64, device=device)
    replicas = [v for v, i in zip(gradients.values, gradients.slots.indices, strict=True) if plan.is_replica(i)]
    if replicas:
        by_device = {v.device: [w for w in replicas if w.device == v.device] for v in replicas}
        squares = [on_device(power_sums(alike, 2.0).sum(), device) for alike in by_device.values()]
        own = torch.stack(squares).sum().sqrt()
        spread = torch.stack((torch.ones_like(own), own, own.square()))
    norms, spread = total_norm(gradients, p, spread)
    _check_spread(spread.tolist(), replicas)
    value = float(norms.total.item())
    rounded = float(torch.tensor(value, dtype=_checked_float(dtype)).item())
    return rounded if math.isfinite(rounded) else value  # a finite norm stays finite where dtype cannot hold it


def _check_spread(spread: list[float], replicas: list[Tensor]) -> None:
    num_ranks, total, total_of_squares = spread
    if num_ranks < 2:
        return
    mean = total / num_ranks
    deviation = max(total_of_squares / num_ranks - mean**2, 0.0) ** 0.5
    tolerance = max((torch.finfo(g.dtype).eps for g in replicas), default=torch.finfo(torch.float32).eps) ** 0.5
    if deviation > tolerance * mean:
        raise ReplicaMismatchError(
            f"plain tensors should be copies of each other on all ranks, but the norms of their gradients differ: "
            f"mean {mean:.6g}, standard deviation {deviation:.6g} over {num_ranks:.0f} ranks; if ranks hold different "
            "parts, say over which group with plain_sharded_over=('tp',) or ('dp_cp',), else synchronise the gradients"
        )


def _as_list(parameters: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _checked_float(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise InvalidArgumentError(f"dtype must be a float dtype, got {dtype}")
    return dtype
