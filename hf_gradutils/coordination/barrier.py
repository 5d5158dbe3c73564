"""Wait for all ranks on the store, without a time limit."""

import logging
from datetime import datetime

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.store import open_channel
from hf_gradutils.coordination.waiting import OK, Duty, WaitOptions, await_verdict
from hf_gradutils.errors import GradUtilsError

logger = logging.getLogger("hf_gradutils.dist_utils")  # where the documentation says that it logs

POLL_S = 0.1
"""Longest pause between two polls."""


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
    rank, world_size = channel.ranks.global_rank, channel.ranks.world_size
    fields = {"name": name, "count": channel.next_count(f"barrier/{name}")}
    end_key = keys.BARRIER_END.format(**fields)
    arrived_keys = [keys.BARRIER_ARRIVED.format(rank=other, **fields) for other in range(world_size)]
    neighbours = {(rank - 1) % world_size, (rank + 1) % world_size}
    duties = [Duty(other, arrived_keys[other], "came here") for other in neighbours]
    try:
        channel.write(arrived_keys[rank], "here")
        if channel.add(keys.BARRIER_NUM_ARRIVED.format(**fields), 1) == world_size:
            channel.claim(end_key, OK)
        end = await_verdict(
            channel,
            end_key,
            lambda: duties,
            lambda: _describe_wait(channel, name, arrived_keys),
            WaitOptions(poll_s=POLL_S, log_every_s=log_every_s),
        )
    except RuntimeError as lost:
        raise GradUtilsError(f"rank {rank} waits for all at {name} and lost {channel.origin}: {lost}") from lost
    if end != OK:
        raise GradUtilsError(f"not every rank came to {name}: {end}")
    return rank


def _describe_wait(channel: Channel, name: str, arrived_keys: list[str]) -> str:
    missing = [rank for rank, key in enumerate(arrived_keys) if channel.read(key) is None]
    shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
    return f"rank {channel.ranks.global_rank} waits at {name} for {len(missing)} of {len(arrived_keys)} ranks: {shown}"
