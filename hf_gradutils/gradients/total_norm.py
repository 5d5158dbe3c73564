"""The gradients of this rank, and their global norms out of one packed reduction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_gradutils._collectives import all_reduce_, reduce_packed
from hf_gradutils._devices import Kind, common_kind, on_device
from hf_gradutils.gradients.plan import Plan, in_placements_of
from hf_gradutils.gradients.power_sums import power_sums, root
from hf_gradutils.upstream.dtensor import layouts_of, local_tensor, local_tensors_and_layouts
from hf_gradutils.upstream.torch import gradients_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalGradients:
    """This rank's parts of the gradients: ``shards`` to scale in place, ``values`` to take the norm of.

    The two differ where a Partial gradient had to be summed over its mesh before it can be squared.
    """

    device: torch.device
    shards: list[Tensor]
    values: list[Tensor]
    sizes: tuple[int, ...]
    """Elements of each value; not 0."""
    indices: Sequence[int]
    """Which of the plan's parameters each belongs to."""
    kind: Kind
    """What all have in common."""


@dataclass(slots=True)
class Norms:
    """Global norms, and what this rank's parameters added to them."""

    total: Tensor
    """Shape (), float64."""
    powers: list[tuple[Sequence[int], Tensor]]
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


def collect_gradients(
    parameters: Sequence[Tensor], plan: Plan, gradients: Sequence[Tensor | None] | None = None
) -> LocalGradients:
    """The gradients that are there, and which of the plan's parameters they belong to. Called under ``no_grad``.

    Args:
        parameters: Those of the plan.
        plan: Who counts what.
        gradients: Of the parameters, where somebody has asked them already.

    Collectives: none, but one per gradient whose layout differs from its parameter's (Partial ones).
    """
    assert len(parameters) == len(plan.places)
    every = gradients_of(parameters) if gradients is None else gradients
    present = cast(Sequence[Tensor], every)
    owners: Sequence[Tensor] = parameters
    indices: Sequence[int] = range(len(parameters))
    if NoneType in set(map(type, every)):
        present = [gradient for gradient in every if gradient is not None]
        indices = [index for index, gradient in enumerate(every) if gradient is not None]
        owners = [parameters[index] for index in indices]
    shards, layouts = local_tensors_and_layouts(present)
    values, known = shards, _alike.get(plan)
    if known is None or known.indices != indices or known.layouts != layouts:
        if layouts == layouts_of(owners):
            known = _alike[plan] = _Alike(indices, layouts)
        else:
            pairs = zip(owners, present, strict=True)
            values, known = [local_tensor(in_placements_of(owner, grad)) for owner, grad in pairs], None
    told = known.told if known is not None else None
    if told is None or told[1].device != shards[0].device:
        told = tuple(map(Tensor.numel, values)), common_kind(shards)
        if known is not None and layouts and len(layouts) == len(present):
            known.told = told
    sizes, kind = told
    if 0 in sizes:  # a shard may be empty
        kept = [i for i, size in enumerate(sizes) if size]
        shards, values = [shards[i] for i in kept], [values[i] for i in kept]
        indices, sizes = [indices[i] for i in kept], tuple(sizes[i] for i in kept)
    device = parameters[0].device if parameters else torch.device("cpu")
    return LocalGradients(device, shards, values, sizes, indices, kind)


@dataclass(slots=True)
class _Alike:
    """Which of a plan's parameters last had gradients laid out like them.

    To compare layouts that are the same objects takes no time. Those of the parameters hold still: others have another
    plan.
    """

    indices: Sequence[int]
    layouts: list[object]
    told: tuple[tuple[int, ...], Kind] | None = None
    """Sizes of this rank's parts and what they have in common, if all are DTensors: their layouts tell."""


_alike: WeakKeyDictionary[Plan, _Alike] = WeakKeyDictionary()


