"""The gradients of this rank, and their global norms out of one packed reduction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_gradutils import upstream
from hf_gradutils.norms import power_sums, root
from hf_gradutils.ownership import Plan, in_placements_of
from hf_gradutils.reduction import all_reduce_, on_device, reduce_packed


@dataclass(frozen=True, slots=True)
class LocalGradients:
    """This rank's parts of the gradients: ``shards`` to scale in place, ``values`` to take the norm of.

    The two differ where a Partial gradient had to be summed over its mesh before it can be squared.
    """

    device: torch.device
    shards: list[Tensor]
    values: list[Tensor]
    indices: list[int]
    """Which of the plan's parameters each belongs to."""


@dataclass(slots=True)
class Norms:
    """Global norms, and what this rank's parameters added to them."""

    total: Tensor
    """Shape (), float64."""
    powers: list[tuple[list[int], Tensor]]
    """For each device: the plan's parameters, and Σ |x|^p of this rank's part of their gradients."""
    _by_place: Tensor
    _group_of_place: Tensor
    _num_groups: int
    _norm_type: float

    def of_groups(self) -> Tensor:
        """Shape (groups of the plan,), float64; their p-norm is the total."""
        groups = torch.zeros(self._num_groups, dtype=torch.float64, device=self.total.device)
        if math.isinf(self._norm_type):
            return groups.scatter_reduce_(0, self._group_of_place, self._by_place, "amax")
        return root(groups.index_add_(0, self._group_of_place, self._by_place), self._norm_type)


@torch.no_grad()
def collect_gradients(parameters: Sequence[Tensor], plan: Plan) -> LocalGradients:
    """The gradients that are there, and which of the plan's parameters they belong to.

    Collectives: none, but one per gradient whose layout differs from its parameter's (Partial ones).
    """
    assert len(parameters) == len(plan.places)
    every = [parameter.grad for parameter in parameters]
    indices = [index for index, gradient in enumerate(every) if gradient is not None]
    gradients = [gradient for gradient in every if gradient is not None]
    owners = [parameters[index] for index in indices]
    shards = values = upstream.local_tensors(gradients)
    if upstream.layouts(gradients) != upstream.layouts(owners):
        pairs = zip(owners, gradients, strict=True)
        values = [upstream.local_tensor(in_placements_of(owner, gradient)) for owner, gradient in pairs]
    if not all(value.numel() for value in values):  # a shard may be empty
        kept = [i for i, value in enumerate(values) if value.numel()]
        shards, values = [shards[i] for i in kept], [values[i] for i in kept]
        indices = [indices[i] for i in kept]
    return LocalGradients(parameters[0].device if parameters else torch.device("cpu"), shards, values, indices)


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
    layout = _layout_of(plan, gradients)
    device, num_places = gradients.device, len(plan.shares)
    if sums is None:
        sums = torch.zeros(0, dtype=torch.float64, device=device)
    powers = [(part, power_sums(part.pick(gradients.values), norm_type, foreach=foreach)) for part in layout.parts]
    kept = [(part.parameters, values) for part, values in powers]

    if math.isinf(norm_type):
        maxima = torch.zeros(num_places, dtype=torch.float64, device=device)
        for part, values in powers:
            maxima.scatter_reduce_(0, part.places, on_device(values, device), "amax")
        sums, reduced_maxima = reduce_packed(plan.domain, sums, maxima)
        assert reduced_maxima is not None
        total = reduced_maxima.amax()
        return Norms(total, kept, reduced_maxima, layout.group_of_place, len(plan.groups), norm_type), sums

    # [the sums | Σ |g|^p of each place | how often each place is counted]
    added = layout.zeros
    for part, values in powers:
        added = added.index_add(0, part.places, on_device(values, device))
    packed = torch.cat((on_device(sums, device), added, layout.counted))
    all_reduce_(plan.domain, packed)
    sums, added, counted = packed.split((sums.numel(), num_places, num_places))  # type: ignore[no-untyped-call]
    by_place = added / counted
    total = root(by_place.sum(), norm_type)
    return Norms(total, kept, by_place, layout.group_of_place, len(plan.groups), norm_type), sums


@dataclass(slots=True)
class _Part:
    """The gradients on one device."""

    positions: list[int]
    """In the lists of ``LocalGradients``."""
    parameters: list[int]
    """In the plan."""
    places: Tensor
    """In the plan."""
    is_all: bool

    def pick(self, values: list[Tensor]) -> list[Tensor]:
        return values if self.is_all else [values[position] for position in self.positions]


@dataclass(slots=True)
class _Layout:
    """Where the numbers of one set of gradients go. Kept, on the device: making it anew would be a host sync."""

    key: tuple[object, ...]
    parts: list[_Part]
    zeros: Tensor
    counted: Tensor
    """How often this rank counts each place."""
    group_of_place: Tensor


_UNCOUNTED = 1e-100
"""In place of 0 for a replica without a gradient: 0/0 where no rank has one would be NaN."""

_layouts: WeakKeyDictionary[Plan, _Layout] = WeakKeyDictionary()


def _layout_of(plan: Plan, gradients: LocalGradients) -> _Layout:
    device = gradients.device
    devices = [value.device for value in gradients.values]
    key = (device, *gradients.indices, *devices)
    known = _layouts.get(plan)
    if known is not None and known.key == key:
        return known

    parts = []
    for part_device in dict.fromkeys(devices):
        positions = [i for i, value_device in enumerate(devices) if value_device == part_device]
        parameters = [gradients.indices[i] for i in positions]
        places = torch.tensor([plan.places[i] for i in parameters], device=device)
        parts.append(_Part(positions, parameters, places, is_all=len(positions) == len(devices)))
    counted = torch.tensor([share or _UNCOUNTED for share in plan.shares], dtype=torch.float64)
    for index in gradients.indices:
        if plan.is_replica(index):
            counted[plan.places[index]] = 1.0
    _layouts[plan] = layout = _Layout(
        key=key,
        parts=parts,
        zeros=torch.zeros(len(plan.shares), dtype=torch.float64, device=device),
        counted=counted.to(device),
        group_of_place=torch.tensor(plan.group_of_place, device=device),
    )
    return layout
