"""Wait for all ranks, on the store: as interruptible and as patient as :mod:`hf_gradutils.first_rank`."""

import logging
from datetime import datetime

from hf_gradutils.coordination.channel import Channel, poll
from hf_gradutils.coordination.store import open_channel
from hf_gradutils.errors import GradUtilsError

logger = logging.getLogger("hf_gradutils.dist_utils")  # where the documentation says that it logs

POLL_S = 0.1
"""Longest pause between two looks."""


def barrier_and_log(string: str) -> None:
    """Wait until every rank is here, then log one line with the time, on global rank 0 only.

    Works with a process group, without one (the ranks that a launcher started), and on a single process.

    Args:
        string: The message, logged at INFO as ``[2026-11-21T09:30:00] message``.

    Collectives: none on a process group; every rank must call. Work queued on GPUs is not waited for.

    Raises:
        GradUtilsError: a rank ended without coming here.
        LauncherError: several ranks have no way to talk to each other.
    """
    if wait_for_all("barrier_and_log") == 0:
        logger.info("[%s] %s", datetime.now().isoformat(timespec="seconds"), string)


def wait_for_all(name: str, *, log_every_s: float = 60.0) -> int:
    """Wait until every rank has called this with the same name as often as this rank; its global rank.

    No time limit; a signal ends the wait at once. Each rank watches the two next to it: a rank that was
    killed is noticed by its neighbours on the node, one that ended by itself by any neighbour. Who is missing
    is logged as a warning every ``log_every_s`` seconds.

    Collectives: none; every rank must call.

    Raises:
        GradUtilsError: a rank ended without coming here.
        LauncherError: several ranks have no way to talk to each other.
    """
    channel = open_channel(log_every_s=log_every_s)
    if channel is None:
        return 0
    rank = channel.ranks.global_rank
    key = f"barrier/{name}/{channel.next_count(f'barrier/{name}')}"
    try:
        channel.write(f"{key}/{rank}", "here")
        if channel.add(f"{key}/num_arrived", 1) == channel.ranks.world_size:
            channel.claim(f"{key}/end", "complete")
        end = poll(
            lambda: _look(channel, key),
            lambda: _describe(channel, name, key),
            poll_s=POLL_S,
            log_every_s=log_every_s,
        )
    except RuntimeError as lost:
        raise GradUtilsError(f"rank {rank} waits for all at {name} and lost {channel.origin}: {lost}") from lost
    if end != "complete":
        raise GradUtilsError(f"not every rank came to {name}: {end}")
    return rank


def _look(channel: Channel, key: str) -> str | None:
    """How the wait ended, None while it has not."""
    end = channel.read(f"{key}/end")
    if end is not None:
        return end
    rank, world_size = channel.ranks.global_rank, channel.ranks.world_size
    for other in {(rank - 1) % world_size, (rank + 1) % world_size}:
        # Two looks at the arrival: it may have come, and left, in between.
        if channel.read(f"{key}/{other}") is None and channel.has_left(other) and not channel.read(f"{key}/{other}"):
            return channel.claim(f"{key}/end", f"rank {other} on {channel.process_of(other)} has ended")
    return None


def _describe(channel: Channel, name: str, key: str) -> str:
    world_size = channel.ranks.world_size
    missing = [rank for rank in range(world_size) if channel.read(f"{key}/{rank}") is None]
    shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
    return f"rank {channel.ranks.global_rank} waits at {name} for {len(missing)} of {world_size} ranks: {shown}"
