"""Host a TCPStore at MASTER_ADDR:MASTER_PORT, or connect to one, within a time limit."""

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # documented there

from hf_gradutils._environment import Rendezvous, describe_world
from hf_gradutils.coordination.waiting import WaitOptions, poll
from hf_gradutils.errors import LauncherError

CONNECT_TIMEOUT_S = 30.0
"""Limit for a server that has just accepted a connection."""

PROBE_S = 1.0
"""Limit of one attempt to connect while nothing listens yet."""


def connect(rendezvous: Rendezvous, origin: str, global_rank: int, options: WaitOptions) -> TCPStore:
    """Wait until something listens there, and connect.

    Raises LauncherError when nothing does within the limit of ``options``, or something that is no store.
    """
    failure: OSError | None = None

    def probe() -> bool | None:
        nonlocal failure
        try:
            socket.create_connection((rendezvous.host, rendezvous.port), timeout=PROBE_S).close()
        except OSError as error:
            failure = error
            return None
        return True

    # TCPStore would try to connect for its whole timeout without heeding Ctrl-C.
    try:
        poll(probe, lambda: f"rank {global_rank} waits for {origin} ({failure})", options)
    except TimeoutError as error:
        raise LauncherError(f"{error}: nothing listens there. {describe_world()}".rstrip(". ")) from None
    return _construct(rendezvous, origin, hosts=False, options=options)


def host(rendezvous: Rendezvous, origin: str, options: WaitOptions) -> TCPStore:
    """Listen there. Raises LauncherError if the port is taken, or MASTER_ADDR names another host."""
    return _construct(rendezvous, origin, hosts=True, options=options)


def tcp_store_beneath(store: Store | None) -> TCPStore | None:
    """The TCPStore beneath all prefixes; None if the store is of another kind."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, TCPStore) else None


def _construct(rendezvous: Rendezvous, origin: str, *, hosts: bool, options: WaitOptions) -> TCPStore:
    """Make the store in a thread: torch 2.13 ignores its timeout where something listens and says nothing."""
    limit_s = CONNECT_TIMEOUT_S
    if options.deadline is not None:
        limit_s = min(limit_s, max(PROBE_S, options.deadline - time.monotonic()))
    made: list[TCPStore | Exception] = []

    def construct() -> None:
        try:
            store = TCPStore(
                rendezvous.host,
                rendezvous.port,
                is_master=hosts,
                # torch 2.13 takes up to twice as long, and aborts a process that ends while it still tries.
                timeout=timedelta(seconds=limit_s / 2 if hosts else limit_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
            # Longer than the rest of a caller's limit: every later call has it, too.
            store.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
            made.append(store)
        except Exception as error:
            made.append(error)

    thread = threading.Thread(target=construct, name="hf_gradutils-connect", daemon=True)
    thread.start()
    thread.join(limit_s + PROBE_S / 2)
    if not made and hosts:  # torch listens on all addresses, then connects to this one
        raise LauncherError(
            f"cannot host {origin}: nothing has answered at {rendezvous.host} within {limit_s:.0f} s; MASTER_ADDR must "
            "name this host, that of global rank 0"
        )
    if not made:
        raise LauncherError(
            f"{origin} has not answered within {limit_s:.0f} s: what listens there is no store of torch, or hangs; "
            "choose another MASTER_PORT"
        )
    if isinstance(store := made[0], TCPStore):
        return store
    if not isinstance(store, dist.DistError):
        raise store
    if hosts and "EADDRINUSE" in str(store):
        raise LauncherError(
            f"cannot host {origin}: port {rendezvous.port} is taken on this host, perhaps by another job; choose "
            "another MASTER_PORT"
        ) from None
    raise LauncherError(
        f"cannot {'host' if hosts else 'reach'} {origin}; MASTER_ADDR must name the host of global rank 0 "
        f"and MASTER_PORT a port that is free there: {store}"
    ) from store
