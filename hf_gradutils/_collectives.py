"""The ranks of a sum, and the packed collectives that reduce over them."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hf_gradutils._devices import on_device
from hf_gradutils.errors import InvalidArgumentError

T = TypeVar("T")

_CPU = torch.device("cpu")
_LARGEST_HEADER = 512
_NOT_ALIKE = (
    "rows of micro-batches or ranks must be alike but for their number: as many tensors, of the same dtypes, whose "
    "shapes differ in the first dimension only; pad the other dimensions to a fixed size"
)


@dataclass(frozen=True, slots=True)
class Domain:
    """Ranks that a sum runs over: a grid, whose axes are ``groups``.

    Summing over each group in turn adds every rank once. Without groups the domain is this rank alone.
    """

    groups: tuple[ProcessGroup, ...]
    num_ranks: int

    @property
    def ranks(self) -> frozenset[tuple[int, ...]]:
        """The axes as global ranks, which compare across processes."""
        return frozenset(tuple(dist.get_process_group_ranks(group)) for group in self.groups)


ALONE = Domain(groups=(), num_ranks=1)


def world_domain(group: ProcessGroup | None = None) -> Domain:
    """All ranks of ``group``; of the default group when None; this rank alone without a process group."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        group = dist.group.WORLD
    if group is None or dist.get_world_size(group) == 1:
        return ALONE
    return Domain(groups=(group,), num_ranks=dist.get_world_size(group))


def domain_of(groups: Sequence[ProcessGroup | None]) -> Domain:
    """The grid that the groups span; None, groups of one rank, and groups inside others are ignored.

    If the grid covers every rank, the default group replaces all axes, which makes one collective of several.

    Raises:
        InvalidArgumentError: two groups share some ranks besides this one, but not all: no sum counts each rank once.
    """
    axes: dict[frozenset[int], ProcessGroup] = {}
    for group in groups:
        if group is not None and dist.get_world_size(group) > 1:
            axes.setdefault(frozenset(dist.get_process_group_ranks(group)), group)
    largest = [ranks for ranks in axes if not any(ranks < other for other in axes)]
    for i, ranks in enumerate(largest):
        for other in largest[:i]:
            if len(ranks & other) > 1:
                raise InvalidArgumentError(
                    f"groups must meet in one rank or contain one another, got ranks {sorted(ranks)} and "
                    f"{sorted(other)}; pass one group that covers both"
                )
    num_ranks = math.prod(len(ranks) for ranks in largest)
    if len(largest) > 1 and num_ranks == dist.get_world_size():
        return world_domain()
    return Domain(groups=tuple(axes[ranks] for ranks in largest), num_ranks=num_ranks)


@torch.no_grad()
def all_reduce_(domain: Domain, sums: Tensor) -> Tensor:
    """Add ``sums`` over the domain, in place; returns it.

    Args:
        domain: Every rank of it must call, with vectors of the same length.
        sums: Shape (n,), float64.

    Collectives: one all-reduce per axis of the domain. Host syncs: none; one if ``sums`` is on the CPU and the group
    cannot carry it from there.
    """
    if domain.groups:
        carried = on_device(sums, _device_for(domain.groups[0], sums.device))
        for group in domain.groups:
            dist.all_reduce(carried, group=group)
        if carried is not sums:
            sums.copy_(carried)
    return sums


@torch.no_grad()
def start_all_reduce(domain: Domain, sums: Tensor) -> Callable[[], Tensor]:
    """Begin :func:`all_reduce_`; returns a function that waits for the sums, on the device's stream where it has one.

    Collectives: one all-reduce per axis of the domain. Host syncs: as :func:`all_reduce_`.
    """
    if len(domain.groups) != 1:
        reduced = all_reduce_(domain, sums)
        return lambda: reduced
    carried = on_device(sums, _device_for(domain.groups[0], sums.device))
    work = dist.all_reduce(carried, group=domain.groups[0], async_op=True)

    def wait() -> Tensor:
        assert work is not None
        work.wait()
        return on_device(carried, sums.device)

    return wait


