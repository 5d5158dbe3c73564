"""A listening socket by which the kernel answers for a process.

While the process lives, a connection to the socket is established, also while one of its threads holds the GIL for
minutes; once it has ended, the connection is refused. Nothing is sent over it.

An answer must come from the right machine. An address of one's own host counts only where both processes are known to
be on one network, and a refusal only at an address at which that rank has answered before: a firewall refuses too, and
a private address may be another machine's here.
"""

import contextlib
import enum
import errno
import functools
import ipaddress
import json
import os
import select
import socket
import sys
import threading
import time
from typing import Any

from hf_gradutils import _environment
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.process import host_network

RETRY_S = 1.0
"""Seconds between two attempts to connect to a lifeline that does not answer."""

BACKLOG = 4096
"""Connections that the kernel accepts for a process that cannot; Linux allows as many by default (somaxconn, 5.4)."""

KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
"""A host that is gone is noticed on a held connection after 25 s."""

ANYWHERE = "203.0.113.1", 9
"""A documentation address (RFC 5737), which is routed like any other host's."""

_NO_LIFELINE: dict[str, Any] = {"port": 0, "addresses": [], "network": ""}

_listener: socket.socket | None = None
_num_users = 0
_changing = threading.Lock()


# ---- the rank that is watched ----


def open_lifeline(channel: Channel) -> None:
    """Listen, and publish where; turns of one process that are nested share the socket. Pairs with close_lifeline.

    A process that cannot listen says so: the closed port of an earlier turn would count as its end. Raises RuntimeError
    once the store is lost.
    """
    global _listener, _num_users
    with _changing:
        if _listener is None:
            listener, record = _listen(), _NO_LIFELINE
            try:
                if listener is not None:
                    addresses = published_addresses(is_store_host=channel.server is not None)
                    record = {"port": listener.getsockname()[1], "addresses": addresses, "network": host_network()}
                channel.write(keys.RANK_LIFELINE.format(rank=channel.ranks.global_rank), json.dumps(record))
            except BaseException:
                if listener is not None:
                    listener.close()
                raise
            _listener = listener
        _num_users += 1


def close_lifeline() -> None:
    """Stop listening, if no other turn of this process needs it."""
    global _listener, _num_users
    with _changing:
        _num_users -= 1
        if _num_users == 0 and _listener is not None:
            _listener.close()
            _listener = None


def drop_connections() -> None:
    """Close the connections that ranks have made meanwhile, whose number is limited; they have to see a beat before."""
    with contextlib.suppress(OSError):  # none is left, no file descriptor is, or it has just been closed
        while (listener := _listener) is not None:
            listener.accept()[0].close()


def _listen() -> socket.socket | None:
    """A socket on all interfaces, for IPv6 and IPv4 where the host has both; None on a system without ``poll``."""
    if not hasattr(select, "poll"):
        return None
    for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "")):
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((host, 0))
            listener.listen(BACKLOG)
            listener.setblocking(False)
            undo.pop_all()
            return listener
    return None


def _close_inherited_lifeline() -> None:
    """Close it in a child that was just forked: a worker that outlives this process must not answer for it."""
    global _listener, _num_users, _changing
    if _listener is not None:
        _listener.close()
    _listener, _num_users, _changing = None, 0, threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_inherited_lifeline)


def published_addresses(*, is_store_host: bool) -> list[str]:
    """Addresses at which other hosts may reach this one: that of its way to MASTER_ADDR, else those of its name.

    On the host of the store also that of MASTER_ADDR, which the others have reached. Numbers only, as who waits must
    not look up names; none of them is a loopback address.
    """
    rendezvous = _environment.read_rendezvous()
    if rendezvous is None:
        return _addresses_of_host_name()
    found: list[str] = []
    with contextlib.suppress(OSError, UnicodeError):
        family, _, _, _, there = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
        found.append(here := _address_towards(family, there))
        if is_store_host or here == there[0]:
            found.append(str(there[0]))
        if _is_local(here):  # by this host's own file of names, whose name leads others elsewhere
            found.append(_address_towards(socket.AF_INET, ANYWHERE))
    return [address for address in dict.fromkeys(found) if not _is_local(address)]


def _address_towards(family: int, there: Any) -> str:
    """This host's own address on its way there. Raises OSError where there is no way."""
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(there)  # sends nothing
        return str(way.getsockname()[0])


@functools.cache  # a host without a name server may look for its name for seconds
def _addresses_of_host_name() -> list[str]:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [address for address in dict.fromkeys(str(info[4][0]) for info in found) if not _is_local(address)]


