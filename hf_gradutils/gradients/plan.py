"""Who counts which gradient element: every element of the model once, however many ranks hold it.

A rank counts an element with weight 1 / (number of ranks that hold it). Added over all ranks, shards count
once each and replicas count once together, on any mesh and beside plain tensors.
"""

import fnmatch
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

from hf_gradutils._collectives import Domain, gather_objects, world_domain
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.names import ALL, NormGroups, group_name
from hf_gradutils.gradients.replicas import ShardKey, _check_replicas, _checksums, _Record
from hf_gradutils.upstream.dtensor import layouts_of
from hf_gradutils.upstream.torch import gradients_of, parameters_of

Ownership: TypeAlias = Mapping[str, Literal["sharded", "replicated"] | ProcessGroup]
"""Name patterns (:mod:`fnmatch`) of plain parameters, and whether ranks hold different parts of them or copies.

``"sharded"``: every rank a part of its own. A group: its ranks hold different parts, and other such groups copies of
those (experts that are replicated too). The last pattern that matches counts. Without one, Megatron's and DeepSpeed's
mark on expert parameters, ``parameter.allreduce = False``, says "sharded"; FSDP1's flat parameters are found.
"""


@dataclass(frozen=True, eq=False)
class Plan:
    """Where each parameter of this rank is counted; built once, so compared by identity.

    A *place* sums up gradients that are counted equally often and reported together. Ranks add Σ |g|^p to it, and
    apart from that how often it is counted; the ratio counts every element once. There is one place for all shards
    of a group that equally many ranks hold, and one for each plain parameter with copies on other ranks: how many
    of them have a gradient is known at each step only.
    """

    domain: Domain
    names: tuple[str, ...]
    """Empty where parameters have none."""
    places: tuple[int, ...]
    """Of each parameter, in their order."""
    shares: tuple[float, ...]
    """Of each place: the part of "how often" that this rank adds whether or not it has gradients; 0 for replicas."""
    groups: tuple[str, ...]
    """Norm groups, the same on all ranks."""
    group_of_place: tuple[int, ...]

    def is_replica(self, parameter: int) -> bool:
        """Whether the parameter is a plain one that other ranks hold copies of."""
        return not self.shares[self.places[parameter]]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that have, or may get, a gradient, in the model's order; a tied one once."""
    return trainable_gradients(model)[0]


def trainable_gradients(model: nn.Module) -> tuple[list[nn.Parameter], list[Tensor | None]]:
    """:func:`trainable_parameters` and their gradients."""
    parameters = parameters_of(model)
    gradients = gradients_of(parameters)
    if NoneType not in set(map(type, gradients)):
        return parameters, gradients
    kept = [i for i, gradient in enumerate(gradients) if gradient is not None or parameters[i].requires_grad]
    return [parameters[i] for i in kept], [gradients[i] for i in kept]


@dataclass(slots=True)
class _Known:
    """A plan, and what it was made for."""

    parameters: Sequence[nn.Parameter]
    layouts: list[object]
    settings: object
    plan: Plan

    def fits(self, parameters: Sequence[nn.Parameter], layouts: list[object], settings: object) -> bool:
        """Whether it was made for these."""
        return (
            (self.parameters is parameters or _are_same(self.parameters, parameters))
            and self.layouts == layouts
            and self.settings == settings
        )


_MOST_PLANS = 8
"""Of one model: of all its parameters, and of some that are clipped on their own."""

_plans: WeakKeyDictionary[nn.Module, list[_Known]] = WeakKeyDictionary()


def _are_same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def plan_for_model(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    *,
    group: ProcessGroup | None = None,
    ownership: Ownership | None = None,
    norm_groups: NormGroups = None,
) -> Plan:
    """The plan of a model, found by parameter name and kept while parameters and placements stay the same.

    Args:
        model: What the plan is kept for.
        parameters: ``trainable_parameters(model)``, or some of them, in that order.
        group: All ranks that train the model; None is the default group, or one process without any.
        ownership: Declares plain parameters that are shards although they carry no placements (experts).
        norm_groups: Groups whose norms are wanted beside the total; None is one group of all.

    Collectives: the first call for a model gathers one object per rank over ``group``; later ones none.
    Host syncs: one in the first call.

    Raises:
        ReplicaMismatchError: alleged replicas hold different values, or a parameter is a DTensor on some
            ranks and a plain tensor on others.
    """
    ownership = check_ownership(ownership or {})
    domain = world_domain(group)
    layouts = layouts_of(parameters)
    grouping = norm_groups if norm_groups is None or isinstance(norm_groups, str) else tuple(norm_groups.items())
    settings = (domain.groups, tuple(ownership.items()), grouping)
    plans = _plans.setdefault(model, [])
    for known in plans:
        if known.fits(parameters, layouts, settings):
            return known.plan
    every = dict(model.named_parameters())
    identities = {id(p) for p in parameters}
    named = {name: p for name, p in every.items() if id(p) in identities}
    plan = _build_plan(named, domain, _declared_shards(model, named, ownership), norm_groups)
    # Parameters that the model has no more, such as whole ones from before it was sharded, are not to be kept alive.
    current = {id(p) for p in every.values()}
    plans[:] = [known for known in plans if all(id(p) in current for p in known.parameters)]
    plans[_MOST_PLANS - 1 :] = []
    plans.insert(0, _Known(parameters, layouts, settings, plan))
    return plan