@torch.no_grad()
def gather_extremes(domain: Domain, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``sums`` and take the largest of ``maxima`` over the domain.

    A sum and a maximum do not fit one all-reduce, and MAX reductions drop NaN.

    Args:
        domain: Every rank of it must call, with vectors of the same lengths.
        sums: Shape (n,), float64. Left unchanged.
        maxima: Shape (m,), float64. NaN on one rank gives NaN on all.

    Returns:
        Both vectors, reduced, on the device of ``sums``.

    Collectives: one all-gather per axis of the domain. Host syncs: as :func:`all_reduce_`.
    """
    if not domain.groups:
        return sums.clone(), maxima.clone()
    num_sums = sums.numel()
    packed = on_device(torch.cat((sums, maxima)), _device_for(domain.groups[0], sums.device))
    for group in domain.groups:
        rows = packed.new_empty(dist.get_world_size(group), packed.numel())
        dist.all_gather(list(rows.unbind(0)), packed, group=group)
        packed = torch.cat((rows[:, :num_sums].sum(0), rows[:, num_sums:].amax(0)))
    packed = on_device(packed, sums.device)
    return packed[:num_sums], packed[num_sums:]


def add_up(domain: Domain, device: torch.device = _CPU, **numbers: float) -> dict[str, float]:
    """The sum of each number over the domain, by name.

    Args:
        domain: Every rank of it must call, with the same names.
        device: Of the collective.
        **numbers: Of this rank.

    Collectives: one all-reduce per axis of the domain. Host syncs: one.
    """
    own = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    return dict(zip(numbers, all_reduce_(domain, own).tolist(), strict=True))


def find_largest(domain: Domain, device: torch.device = _CPU, **numbers: float) -> dict[str, float]:
    """The largest of each number over the domain, by name; arguments as :func:`add_up`.

    Collectives: one all-gather per axis of the domain. Host syncs: one.
    """
    own = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    return dict(zip(numbers, gather_extremes(domain, own[:0], own)[1].tolist(), strict=True))


def gather_objects(domain: Domain, own: T) -> list[T]:
    """The object of every rank of the domain's first axis, in order. One object gather; every rank must call."""
    if not domain.groups:
        return [own]
    records: list[Any] = [None] * dist.get_world_size(domain.groups[0])
    dist.all_gather_object(records, own, group=domain.groups[0])
    return records


def gather_tensors(domain: Domain, own: Sequence[Tensor], *, is_valid: bool = True) -> list[list[Tensor]]:
    """The tensors of every rank of the domain's first axis, in order.

    Args:
        domain: Every rank of it must call.
        own: Of this rank, at most 500, one dimension or more, on one device.
        is_valid: False lets all ranks raise.

    Collectives: two all-gathers, one of them of a few numbers. Host syncs: one.

    Raises:
        InvalidArgumentError: on all ranks, if they have other numbers, dtypes or shapes beside the first dimension.
    """
    if not domain.groups:
        if not is_valid:
            raise InvalidArgumentError(_NOT_ALIKE)
        return [list(own)]
    group, device = domain.groups[0], own[0].device
    carrier = _device_for(group, device)
    form = zlib.crc32(repr([(tensor.dtype, tuple(tensor.shape[1:])) for tensor in own]).encode())
    header = [form if is_valid else -1, *(len(tensor) for tensor in own)]
    sizes = torch.tensor(header + [0] * (_LARGEST_HEADER - len(header)), device=carrier)
    of_ranks = [torch.empty_like(sizes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, sizes, group=group)
    headers: list[list[int]] = torch.stack(of_ranks).tolist()
    if any(header[0] != form for header in headers):
        raise InvalidArgumentError(_NOT_ALIKE)
    lengths = [header[1 : 1 + len(own)] for header in headers]

    bytes_of = [tensor.element_size() * math.prod(tensor.shape[1:]) for tensor in own]
    num_bytes = [sum(a * b for a, b in zip(rows, bytes_of, strict=True)) for rows in lengths]
    packed = torch.zeros(max(num_bytes), dtype=torch.uint8, device=device)  # of any dtype, in one collective
    flat = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in own])
    packed[: flat.numel()] = flat
    packed = packed.to(carrier)
    records = [torch.empty_like(packed) for _ in lengths]
    dist.all_gather(records, packed, group=group)

    def unpacked(record: Tensor, rows: list[int]) -> list[Tensor]:
        sizes = [a * b for a, b in zip(rows, bytes_of, strict=True)]
        parts = torch.split(record.to(device)[: sum(sizes)], sizes)
        # A copy: a view of another dtype must begin at a multiple of its size.
        return [
            part.clone().view(tensor.dtype).reshape(length, *tensor.shape[1:])
            for part, tensor, length in zip(parts, own, rows, strict=True)
        ]

    return [unpacked(record, rows) for record, rows in zip(records, lengths, strict=True)]


def _device_for(group: ProcessGroup, device: torch.device) -> torch.device:
    """The device from which a vector on ``device`` is reduced.

    It is of the same kind on every rank, also if gradients are offloaded or missing: a group may have a backend for
    each kind, and one backend cannot reduce with another.
    """
    backends = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(",") if ":" in entry)
    is_one = len(set(backends.values())) == 1
    if not backends or (is_one and device.type in backends):
        return device
    accelerator = next((kind for kind in backends if kind != "cpu"), None)
    if accelerator is None:
        return torch.device("cpu")
    if device.type == accelerator:
        return device
    return torch.device(accelerator, torch.accelerator.current_device_index())
