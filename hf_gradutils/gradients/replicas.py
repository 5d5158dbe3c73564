"""Check that replicas of a parameter hold the same values."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradutils.errors import ReplicaMismatchError
from hf_gradutils.gradients.ownership import ShardKey
from hf_gradutils.gradients.power_sums import as_real, power_sums
from hf_gradutils.upstream.dtensor import local_tensor

_TOLERANCE = 1e-4
"""Largest relative difference of replicas' checksums; these are equal bit for bit unless replicas drift."""


class Held(NamedTuple):
    """A rank's part of one parameter."""

    key: ShardKey
    is_plain: bool
    """Not a DTensor."""
    checksum: tuple[float, float]
    """(Σ|x|, Σx)."""


def checksums(parameters: Iterable[Tensor]) -> list[tuple[float, float]]:
    """(Σ|x|, Σx) of every local part. Host syncs: two per device."""
    local = [as_real(local_tensor(parameter.detach())) for parameter in parameters]
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


def check_replicas(held: Sequence[Mapping[str, Held]], ranks: Sequence[int]) -> None:
    """Raise ReplicaMismatchError if ranks hold different values of one part, or a DTensor and a plain tensor.

    Args:
        held: For each rank, parameter name → its part.
        ranks: Their global ranks.
    """
    first_of_part: dict[tuple[str, ShardKey], tuple[int, tuple[float, float]]] = {}
    first_of_name: dict[str, tuple[int, bool]] = {}
    parts = [(rank, name, part) for rank, record in zip(ranks, held, strict=True) for name, part in record.items()]
    for rank, name, part in parts:
        other, is_plain = first_of_name.setdefault(name, (rank, part.is_plain))
        if is_plain != part.is_plain:
            raise ReplicaMismatchError(
                f"parameter {name!r} is a {_kind(is_plain)} on rank {other} and a {_kind(part.is_plain)} on rank "
                f"{rank}; shard it on all ranks or on none"
            )
        other, reference = first_of_part.setdefault((name, part.key), (rank, part.checksum))
        scale = max(abs(reference[0]), abs(part.checksum[0]))
        for left, right in zip(reference, part.checksum, strict=True):
            if abs(left - right) > _TOLERANCE * scale or math.isnan(left) != math.isnan(right):
                raise ReplicaMismatchError(
                    f"parameter {name!r} should be the same on ranks {other} and {rank}, but its sum is "
                    f"{reference[1]:.6g} there and {part.checksum[1]:.6g} here; if each rank holds a part of its own "
                    f"(experts), pass ownership={{{name!r}: 'sharded'}}, else broadcast it from one rank"
                )


def _kind(is_plain: bool) -> str:
    return "plain tensor" if is_plain else "DTensor"