def plan_for_grid(parameters: Sequence[Tensor], domain: Domain, num_plain_shards: int) -> Plan:
    """A plan by counting alone, for parameters without names.

    Args:
        parameters: Plain tensors are split into ``num_plain_shards`` parts over the domain; the ranks of a
            DTensor's mesh are in the domain, and further ranks of it hold copies of the whole.
        domain: Who takes part.
        num_plain_shards: Parts of a plain tensor, 1 for replicas.

    Collectives: none.
    """
    keys: list[_PlaceKey] = []
    for index, parameter in enumerate(parameters):
        is_plain = not isinstance(parameter, DTensor)
        parts = num_plain_shards if is_plain else math.prod(size for _, size, _ in _shard_key(parameter) or ())
        is_replica = is_plain and parts == 1 and domain.num_ranks > 1
        keys.append((ALL, f"number {index}") if is_replica else (ALL, domain.num_ranks / parts))
    return _plan(domain, (), keys, keys)


def in_placements_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient laid out like its parameter: a Partial one is summed, another layout redistributed.

    Called under ``no_grad``.

    Collectives: one for a gradient in another layout, over the mesh dims that differ; each rank of its mesh
    must hold such a gradient then. None otherwise.
    """
    if not (isinstance(parameter, DTensor) and isinstance(gradient, DTensor)):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)


def _shard_key(parameter: Tensor) -> ShardKey | None:
    """What this rank holds: () for all of it, None for nothing (the rank is outside the mesh)."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    return tuple(
        (str(placement), mesh.size(dim), coordinate[dim])
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    )


def check_ownership(ownership: Ownership) -> Ownership:
    """Return ``ownership``. InvalidArgumentError if it holds something else than it may."""
    for pattern, kind in ownership.items():
        if not (isinstance(kind, ProcessGroup) or kind in ("sharded", "replicated")):
            raise InvalidArgumentError(
                f"ownership[{pattern!r}] must be 'sharded', 'replicated' or a process group, got {kind!r}"
            )
    return ownership


def _declared_shards(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], ownership: Ownership
) -> dict[str, ShardKey]:
    """Name → which part this rank holds, for plain parameters that are parts although they do not say so."""
    flat: dict[int, ProcessGroup] = {}
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy != ShardingStrategy.NO_SHARD:
            assert module.process_group is not None
            flat |= {id(p): module.process_group for p in module.parameters() if id(p) not in flat}
    declared: dict[str, ShardKey] = {}
    for name, parameter in parameters.items():
        kinds = [kind for pattern, kind in ownership.items() if fnmatch.fnmatchcase(name, pattern)]
        kind = kinds[-1] if kinds else flat.get(id(parameter))
        if kind is None and not getattr(parameter, "allreduce", True):
            kind = "sharded"
        if isinstance(parameter, DTensor) or kind in (None, "replicated") or not dist.is_initialized():
            continue
        group = kind if isinstance(kind, ProcessGroup) else None
        declared[name] = (("declared", dist.get_world_size(group), dist.get_rank(group)),)
    return declared


def _build_plan(
    parameters: Mapping[str, nn.Parameter],
    domain: Domain,
    declared: Mapping[str, ShardKey],
    norm_groups: NormGroups,
) -> Plan:
    checksums = dict(zip(parameters, _checksums(parameters.values()), strict=True)) if domain.groups else {}
    mine: _Record = {}
    for name, parameter in parameters.items():
        key = declared.get(name, _shard_key(parameter))
        if key is not None:
            mine[name] = (key, not isinstance(parameter, DTensor), checksums.get(name, (0.0, 0.0)))
    records = gather_objects(domain, mine)
    if domain.groups:
        _check_replicas(records, dist.get_process_group_ranks(domain.groups[0]))

    holders = Counter((name, key) for record in records for name, (key, _, _) in record.items())

    def place_key(name: str, key: ShardKey, is_plain: bool) -> _PlaceKey:
        num_holders = holders[name, key]
        is_replica = is_plain and not key and num_holders > 1
        return group_name(name, norm_groups), name if is_replica else float(num_holders)

    everywhere = [place_key(name, key, plain) for record in records for name, (key, plain, _) in record.items()]
    nothing = (ALL, 1.0)  # of a parameter on a mesh without this rank; its local part is empty
    own = [place_key(name, *mine[name][:2]) if name in mine else nothing for name in parameters]
    return _plan(domain, tuple(parameters), own, everywhere if len(mine) == len(own) else [*everywhere, nothing])


_PlaceKey: TypeAlias = tuple[str, float | str]
"""Norm group, and how many ranks count the place, or the name of the replica it is for."""


def _plan(domain: Domain, names: tuple[str, ...], own: Sequence[_PlaceKey], everywhere: Sequence[_PlaceKey]) -> Plan:
    places = {key: place for place, key in enumerate(dict.fromkeys(everywhere) or [(ALL, 1.0)])}
    groups = {label: number for number, label in enumerate(dict.fromkeys(label for label, _ in places))}
    return Plan(
        domain=domain,
        names=names,
        places=tuple(places[key] for key in own),
        shares=tuple(count / domain.num_ranks if isinstance(count, float) else 0.0 for _, count in places),
        groups=tuple(groups),
        group_of_place=tuple(groups[label] for label, _ in places),
    )
