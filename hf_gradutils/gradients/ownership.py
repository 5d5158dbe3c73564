"""The part of each parameter that a rank holds, by DTensors, FSDP1, marks of other libraries, or the user."""

import fnmatch
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

from hf_gradutils.errors import InvalidArgumentError

Ownership: TypeAlias = Mapping[str, Literal["sharded", "replicated"] | ProcessGroup]
"""Name pattern (:mod:`fnmatch`) of plain parameters → their owners; the last pattern that matches counts.

``"sharded"``: each rank holds a part of its own. A group: its ranks hold different parts, other such groups copies of
them (replicated experts). Without a pattern, ``parameter.allreduce = False``, the mark of Megatron and DeepSpeed on
experts, means "sharded", and FSDP1's flat parameters are found.
"""

ShardKey: TypeAlias = tuple[tuple[str, int, int], ...]
"""The part of a parameter that a rank holds: (placement, mesh size, coordinate) of each mesh dim that splits it."""


def check_ownership(ownership: Ownership) -> Ownership:
    """Return ``ownership``. InvalidArgumentError for an invalid value."""
    for pattern, kind in ownership.items():
        if not (isinstance(kind, ProcessGroup) or kind in ("sharded", "replicated")):
            raise InvalidArgumentError(
                f"ownership[{pattern!r}] must be 'sharded', 'replicated' or a process group, got {kind!r}"
            )
    return ownership


def shard_key(parameter: Tensor) -> ShardKey | None:
    """The part that this rank holds: () for all of it, None for nothing (a rank outside the mesh)."""
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


def declared_shards(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], ownership: Ownership
) -> dict[str, ShardKey]:
    """Name → the part that this rank holds, for plain parameters that are parts without placements."""
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
