"""Sums of |x|^p over local tensors, exact whatever their dtype.

Everything is accumulated in float64: squares of 1e25 do not fit float32, a bf16 result keeps 8 bits, and a
float32 sum over a large tensor on CPU is off by up to 3 %.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradutils._devices import common_kind, on_device
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.torch import flatten, foreach_norm

_CPU_CHUNK = 65_536
"""Elements widened to float64 at a time on CPU: a chunk stays in the cache; a whole tensor would be copied to memory (7
times slower at 16M elements). CUDA kernels widen in registers and need no chunks."""


_GATHERED = 1_048_576
_SMALL = 512
"""Largest total and average number of elements for which Euclidean norms on CPU are taken of one copy of all tensors,
which stays in a cache: a call for each takes three times as long at 128 elements, and half as long at 5,000."""


def check_norm_type(norm_type: float) -> float:
    """Return ``norm_type`` as a float. InvalidArgumentError unless it is > 0 (``inf`` is)."""
    p = float(norm_type)
    if not p > 0:
        raise InvalidArgumentError(f"norm_type must be > 0 (2 is Euclidean, inf the maximum), got {norm_type}")
    return p


@torch.no_grad()
def power_sums(
    tensors: Sequence[Tensor], norm_type: float, *, foreach: bool = True, sizes: Sequence[int] | None = None
) -> Tensor:
    """Σ |x|^p of every tensor; for p = inf, max |x|.

    Args:
        tensors: Local floating-point tensors of any shape and dtype on one device; empty ones give 0. Each
            is read once.
        norm_type: p, greater than 0.
        foreach: One multi-tensor call per dtype; False makes one call per tensor.
        sizes: Elements of each tensor, if known.

    Returns:
        Shape ``(len(tensors),)``, float64, on the tensors' device (CPU if there are none). NaN stays NaN and
        inf stays inf. Finite as long as |x|^p fits float64: for p = 2 up to 1e154.

    Collectives: none. Host syncs: none.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    sizes = tuple(map(Tensor.numel, tensors) if sizes is None else sizes)
    if foreach and norm_type == 2.0 and tensors[0].is_cpu and sum(sizes) <= min(_GATHERED, _SMALL * len(sizes)):
        squares = torch.float_power(flatten(tensors), 2.0)  # in float64
        return torch.segment_reduce(squares, "sum", lengths=_lengths(sizes), unsafe=True)
    pieces, owners = _pieces(tensors, sizes)
    if not pieces:
        return torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].device)
    if foreach:
        norms = _foreach_norms(pieces, norm_type)
    else:
        norms = [torch.linalg.vector_norm(piece, norm_type, dtype=torch.float64) for piece in pieces]
    values = torch.stack(norms)
    if not math.isinf(norm_type):
        values = values.pow(norm_type)
    if len(pieces) == len(tensors):
        return values
    result = torch.zeros(len(tensors), dtype=torch.float64, device=values.device)
    index = on_device(torch.tensor(owners), values.device)
    return (
        result.scatter_reduce_(0, index, values, "amax")
        if math.isinf(norm_type)
        else result.index_add_(0, index, values)
    )


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as real numbers, with the same 2-norm; a real one as it is."""
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def root(power_sum: Tensor, norm_type: float) -> Tensor:
    """The norm that belongs to a sum of p-th powers (to a maximum, for p = inf)."""
    return power_sum if math.isinf(norm_type) else power_sum.pow(1.0 / norm_type)


def _foreach_norms(tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """The norm of each; one call per dtype, because CUDA's multi-tensor kernel takes one dtype."""
    if tensors[0].is_cpu or common_kind(tensors).dtype is not None:
        return foreach_norm(tensors, norm_type, torch.float64)
    positions: dict[torch.dtype, list[int]] = {}
    for position, tensor in enumerate(tensors):
        positions.setdefault(tensor.dtype, []).append(position)
    norms = {
        position: norm
        for alike in positions.values()
        for position, norm in zip(
            alike, foreach_norm([tensors[i] for i in alike], norm_type, torch.float64), strict=True
        )
    }
    return [norms[position] for position in range(len(tensors))]


@functools.lru_cache(maxsize=8)
def _lengths(sizes: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode that its first user may be in
        return torch.tensor(sizes)


def _pieces(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """The tensors cut for :data:`_CPU_CHUNK`, without empty ones, and the index of the tensor each came from."""
    if min(sizes) and (max(sizes) <= _CPU_CHUNK or tensors[0].device.type != "cpu"):
        return list(tensors), list(range(len(tensors)))
    pieces: list[Tensor] = []
    owners: list[int] = []
    for index, (tensor, num_elements) in enumerate(zip(tensors, sizes, strict=True)):
        if num_elements == 0:
            continue
        if tensor.device.type == "cpu" and num_elements > _CPU_CHUNK:
            chunks = tensor.reshape(-1).split(_CPU_CHUNK)  # type: ignore[no-untyped-call]
            pieces.extend(chunks)
            owners.extend([index] * len(chunks))
        else:
            pieces.append(tensor)
            owners.append(index)
    return pieces, owners