def _is_local(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified


# ---- the rank that watches ----


class Answer(enum.Enum):
    """The state of a process, by its lifeline."""

    LIVES = enum.auto()
    HAS_ENDED = enum.auto()
    NONE = enum.auto()


class Line:
    """This rank's connection to the lifeline of another; held while that one is silent."""

    def __init__(self, channel: Channel, global_rank: int) -> None:
        self._channel = channel
        self._global_rank = global_rank
        self._sockets: dict[str, socket.socket] = {}
        """By address. More than one only until one of them has answered."""

        self._is_same_network = False
        self._retry_at = 0.0
        self._has_refused = False

    @property
    def has_been_reached(self) -> bool:
        """True if a lifeline of that rank has answered this process at some time."""
        return self._global_rank in self._channel.reached

    def is_published(self) -> bool:
        """True once that rank has said where it listens, or that it does not."""
        return self._channel.read(keys.RANK_LIFELINE.format(rank=self._global_rank)) is not None

    def look(self, *, wait_s: float = 0.0) -> Answer:
        """Connect if there is no connection, wait up to ``wait_s`` for it, and say what the lifeline tells by now."""
        if not self._sockets and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + RETRY_S
            self._has_refused = False
            self._connect()
        until = time.monotonic() + wait_s
        while not any(self._is_established(address) for address in list(self._sockets)):
            if not self._sockets or time.monotonic() >= until:
                return Answer.HAS_ENDED if self._has_refused else Answer.NONE
            time.sleep(0.005)
        return Answer.LIVES

    def close(self) -> None:
        """Close the connection."""
        for connection in self._sockets.values():
            connection.close()
        self._sockets.clear()

    def __del__(self) -> None:
        self.close()  # a wait ends in many ways, and at the end of any nothing needs this

    def _connect(self) -> None:
        record = self._channel.read(keys.RANK_LIFELINE.format(rank=self._global_rank))
        if record is None:
            return
        lifeline = json.loads(record)
        if lifeline == _NO_LIFELINE:
            self._channel.reached.pop(self._global_rank, None)
        self._is_same_network = lifeline["network"] == host_network() != ""
        addresses = [*lifeline["addresses"], *(["127.0.0.1"] if self._is_same_network else [])]
        for address, (family, target) in _resolve(addresses, lifeline["port"]).items():
            with contextlib.suppress(OSError):
                connection = self._sockets[address] = socket.socket(family, socket.SOCK_STREAM)
                connection.setblocking(False)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in KEEPALIVE:
                    if hasattr(socket, option):  # Linux has all
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
                code = connection.connect_ex(target)
                if code not in (0, errno.EINPROGRESS):
                    self._drop(address, code)

    def _is_established(self, address: str) -> bool:
        """True while there is a connection to that address; forgets it when it is none or may not be believed."""
        connection = self._sockets[address]
        code = _error_of(connection)
        if code in (0, errno.ESHUTDOWN):
            if connection.getsockname()[0] == address and not self._is_same_network:
                code = errno.EADDRNOTAVAIL  # this host's own address, not that one's
            else:
                self._channel.reached.setdefault(self._global_rank, set()).add(address)
        if code in (errno.ESHUTDOWN, errno.ECONNRESET):  # by its end, or behind a beat: the next connection tells
            self._retry_at = 0.0
        if code not in (0, errno.EINPROGRESS):
            self._drop(address, code)
        return code == 0

    def _drop(self, address: str, code: int) -> None:
        self._sockets.pop(address).close()
        if code == errno.ECONNREFUSED and address in self._channel.reached.get(self._global_rank, ()):
            self._has_refused = True


def _error_of(connection: socket.socket) -> int:
    """0 while it is established, EINPROGRESS on its way, ESHUTDOWN if the other side has closed it, else its error."""
    poller = select.poll()
    poller.register(connection, select.POLLIN | select.POLLOUT)
    if not poller.poll(0):
        return errno.EINPROGRESS
    if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        return code
    try:
        return 0 if connection.recv(1) else errno.ESHUTDOWN
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or errno.ECONNRESET


def _resolve(addresses: list[str], port: int) -> dict[str, tuple[int, Any]]:
    """Address → its family and what ``connect`` takes. Names are left out: looking for one may take seconds."""
    found: dict[str, tuple[int, Any]] = {}
    for address in addresses:
        with contextlib.suppress(OSError):
            numbers = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            family, _, _, _, target = numbers[0]
            found[str(target[0])] = family, target
    return found
