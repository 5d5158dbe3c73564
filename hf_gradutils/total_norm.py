"""The gradients of this rank, and their global norm out of one packed reduction."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_gradutils import upstream
from hf_gradutils.norms import power_sums, root
from hf_gradutils.ownership import Plan, in_placements_of
from hf_gradutils.reduction import reduce_packed


@dataclass(slots=True)
class LocalGradients:
    """This rank's parts of the gradients: ``shards`` to scale in place, ``values`` to take the norm of.

    The two differ where a Partial gradient had to be summed over its mesh before it can be squared.
    """

    device: torch.device
    shards: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    is_plain: list[bool] = field(default_factory=list)


@torch.no_grad()
def collect_gradients(parameters: Iterable[Tensor], plan: Plan) -> LocalGradients:
    """Pair every gradient that is there with the weight that this rank counts it with.

    Collectives: none, but one per gradient whose layout differs from its parameter's (Partial ones).
    """
    parameters = list(parameters)
    device = upstream.local_tensor(parameters[0].detach()).device if parameters else torch.device("cpu")
    gradients = LocalGradients(device=device)
    for parameter, num_holders in zip(parameters, plan.num_holders, strict=True):
        if parameter.grad is None:
            continue
        gradients.shards.append(upstream.local_tensor(parameter.grad))
        gradients.values.append(upstream.local_tensor(in_placements_of(parameter, parameter.grad)))
        gradients.weights.append(1.0 / num_holders)
        gradients.is_plain.append(not isinstance(parameter.grad, DTensor))
    return gradients


@torch.no_grad()
def reduce_with_norm(
    plan: Plan,
    gradients: LocalGradients,
    norm_type: float,
    sums: Tensor | None = None,
    *,
    foreach: bool = True,
) -> tuple[Tensor, Tensor]:
    """The global p-norm of the gradients, and any further sums in the same collective.

    Args:
        plan: Who counts what; every rank of its domain must call, with or without gradients.
        gradients: ``collect_gradients`` of this step.
        norm_type: p, greater than 0; inf is the largest element.
        sums: Shape (n,), float64: numbers to add over the domain on the same trip. None for none.
        foreach: As in :func:`hf_gradutils.norms.power_sums`.

    Returns:
        ``(norm, sums)``: shape () and (n,), float64, on ``gradients.device``. A rank none of whose plain
        gradients exist leaves the norm to the replicas that have them.

    Collectives: one all-reduce per axis of the domain (one all-gather for p = inf). Host syncs: none.
    """
    device = gradients.device
    sums = torch.zeros(0, dtype=torch.float64, device=device) if sums is None else sums.to(device)
    if math.isinf(norm_type):
        largest = [
            power_sums(values, norm_type, foreach=foreach).amax().to(device) for values, _ in _by_device(gradients)
        ]
        maxima = torch.stack(largest).amax().view(1) if largest else torch.zeros(1, dtype=torch.float64, device=device)
        sums, reduced_maxima = reduce_packed(plan.domain, sums, maxima)
        assert reduced_maxima is not None
        return reduced_maxima[0], sums

    # Per rank: Σ w·|g|^p of DTensors, the same of plain tensors, and this rank's share of "has plain ones".
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for values, indices in _by_device(gradients):
        powers = power_sums(values, norm_type, foreach=foreach)
        weights = _weight_rows(tuple((gradients.weights[i], gradients.is_plain[i]) for i in indices), powers.device)
        # Masked, not multiplied by zero: 0 · inf would turn an infinite norm into NaN.
        totals[:2] += torch.where(weights > 0, weights * powers, 0.0).sum(1).to(device)
    if any(gradients.is_plain) or not plan.plain_everywhere:
        totals[2] = 1.0 / plan.domain.num_ranks
    reduced, _ = reduce_packed(plan.domain, torch.cat((sums, totals)))
    split, plain, coverage = reduced[-3:]
    # Replicas share the weight of a plain element; those without it must not leave their share uncounted.
    plain = torch.where(coverage > 0, plain / coverage, plain)
    return root(split + plain, norm_type), reduced[:-3]


def _by_device(gradients: LocalGradients) -> list[tuple[list[Tensor], list[int]]]:
    """Values and their indices, one entry per device."""
    found: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
    for index, value in enumerate(gradients.values):
        values, indices = found.setdefault(value.device, ([], []))
        values.append(value)
        indices.append(index)
    return list(found.values())


_weight_cache: dict[tuple[tuple[tuple[float, bool], ...], torch.device], Tensor] = {}


def _weight_rows(weights: tuple[tuple[float, bool], ...], device: torch.device) -> Tensor:
    """Shape (2, n): the weights of DTensors, those of plain tensors. Kept on the device: a copy would be a sync."""
    key = (weights, device)
    if key not in _weight_cache:
        if len(_weight_cache) >= 64:
            _weight_cache.clear()
        rows = [[0.0 if plain else w for w, plain in weights], [w if plain else 0.0 for w, plain in weights]]
        _weight_cache[key] = torch.tensor(rows, dtype=torch.float64, device=device)
    return _weight_cache[key]