def reduce_with_norm(
    plan: Plan,
    gradients: LocalGradients,
    norm_type: float,
    sums: Tensor | None = None,
    *,
    foreach: bool = True,
) -> tuple[Norms, Tensor]:
    """The global p-norms of the gradients, and any further sums in the same collective. Called under ``no_grad``.

    Args:
        plan: Who counts what; every rank of its domain must call, with or without gradients.
        gradients: ``collect_gradients`` of this step.
        norm_type: p, greater than 0; inf is the largest element.
        sums: Shape (n,), float64: numbers to add over the domain on the same trip. None for none. What is worked out
            is worked out where they are: beside the ranks' device, also if gradients are offloaded to the CPU.
        foreach: As in :func:`hf_gradutils.norms.power_sums`.

    Returns:
        ``(norms, sums)``, on the device of ``sums``, or ``gradients.device``. Of a plain replica that only some ranks
        have a gradient of, those ranks count it whole.

    Collectives: one all-reduce per axis of the domain (one all-gather for p = inf). Host syncs: none; one where
    what is worked out is on the CPU and the group cannot carry it from there.
    """
    if sums is None:
        sums = torch.zeros(0, dtype=torch.float64, device=gradients.device)
    device, num_places = sums.device, len(plan.shares)
    layout = _layout_of(plan, gradients, device)
    powers = [
        (part, power_sums(part.pick(gradients.values), norm_type, foreach=foreach, sizes=part.pick(gradients.sizes)))
        for part in layout.parts
    ]
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
    packed = torch.cat((sums, added, layout.counted))
    all_reduce_(plan.domain, packed)
    sums, added, counted = packed.split_with_sizes((sums.numel(), num_places, num_places))
    by_place = added / counted
    total = root(by_place.sum(), norm_type)
    return Norms(total, kept, by_place, layout.group_of_place, len(plan.groups), norm_type), sums


@dataclass(slots=True)
class _Part:
    """The gradients on one device."""

    positions: Sequence[int]
    """In the lists of ``LocalGradients``."""
    parameters: Sequence[int]
    """In the plan."""
    places: Tensor
    """In the plan."""
    is_all: bool

    def pick(self, values: Sequence[T]) -> Sequence[T]:
        return values if self.is_all else [values[position] for position in self.positions]


@dataclass(slots=True)
class _Layout:
    """Where the numbers of one set of gradients go. Kept, on the device."""

    key: tuple[object, ...]
    parts: list[_Part]
    zeros: Tensor
    counted: Tensor
    """How often this rank counts each place."""
    group_of_place: Tensor


_UNCOUNTED = 1e-100
"""In place of 0 for a replica without a gradient: 0/0 where no rank has one would be NaN."""

_layouts: WeakKeyDictionary[Plan, _Layout] = WeakKeyDictionary()


def _layout_of(plan: Plan, gradients: LocalGradients, device: torch.device) -> _Layout:
    one = gradients.kind.device
    # All of this rank's parts may be empty: then there are no values, whatever they had in common.
    devices = [one] if one is not None and gradients.values else [value.device for value in gradients.values]
    key = (device, gradients.indices, devices)
    known = _layouts.get(plan)
    if known is not None and known.key == key:
        return known

    parts = []
    for part_device in dict.fromkeys(devices):
        positions = [i for i, value in enumerate(gradients.values) if value.device == part_device]
        parameters = [gradients.indices[i] for i in positions]
        places = on_device(torch.tensor([plan.places[i] for i in parameters]), device)
        parts.append(_Part(positions, parameters, places, is_all=len(devices) == 1))
    counted = torch.tensor([share or _UNCOUNTED for share in plan.shares], dtype=torch.float64)
    for index in gradients.indices:
        if plan.is_replica(index):
            counted[plan.places[index]] = 1.0
    _layouts[plan] = layout = _Layout(
        key=key,
        parts=parts,
        zeros=torch.zeros(len(plan.shares), dtype=torch.float64, device=device),
        counted=on_device(counted, device),
        group_of_place=on_device(torch.tensor(plan.group_of_place), device),
    )
    return layout
