"""The channel on which ranks exchange small values: keys of a c10d store, and nothing else.

No process group, no GPU memory, no files, and no thread that stays. One channel is chosen per process and kept:

1. the store of the launcher's agent (torchrun): works before and after ``init_process_group`` and outlives
   the ranks;
2. else the store of the default process group;
3. else one that global rank 0 hosts at MASTER_ADDR:MASTER_PORT. A later ``init_process_group("env://")``
   in that process shares the server, so both uses of the port get along.

The first and the last are one address, and so is the second when the group was made from the environment:
ranks that choose before and after ``init_process_group`` see the same keys.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing.util import Finalize

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # documented there

from hf_gradutils import _environment
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.job import check_store, claim_store
from hf_gradutils.coordination.ranks import Ranks, current_ranks
from hf_gradutils.coordination.tcp_store import CONNECT_TIMEOUT_S, connect, host, tcp_store_beneath
from hf_gradutils.coordination.waiting import WaitOptions
from hf_gradutils.errors import LauncherError
from hf_gradutils.upstream.torch import default_store

logger = logging.getLogger("hf_gradutils.store")

LEAVE_GRACE_S = 10.0
"""Seconds that rank 0 stays at its end for ranks that have not read everything yet."""

SILENT_GRACE_S = 1.0
"""Seconds of that after which rank 0 says for whom it stays, if those ranks have never come."""

_served_port: int | None = None
"""The port of the store that this process hosts."""

_channel: Channel | None = None
_num_channels = 0
_opening = threading.Lock()


def open_channel(*, log_every_s: float = 60.0, timeout_s: float | None = None) -> Channel | None:
    """The channel of this process, chosen at the first call; None in a world of one.

    Waits for global rank 0 if that rank is to host the store and has not come here yet.

    Args:
        log_every_s: Seconds between warnings that say what is waited for.
        timeout_s: Seconds after which this gives up; None waits for rank 0 for ever. Where something listens already,
            it ends within ``CONNECT_TIMEOUT_S`` in any case.

    Collectives: none; every rank that needs the channel calls it, at any time.

    Raises:
        LauncherError: several ranks and no place to meet; nothing listens there in time; the store belongs to another
            job; or this process was forked from a rank.
    """
    global _channel, _num_channels, _served_port
    options = WaitOptions(log_every_s=log_every_s, timeout_s=timeout_s).started()
    channel = _channel
    if channel is None:
        with _only_opener(timeout_s):
            if _channel is None and (ranks := current_ranks()).world_size > 1:
                channel = _choose(ranks, options)
                channel.write_identity()
                _channel, _num_channels = channel, _num_channels + 1
                hosted = tcp_store_beneath(channel.server) if ranks.global_rank == 0 else None
                _served_port = None if hosted is None else hosted.port
                # Not atexit: children that multiprocessing forked (notebook_launcher) end without it.
                Finalize(None, leave, exitpriority=0)
            channel = _channel
    if channel is not None and channel.process.pid != os.getpid():
        raise LauncherError(
            f"process {os.getpid()} was forked from global rank {channel.ranks.global_rank} (process "
            f"{channel.process.pid}) and is no rank itself: do this in the rank's own process"
        )
    return channel


@contextlib.contextmanager
def _only_opener(timeout_s: float | None) -> Iterator[None]:
    """One thread at a time. Raises LauncherError where another one opens the channel for longer than ``timeout_s``."""
    if not _opening.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)):
        raise LauncherError(f"another thread of this process waits for the other ranks; gave up after {timeout_s:g} s")
    try:
        yield
    finally:
        _opening.release()


def current_channel() -> Channel | None:
    """The channel that this process has chosen, None before it has."""
    return _channel


def leave(*, grace_s: float = LEAVE_GRACE_S) -> None:
    """Write a farewell and give the channel up; runs by itself when the process ends.

    Global rank 0 may hold the server: it stays up to ``grace_s`` seconds for ranks that have not left and
    live. To be called on all ranks, if at all: before ``destroy_process_group`` and a second
    ``init_process_group`` in the same processes without torchrun, whose group would otherwise meet the
    first one's keys on the server that this channel keeps alive.
    """
    global _channel
    channel, _channel = _channel, None
    if channel is None or channel.process.pid != os.getpid():
        return
    ranks = channel.ranks
    try:
        channel.write_farewell()
        if ranks.global_rank == 0 and channel.server:
            _stay_for_others(channel, grace_s)
    except (RuntimeError, LauncherError) as error:
        logger.debug("rank %d could not take leave: %s", ranks.global_rank, error)


def _stay_for_others(channel: Channel, grace_s: float) -> None:
    """Return when all ranks have left, or after ``grace_s``; say for whom this waits if they have never come."""
    start = time.monotonic()
    waiting, is_said = set(range(channel.ranks.world_size)), False
    while waiting and (waited_s := time.monotonic() - start) < grace_s:
        waiting = {rank for rank in waiting if not channel.has_left(rank)}
        if not is_said and waited_s > SILENT_GRACE_S:
            is_said = True
            if missing := sorted(rank for rank in waiting if channel.process_of(rank) is None):
                logger.warning(
                    "global rank 0 hosts the store and stays up to %g s for ranks that have not come yet: %s. %s",
                    grace_s,
                    ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else ""),
                    _environment.describe_world(),
                )
        time.sleep(0.02)


def _close_inherited_sockets() -> None:
    """Close, in a child that was just forked, the sockets of the store that its parent hosts.

    Workers of ``datasets.map(num_proc=…)`` may outlive a parent that was killed. While they hold its sockets, no
    connection to the store is reset, and a call to it never returns (torch 2.13).
    """
    if _served_port is None:
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            inherited = socket.socket(fileno=int(name))
        except OSError:  # not a socket, or the descriptor that listed the folder
            continue
        if inherited.family in (socket.AF_INET, socket.AF_INET6) and inherited.getsockname()[1] == _served_port:
            inherited.close()
        else:
            inherited.detach()


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_close_inherited_sockets)


def _choose(ranks: Ranks, options: WaitOptions) -> Channel:
    rendezvous = _environment.read_rendezvous()
    run_id, num_restarts = _environment.read_run_attempt()
    # Several jobs and channels of one process may pass through one server.
    prefix = keys.CHANNEL_PREFIX.format(run_id=run_id, channel=_num_channels)

    def channel(store: Store, origin: str, server: Store | None = None) -> Channel:
        namespace = PrefixStore(prefix, store)
        return Channel(namespace, ranks=ranks, origin=origin, server=server, num_restarts=num_restarts)

    if rendezvous is not None and rendezvous.is_agent_store:
        origin = f"the agent store of the launcher at {rendezvous.host}:{rendezvous.port}"
        if options.timeout_s is None or options.timeout_s > CONNECT_TIMEOUT_S:  # it listens before any rank starts
            options = replace(options, timeout_s=CONNECT_TIMEOUT_S).started()
        return channel(connect(rendezvous, origin, ranks.global_rank, options), origin)

    if dist.is_initialized():
        group_store = default_store()
        inner = tcp_store_beneath(group_store)
        at = None if inner is None else (inner.host, inner.port)
        # Beneath the group's prefixes are the keys of ranks that chose before there was a group.
        is_rendezvous = rendezvous is not None and at == (rendezvous.host, rendezvous.port)
        client: Store = (inner if is_rendezvous else group_store).clone()  # type: ignore[union-attr]
        client.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
        origin = "the store of the default process group"
        if is_rendezvous and ranks.global_rank == 0:
            claim_store(client, origin, ranks)
        # A clone of a TCPStore does not keep the server alive (torch 2.13); its origin does.
        return channel(client, origin, group_store)

    if rendezvous is None:
        hint = _environment.describe_world()
        raise LauncherError(
            f"global rank {ranks.global_rank} of {ranks.world_size} has no way to talk to the other ranks: "
            "set MASTER_ADDR (a host name of global rank 0) and MASTER_PORT (a free port there) on every "
            "rank, launch with torchrun, or call torch.distributed.init_process_group first"
            + (f". {hint}" if hint else "")
        )
    origin = f"the store that global rank 0 hosts at {rendezvous.host}:{rendezvous.port}"
    if ranks.global_rank > 0:
        client = connect(rendezvous, origin, ranks.global_rank, options)
        check_store(client, origin, ranks, options)
        return channel(client, origin)
    server = host(rendezvous, origin, options)
    claim_store(server, origin, ranks)
    return channel(server, origin, server)
