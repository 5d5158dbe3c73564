"""The plan that counts every gradient element of the model once, however many ranks hold it.

A rank counts an element with weight 1 / (number of ranks that hold it). Summed over ranks, each shard counts once, and
replicas count once together, on any mesh and beside plain tensors.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_gradutils._collectives import Domain, gather_objects
from hf_gradutils.gradients.names import ALL, NormGroups, group_name
from hf_gradutils.gradients.ownership import Ownership, declared_shards, shard_key
from hf_gradutils.gradients.replicas import Held, check_replicas, checksums


@dataclass(frozen=True, slots=True)
class Plan:
    """The slots in which this rank counts its parameters.

    A *slot* sums gradients that are counted equally often and reported together. Ranks add Σ |g|^p to it, and
    separately how often it is counted; the ratio counts every element once. Shards of a norm group that equally many
    ranks hold share a slot; a plain parameter with copies on other ranks has its own, because the number of copies with
    a gradient changes from step to step.
    """

    domain: Domain
    names: tuple[str, ...]
    """Empty where parameters have none."""
    slots: tuple[int, ...]
    """Slot of each parameter, in their order."""
    weights: tuple[float, ...]
    """This rank's share of each slot's count, with or without gradients; 0 for replicas."""
    groups: tuple[str, ...]
    """Norm groups, the same on all ranks."""
    group_of_slot: tuple[int, ...]

    def is_replica(self, parameter: int) -> bool:
        """True for a plain parameter with copies on other ranks."""
        return not self.weights[self.slots[parameter]]


def plan_by_name(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    domain: Domain,
    ownership: Ownership,
    norm_groups: NormGroups = None,
) -> Plan:
    """Plan by name: ranks exchange which part of which parameter they hold.

    Args:
        model: Names the parameters.
        parameters: Some of the model's, in its order.
        domain: All ranks that train the model.
        ownership: Declares plain parameters that are shards without placements (experts).
        norm_groups: Groups whose norms are reported beside the total; None is one group of all.

    Collectives: one object gather over the domain. Host syncs: two per device, for the checksums of parameters.

    Raises:
        ReplicaMismatchError: replicas hold different values, or a parameter is a DTensor on some ranks and a plain
            tensor on others.
    """
    ids = {id(p) for p in parameters}
    named = {name: p for name, p in model.named_parameters() if id(p) in ids}
    declared = declared_shards(model, named, ownership)
    sums = checksums(named.values()) if domain.groups else [(0.0, 0.0)] * len(named)
    held: dict[str, Held] = {}  # without parameters on meshes that this rank is not in
    for (name, parameter), checksum in zip(named.items(), sums, strict=True):
        key = declared.get(name, shard_key(parameter))
        if key is not None:
            held[name] = Held(key, not isinstance(parameter, DTensor), checksum)
    every = gather_objects(domain, held)
    if domain.groups:
        check_replicas(every, dist.get_process_group_ranks(domain.groups[0]))
    num_holders = Counter((name, part.key) for rank in every for name, part in rank.items())

    def slot_key(name: str, part: Held) -> _SlotKey:
        holders = num_holders[name, part.key]
        is_replica = part.is_plain and not part.key and holders > 1
        return group_name(name, norm_groups), name if is_replica else float(holders)

    everywhere = [slot_key(name, part) for rank in every for name, part in rank.items()]
    outside = (ALL, 1.0)  # for a parameter on a mesh without this rank; its local part is empty
    own = [slot_key(name, held[name]) if name in held else outside for name in named]
    return _plan(domain, tuple(named), own, everywhere if len(held) == len(own) else [*everywhere, outside])


def plan_by_count(parameters: Sequence[Tensor], domain: Domain, num_plain_shards: int) -> Plan:
    """Plan parameters without names by counting alone.

    Plain tensors are split into ``num_plain_shards`` parts over the domain, 1 for replicas. A DTensor's mesh lies in
    the domain, whose further ranks hold copies of the whole. Collectives: none.
    """
    keys: list[_SlotKey] = []
    for index, parameter in enumerate(parameters):
        is_plain = not isinstance(parameter, DTensor)
        parts = num_plain_shards if is_plain else math.prod(size for _, size, _ in shard_key(parameter) or ())
        is_replica = is_plain and parts == 1 and domain.num_ranks > 1
        keys.append((ALL, f"number {index}") if is_replica else (ALL, domain.num_ranks / parts))
    return _plan(domain, (), keys, keys)


_SlotKey: TypeAlias = tuple[str, float | str]
"""Norm group, and the number of ranks that count the slot or the name of its replica."""


def _plan(domain: Domain, names: tuple[str, ...], own: Sequence[_SlotKey], everywhere: Sequence[_SlotKey]) -> Plan:
    slots = {key: slot for slot, key in enumerate(dict.fromkeys(everywhere) or [(ALL, 1.0)])}
    groups = {label: number for number, label in enumerate(dict.fromkeys(label for label, _ in slots))}
    return Plan(
        domain=domain,
        names=names,
        slots=tuple(slots[key] for key in own),
        weights=tuple(count / domain.num_ranks if isinstance(count, float) else 0.0 for _, count in slots),
        groups=tuple(groups),
        group_of_slot=tuple(groups[label] for label, _ in slots),
    )
