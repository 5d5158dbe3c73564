"""Check that parameters that should be copies of each other are."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hf_gradutils.errors import ReplicaMismatchError
from hf_gradutils.gradients.power_sums import power_sums
from hf_gradutils.upstream.dtensor import local_tensor

ShardKey: TypeAlias = tuple[tuple[str, int, int], ...]
"""Which part of a parameter a rank holds: (placement, mesh size, coordinate) of each dim that splits it."""


_REPLICA_TOLERANCE = 1e-4
"""Relative difference of checksums that replicas may show; theirs are equal bit for bit unless they drift."""


_Record: TypeAlias = dict[str, tuple[ShardKey, bool, tuple[float, float]]]
"""Name → (what this rank holds, whether it is a plain tensor, checksum)."""


def _checksums(parameters: Iterable[Tensor]) -> list[tuple[float, float]]:
    """(Σ|x|, Σx) of every local part."""
    local = [local_tensor(parameter.detach()) for parameter in parameters]
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(local):
        by_device.setdefault(tensor.device, []).append(index)
    result = [(0.0, 0.0)] * len(local)
    for indices in by_device.values():
        absolute = power_sums([local[i] for i in indices], 1.0).tolist()
        signed = torch.stack([local[i].sum(dtype=torch.float64) for i in indices]).tolist()
        for index, pair in zip(indices, zip(absolute, signed, strict=True), strict=True):
            result[index] = pair
    return result


def _check_replicas(records: Sequence[_Record], ranks: Sequence[int]) -> None:
    """Raise when ranks that claim to hold the same part of a parameter hold different values."""
    first_seen: dict[tuple[str, ShardKey], tuple[int, tuple[float, float]]] = {}
    kinds: dict[str, tuple[int, bool]] = {}
    for rank, (name, (key, is_plain, checksum)) in itertools.chain.from_iterable(
        ((rank, item) for item in record.items()) for rank, record in zip(ranks, records, strict=True)
    ):
        kind_rank, kind = kinds.setdefault(name, (rank, is_plain))
        if kind != is_plain:
            raise ReplicaMismatchError(
                f"parameter {name!r} is a {'plain tensor' if kind else 'DTensor'} on rank {kind_rank} and a "
                f"{'plain tensor' if is_plain else 'DTensor'} on rank {rank}; shard it on all ranks or on none"
            )
        reference_rank, reference = first_seen.setdefault((name, key), (rank, checksum))
        scale = max(abs(reference[0]), abs(checksum[0]))
        for left, right in zip(reference, checksum, strict=True):
            if abs(left - right) > _REPLICA_TOLERANCE * scale or math.isnan(left) != math.isnan(right):
                raise ReplicaMismatchError(
                    f"parameter {name!r} should be the same on ranks {reference_rank} and {rank}, but its sum is "
                    f"{reference[1]:.6g} there and {checksum[1]:.6g} here; if each rank holds a part of its own "
                    f"(experts), pass ownership={{{name!r}: 'sharded'}}, else broadcast it from one rank"
                )
