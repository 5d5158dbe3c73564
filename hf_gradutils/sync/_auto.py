"""``sync="auto"``: communicate once per window if memory allows it, else shard gradients at once.

Deferring keeps whole gradients between micro-batches, also when activations peak. Two windows communicate in every
micro-batch; in the second, activations stand beside the optimizer's state, the peak is known, and

    defer  if  (whole gradients - their shards) ≤ MAX_SHARE · (free + reserved - peak)      on every rank
"""

import logging
import os
import weakref
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

from hf_gradutils._collectives import find_largest, world_domain
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.sync._context import SyncPolicy
from hf_gradutils.upstream.fsdp import fsdp2_adds_shards_by_position, fsdp2_deferred_bytes

logger = logging.getLogger("hf_gradutils.sync_auto")

Sync: TypeAlias = SyncPolicy | Literal["auto"]
SYNCS: tuple[Sync, ...] = ("defer", "every", "reduce_scatter", "auto")


def check_sync(sync: object) -> None:
    """Raise InvalidArgumentError for anything but a policy, ``"auto"`` or None."""
    if sync is not None and sync not in SYNCS:
        raise InvalidArgumentError(f"sync must be one of {', '.join(SYNCS)}, got {sync!r}")


MAX_SHARE = 0.5
"""Share of the free memory that deferred gradients may take: later batches can be longer."""

_WINDOWS_SEEN = 2
"""Windows before the decision."""


class PolicyChoice:
    """The policy of each trained model; ``auto`` is decided once per model, the same on all ranks."""

    def __init__(self, sync: Sync, device: torch.device):
        self._sync = sync
        self._device = device
        self._num_closed = 0
        self._decided: weakref.WeakKeyDictionary[nn.Module, SyncPolicy] = weakref.WeakKeyDictionary()
        self._sparing: weakref.WeakKeyDictionary[nn.Module, SyncPolicy] = weakref.WeakKeyDictionary()

    def window_closed(self) -> None:
        """Count a window."""
        self._num_closed += 1

    def policy(self, model: nn.Module, *, is_last: bool) -> SyncPolicy:
        """The policy for a micro-batch of ``model``.

        Collectives: under ``auto``, one all-gather over all ranks, in the first micro-batch after the second optimizer
            step that does not end its window.
        """
        if self._sync != "auto":
            return self._sync
        if model not in self._decided and self._num_closed >= _WINDOWS_SEEN and not is_last:
            self._decided[model] = decide(deferred_bytes(model), free_bytes(self._device), self._device)
        if model not in self._sparing:
            self._sparing[model] = sparing_policy(model)
        return "defer" if self._decided.get(model) == "defer" else self._sparing[model]


def sparing_policy(model: nn.Module) -> SyncPolicy:
    """The policy that needs least memory and is right for any model.

    Under HSDP before torch 2.15 ``reduce_scatter`` needs every parameter in every micro-batch, and rare branches or
    vision towers are not: there replicas are averaged in every micro-batch too.
    """
    sharded = (p for p in model.parameters() if isinstance(p, DTensor))
    has_replicas = any(placement.is_replicate() for p in sharded for placement in p.placements)
    return "every" if has_replicas and fsdp2_adds_shards_by_position() else "reduce_scatter"


def decide(needed: int, free: float, device: torch.device) -> SyncPolicy:
    """``defer`` if every rank has the memory, else ``reduce_scatter``; logged by rank 0.

    ``needed`` and ``free`` are bytes on this rank. Collectives: one all-gather over all ranks. Host syncs: one.
    """
    lacking = needed - MAX_SHARE * free
    largest = find_largest(world_domain(), device, lacking=lacking, needed=needed, minus_free=-free)
    policy: SyncPolicy = "defer" if largest["lacking"] <= 0 else "reduce_scatter"
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info(
            "sync='auto' chose %r: deferring takes up to %s more per rank, and the rank with the least memory has %s "
            "free, of which it may take %.0f %%",
            policy,
            _in_gib(largest["needed"]),
            _in_gib(-largest["minus_free"]),
            100 * MAX_SHARE,
        )
    return policy


def deferred_bytes(model: nn.Module) -> int:
    """Bytes of gradients that only deferring keeps on this rank.

    Σ over trained FSDP parameters of (whole gradient - this rank's shard); replicated gradients are whole anyway.
    """
    num_bytes = fsdp2_deferred_bytes(model)
    inside_fsdp1: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy is not ShardingStrategy.NO_SHARD:
            num_other_shards = dist.get_world_size(module.process_group) - 1
            shards = [p for p in module.parameters() if p.requires_grad and p not in inside_fsdp1]
            inside_fsdp1.update(shards)
            num_bytes += num_other_shards * sum(p.numel() * p.itemsize for p in shards)
    return num_bytes


def free_bytes(device: torch.device) -> float:
    """Bytes free at the peak so far; 0 if unknown.

    On an accelerator: left by the driver, and reserved by PyTorch but unused. On CPU: the free pages, divided by the
    number of ranks, which may share a machine.
    """
    if device.type == "cpu":
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / num_ranks
        except (ValueError, AttributeError):  # macOS and Windows have no such number
            return 0.0
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.max_memory_allocated(device)


def _in_gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
