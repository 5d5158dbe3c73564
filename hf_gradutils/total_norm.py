"""The gradients of this rank, and their global norms out of one packed reduction."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

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
    indices: list[int] = field(default_factory=list)
    """Which of the plan's parameters each belongs to."""


@dataclass(slots=True)
class Norms:
    """Global norms, and what this rank's parameters added to them."""

    total: Tensor
    """Shape (), float64."""
    groups: Tensor
    """Shape (groups of the plan,), float64; their p-norm is the total."""
    powers: list[tuple[list[int], Tensor]]
    """For each device: the plan's parameters, and Σ |x|^p of this rank's part of their gradients."""


@torch.no_grad()
def collect_gradients(parameters: Iterable[Tensor], plan: Plan) -> LocalGradients:
    """The gradients that are there, and which of the plan's parameters they belong to.

    Collectives: none, but one per gradient whose layout differs from its parameter's (Partial ones).
    """
    parameters = list(parameters)
    assert len(parameters) == len(plan.weights)
    device = upstream.local_tensor(parameters[0]).device if parameters else torch.device("cpu")
    gradients = LocalGradients(device=device)
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        gradients.shards.append(upstream.local_tensor(parameter.grad))
        gradients.values.append(upstream.local_tensor(in_placements_of(parameter, parameter.grad)))
        gradients.indices.append(index)
    return gradients


@torch.no_grad()
def reduce_with_norm(
    plan: Plan,
    gradients: LocalGradients,
    norm_type: float,
    sums: Tensor | None = None,
    *,
    foreach: bool = True,
) -> tuple[Norms, Tensor]:
    """The global p-norms of the gradients, and any further sums in the same collective.

    Args:
        plan: Who counts what; every rank of its domain must call, with or without gradients.
        gradients: ``collect_gradients`` of this step.
        norm_type: p, greater than 0; inf is the largest element.
        sums: Shape (n,), float64: numbers to add over the domain on the same trip. None for none.
        foreach: As in :func:`hf_gradutils.norms.power_sums`.

    Returns:
        ``(norms, sums)``, on ``gradients.device``. Of a plain replica that only some ranks have a gradient of, those
        ranks count it whole.

    Collectives: one all-reduce per axis of the domain (one all-gather for p = inf). Host syncs: none.
    """
    device = gradients.device
    sums = torch.zeros(0, dtype=torch.float64, device=device) if sums is None else sums.to(device)
    layout = _layout_of(plan, gradients)
    powers = [(part, power_sums(part.pick(gradients.values), norm_type, foreach=foreach)) for part in layout.parts]
    kept = [(part.parameters, values) for part, values in powers]
    num_groups = len(plan.groups)

    if math.isinf(norm_type):
        maxima = torch.zeros(num_groups, dtype=torch.float64, device=device)
        for part, values in powers:
            maxima.scatter_reduce_(0, part.groups, values.to(device), "amax")
        sums, reduced_maxima = reduce_packed(plan.domain, sums, maxima)
        assert reduced_maxima is not None
        return Norms(reduced_maxima.amax(), reduced_maxima, kept), sums

    # [Σ w·|g|^p of each group, then of each replica, then the replicas' share of gradients that are there]
    packed = layout.start.clone()
    for part, values in powers:
        packed.index_add_(0, part.places, (values * part.weights).to(device))
    reduced, _ = reduce_packed(plan.domain, torch.cat((sums, packed)))
    sizes = (sums.numel(), num_groups, plan.num_replicas, plan.num_replicas)
    sums, by_group, of_replicas, share = reduced.split(sizes)  # type: ignore[no-untyped-call]
    if plan.num_replicas:
        # Replicas share the weight of an element; those without a gradient must not leave theirs uncounted.
        whole = torch.where(share > 0, of_replicas / share, 0.0)
        by_group = by_group.index_add(0, layout.group_of_replica, whole)
    return Norms(root(by_group.sum(), norm_type), root(by_group, norm_type), kept), sums


@dataclass(slots=True)
class _Part:
    """The gradients on one device."""

    positions: list[int]
    """In the lists of ``LocalGradients``."""
    parameters: list[int]
    """In the plan."""
    weights: Tensor
    groups: Tensor
    places: Tensor
    """In the packed vector."""
    is_all: bool

    def pick(self, values: list[Tensor]) -> list[Tensor]:
        return values if self.is_all else [values[position] for position in self.positions]


@dataclass(slots=True)
class _Layout:
    """Where the numbers of one set of gradients go. Kept, on the device: making it anew would be a host sync."""

    key: tuple[object, ...]
    parts: list[_Part]
    start: Tensor
    group_of_replica: Tensor


_layouts: WeakKeyDictionary[Plan, _Layout] = WeakKeyDictionary()


def _layout_of(plan: Plan, gradients: LocalGradients) -> _Layout:
    devices = [value.device for value in gradients.values]
    key = (gradients.device, *gradients.indices, *devices)
    known = _layouts.get(plan)
    if known is not None and known.key == key:
        return known
    device, num_groups = gradients.device, len(plan.groups)

    def place_of(parameter: int) -> int:
        replica = plan.replicas[parameter]
        return plan.group_of[parameter] if replica is None else num_groups + replica

    parts = []
    for part_device in dict.fromkeys(devices):
        positions = [i for i, value_device in enumerate(devices) if value_device == part_device]
        parameters = [gradients.indices[i] for i in positions]
        weights = torch.tensor([plan.weights[i] for i in parameters], dtype=torch.float64, device=part_device)
        groups = torch.tensor([plan.group_of[i] for i in parameters], device=device)
        places = torch.tensor([place_of(i) for i in parameters], device=device)
        parts.append(_Part(positions, parameters, weights, groups, places, is_all=len(positions) == len(devices)))

    start = torch.zeros(num_groups + 2 * plan.num_replicas, dtype=torch.float64)
    for index in gradients.indices:
        replica = plan.replicas[index]
        if replica is not None:
            start[num_groups + plan.num_replicas + replica] = plan.weights[index]
    layout = _Layout(
        key, parts, start.to(device), torch.tensor(plan.group_of_replica, dtype=torch.int64, device=device)
    )
    _layouts[plan] = layout
    return layout
