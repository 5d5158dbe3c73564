"""The channel on which ranks exchange small values: keys of a c10d store, and nothing else.

No process group, no GPU memory, no files and no Python threads. One channel is chosen per process and kept:

1. the store of the launcher's agent (torchrun): works before and after ``init_process_group`` and outlives
   the ranks;
2. else the store of the default process group;
3. else one that global rank 0 hosts at MASTER_ADDR:MASTER_PORT. A later ``init_process_group("env://")``
   in that process shares the server, so both uses of the port get along.

The first and the last are one address, and so is the second when the group was made from the environment:
ranks that choose before and after ``init_process_group`` see the same keys.
"""

import logging
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.util import Finalize

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # documented there

from hf_gradutils import _environment
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.ranks import Ranks, current_ranks
from hf_gradutils.coordination.waiting import WaitOptions, poll
from hf_gradutils.errors import LauncherError
from hf_gradutils.upstream.torch import default_store

logger = logging.getLogger("hf_gradutils.store")

CONNECT_TIMEOUT_S = 30.0
"""Limit of calls that cannot be interrupted: connecting to a server that has just answered a probe."""

LEAVE_GRACE_S = 10.0
"""Seconds that rank 0 stays at its end for ranks that have not read everything yet."""

_served_port: int | None = None
"""The port of the store that this process hosts."""

_channel: Channel | None = None
_num_channels = 0
_opening = threading.Lock()


def open_channel(*, log_every_s: float = 60.0) -> Channel | None:
    """The channel of this process, chosen at the first call; None in a world of one.

    Waits for global rank 0 if that rank is to host the store and has not come here yet.

    Collectives: none; every rank that needs the channel calls it, at any time.

    Raises:
        LauncherError: several ranks and no place to meet; or this process was forked from a rank.
    """
    global _channel, _num_channels, _served_port
    channel = _channel
    if channel is None:
        with _opening:
            if _channel is None and (ranks := current_ranks()).world_size > 1:
                channel = _choose(ranks, log_every_s)
                channel.write_identity()
                _channel, _num_channels = channel, _num_channels + 1
                hosted = _tcp_store_beneath(channel.server) if ranks.global_rank == 0 else None
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
        waiting = set(range(ranks.world_size)) if ranks.global_rank == 0 and channel.server else set()
        deadline = time.monotonic() + grace_s
        while waiting and time.monotonic() < deadline:
            waiting = {rank for rank in waiting if not channel.has_left(rank)}
            time.sleep(0.02)
    except (RuntimeError, LauncherError) as error:
        logger.debug("rank %d could not take leave: %s", ranks.global_rank, error)


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


def _choose(ranks: Ranks, log_every_s: float) -> Channel:
    rendezvous = _environment.read_rendezvous()
    run_id, num_restarts = _environment.read_run_attempt()
    # Several jobs and channels of one process may pass through one server.
    prefix = keys.CHANNEL_PREFIX.format(run_id=run_id, channel=_num_channels)

    def channel(store: Store, origin: str, server: Store | None = None) -> Channel:
        namespace = PrefixStore(prefix, store)
        return Channel(namespace, ranks=ranks, origin=origin, server=server, num_restarts=num_restarts)

    if rendezvous is not None and rendezvous.is_agent_store:
        origin = f"the agent store of the launcher at {rendezvous.host}:{rendezvous.port}"
        return channel(_connect(rendezvous, origin, ranks, log_every_s, CONNECT_TIMEOUT_S), origin)

    if dist.is_initialized():
        group_store = default_store()
        inner = _tcp_store_beneath(group_store)
        at = None if inner is None else (inner.host, inner.port)
        # Beneath the group's prefixes are the keys of ranks that chose before there was a group.
        is_rendezvous = rendezvous is not None and at == (rendezvous.host, rendezvous.port)
        client: Store = (inner if is_rendezvous else group_store).clone()  # type: ignore[union-attr]
        client.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
        # A clone of a TCPStore does not keep the server alive (torch 2.13); its origin does.
        return channel(client, "the store of the default process group", group_store)

    if rendezvous is None:
        raise LauncherError(
            f"global rank {ranks.global_rank} of {ranks.world_size} has no way to talk to the other ranks: "
            "set MASTER_ADDR (a host name of global rank 0) and MASTER_PORT (a free port there) on every "
            "rank, launch with torchrun, or call torch.distributed.init_process_group first"
        )
    origin = f"the store that global rank 0 hosts at {rendezvous.host}:{rendezvous.port}"
    if ranks.global_rank > 0:
        return channel(_connect(rendezvous, origin, ranks, log_every_s, None), origin)
    server = _tcp_store(rendezvous, origin, hosts=True)
    return channel(server, origin, server)


def _connect(
    rendezvous: _environment.Rendezvous, origin: str, ranks: Ranks, log_every_s: float, timeout_s: float | None
) -> Store:
    def probe() -> bool | None:
        try:
            socket.create_connection((rendezvous.host, rendezvous.port), timeout=1.0).close()
        except OSError:
            return None
        return True

    # TCPStore would try to connect for its whole timeout without heeding Ctrl-C.
    try:
        poll(
            probe,
            lambda: f"rank {ranks.global_rank} waits for {origin}",
            WaitOptions(log_every_s=log_every_s, timeout_s=timeout_s),
        )
    except TimeoutError as error:
        raise LauncherError(f"{error}: nothing listens there") from None
    return _tcp_store(rendezvous, origin, hosts=False)


def _tcp_store(rendezvous: _environment.Rendezvous, origin: str, *, hosts: bool) -> Store:
    try:
        return TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=hosts,
            timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise LauncherError(
            f"cannot {'host' if hosts else 'reach'} {origin}; MASTER_ADDR must name the host of global rank 0 "
            f"and MASTER_PORT a port that is free there: {error}"
        ) from error


def _tcp_store_beneath(store: Store | None) -> TCPStore | None:
    """The TCPStore beneath all prefixes; None if the store is of another kind."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, TCPStore) else None
