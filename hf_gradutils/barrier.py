"""Wait for all ranks and say so once."""

import logging
from datetime import datetime

import torch.distributed as dist

from hf_gradutils.channel import Channel, poll
from hf_gradutils.store import open_channel
from hf_gradutils.topology import current_ranks

logger = logging.getLogger("hf_gradutils.dist_utils")  # where the documentation says that it logs


def barrier_and_log(string: str) -> None:
    """Wait until every rank is here, then log one line with the time, on global rank 0 only.

    Works without a process group: the ranks that a launcher started meet on the store.

    Args:
        string: The message, logged at INFO as ``[2026-11-21T09:30:00] message``.

    Collectives: one barrier over the default group, if there is one; every rank must call.

    Raises:
        LauncherError: several ranks have no way to talk to each other.
    """
    if dist.is_initialized():
        dist.barrier()
    elif (channel := open_channel()) is not None:
        _wait_for_all(channel)
    if current_ranks().global_rank == 0:
        logger.info("[%s] %s", datetime.now().isoformat(timespec="seconds"), string)


def _wait_for_all(channel: Channel) -> None:
    key = f"barrier/{channel.next_count('barrier')}"
    world_size = channel.ranks.world_size
    channel.add(key, 1)
    poll(
        lambda: True if int(channel.read(key) or 0) >= world_size else None,
        lambda: f"rank {channel.ranks.global_rank} waits for all {world_size} ranks, {channel.read(key)} have come",
    )
