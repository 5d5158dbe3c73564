"""The first rank of each node runs a block before the node's other ranks.

The first rank publishes how its block ended on the store channel and never waits. The others poll for that
from Python, and watch the first rank's process meanwhile, so they learn of a failure or a death at once and
of a slow success whenever it comes: no process group, hence no process group timeout, takes part.
"""

import contextlib
import inspect
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

from hf_gradutils.channel import Channel, poll
from hf_gradutils.errors import FirstRankError, InvalidArgumentError
from hf_gradutils.store import current_channel, open_channel
from hf_gradutils.topology import ProcessIdentity, has_ended

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

MAX_REPORT_CHARS = 20_000
"""Longest message and traceback that are published; a longer message loses its end, a traceback its start."""

DEATH_GRACE_S = 1.0
"""A dying process closes its connections a moment before it counts as ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """One passage of this node's ranks through a block."""

    channel: Channel
    name: str
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What ``__enter__`` leaves for ``__exit__``: the block to report on, None on ranks that do not report."""

    block: _Block | None
    pid: int


class FirstRankPerNode(contextlib.ContextDecorator):
    """Let the first rank of each node finish a block before the node's other ranks enter it.

        with FirstRankPerNode() as is_first:  # True on the first rank
            dataset = load_dataset(...)  # the first rank prepares, the others find the cache

        @FirstRankPerNode()
        def prepare(): ...

    It works before, after and around ``init_process_group``, without a launcher (a world of one) and
    nested. Whatever ends the first rank's block other than success, its own death included, is raised on
    the waiting ranks; they never enter. Time does not matter: the block may take hours.

    Blocks pair up by name and by how often each rank has entered that name, so a rank that skips one block
    does not shift the others. Nothing inside may need the other ranks (no collectives).

    Args:
        name: The same on all ranks. Default: where the block is (module, function and line of the ``with``,
            or the name of the decorated function).
        poll_s: Longest pause between two looks of a waiting rank.
        log_every_s: A waiting rank logs what it waits for this often, as a warning.
        timeout_s: Waiting ranks give up after that; None never.

    Collectives: none. The ranks of one node enter, each once; other nodes are not waited for.

    Raises:
        FirstRankError: on waiting ranks, when the first rank failed, ended, or ``timeout_s`` passed.
        LauncherError: there are several ranks and no way to reach them.
        InvalidArgumentError: an option out of range, or a generator or coroutine function to decorate.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        poll_s: float = 0.25,
        log_every_s: float = 60.0,
        timeout_s: float | None = None,
    ) -> None:
        for option, value in (("poll_s", poll_s), ("log_every_s", log_every_s), ("timeout_s", timeout_s)):
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{option} must be > 0, got {value}")
        self._name = name
        self._poll_s = poll_s
        self._log_every_s = log_every_s
        self._timeout_s = timeout_s
        # By thread, because one object may be entered in several, and nested in each.
        self._entries: dict[int, list[_Entry]] = {}

    def __call__(self, func: F) -> F:
        """Decorate a function: each call is a block of its own, named after the function."""
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(func) for is_kind in kinds):
            raise InvalidArgumentError(
                f"FirstRankPerNode decorates plain functions, got {func!r}, whose body runs after the call "
                "has returned; use `with FirstRankPerNode():` inside it"
            )
        named = self._recreate_cm()
        if named._name is None:
            function = inspect.unwrap(func)
            named._name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
        return super(FirstRankPerNode, named).__call__(func)

    def _recreate_cm(self) -> Self:
        return type(self)(
            name=self._name,
            poll_s=self._poll_s,
            log_every_s=self._log_every_s,
            timeout_s=self._timeout_s,
        )

    def _try_bootstrap_pg(self) -> bool:
        """Open the channel that the ranks talk through when no process group exists yet.

        Leaves no process group behind, despite its name. Entering does this by itself.

        Returns:
            True when this call opened it; False when there was nothing to do: a process group exists, the
            channel is open already, or this is a world of one.
        """
        if dist.is_initialized() or current_channel() is not None:
            return False
        return open_channel(log_every_s=self._log_every_s) is not None

    def __enter__(self) -> bool:
        """Enter; True on the first rank at once, False on the others after it has finished."""
        block = None
        is_first = True
        channel = open_channel(log_every_s=self._log_every_s)
        if channel is not None:
            name = self._name or _call_site(sys._getframe(1))
            key = f"node/{channel.ranks.node}/{name}/{channel.next_count(name)}"
            block = _Block(channel=channel, name=name, key=key)
            is_first = self._enter_block(block)
        entry = _Entry(block=block if is_first else None, pid=os.getpid())
        self._entries.setdefault(threading.get_ident(), []).append(entry)
        return is_first

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Publish how the first rank's block ended; nothing on the others. Exceptions keep going."""
        thread = threading.get_ident()
        entry = self._entries[thread].pop()
        if not self._entries[thread]:
            del self._entries[thread]
        # A child that was forked inside the block leaves it too, and must not speak for its parent.
        if entry.block is not None and entry.pid == os.getpid():
            _publish(entry.block, exc_val)

    def _enter_block(self, block: _Block) -> bool:
        """Find out who is first; as the first return True, else wait and return False."""
        channel = block.channel
        me = channel.ranks.global_rank
        try:
            first = self._wait(lambda: _first_rank(channel), lambda: _describe_election(block))
            if first == me:
                channel.write(f"{block.key}/run", repr(time.time()))
                return True
            process = channel.process_of(first)
        except RuntimeError as lost:
            raise FirstRankError(_describe_loss(block)) from lost
        except BaseException as error:
            # The others would wait for a block that this rank is not going to run.
            if _is_first_known_to_be(channel, me):
                _publish(block, error)
            raise
        assert process is not None  # written before the claim to be first
        try:
            report = self._wait(lambda: _look(block, first, process), lambda: _describe_wait(block, first, process))
        except RuntimeError as lost:
            # The first rank may host the store: then its death is what ended both.
            died = has_ended(process, grace_s=DEATH_GRACE_S)
            raise FirstRankError(_describe_death(block, first, process) if died else _describe_loss(block)) from lost
        if report != "ok":
            raise FirstRankError(report)
        return False

    def _wait(self, attempt: Callable[[], T | None], describe: Callable[[], str]) -> T:
        try:
            return poll(
                attempt, describe, poll_s=self._poll_s, log_every_s=self._log_every_s, timeout_s=self._timeout_s
            )
        except TimeoutError as error:
            raise FirstRankError(str(error)) from None


def _first_key(channel: Channel) -> str:
    return f"first_of/{channel.ranks.node}"


def _first_rank(channel: Channel) -> int | None:
    """The first rank of this node: the one of local rank 0, or whoever comes first where several say so.

    None while no candidate has come.
    """
    key, ranks = _first_key(channel), channel.ranks
    is_candidate = not ranks.local_rank  # 0, or unknown
    first = channel.claim(key, str(ranks.global_rank)) if is_candidate else channel.read(key)
    return None if first is None else int(first)


def _is_first_known_to_be(channel: Channel, global_rank: int) -> bool:
    try:
        return channel.read(_first_key(channel)) == str(global_rank)
    except RuntimeError:  # the store is gone, and with it everybody to tell
        return False


def _publish(block: _Block, error: BaseException | None) -> None:
    """Tell the others how the block ended; a store that is lost must not hide the block's own exception."""
    channel = block.channel
    report = "ok"
    if error is not None:
        what = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
        who = _describe_rank(block, channel.ranks.global_rank, channel.process)
        report = (
            f"{who} failed in {block.name}: {what[:MAX_REPORT_CHARS]}\n\nIts traceback:\n{trace[-MAX_REPORT_CHARS:]}"
        )
        # What a file name brought into a message may not be encodable.
        report = report.encode(errors="backslashreplace").decode()
    try:
        channel.claim(f"{block.key}/done", report)
    except RuntimeError as lost:  # the others notice that this rank has ended
        logger.error("rank %d cannot tell how %s ended: %s", channel.ranks.global_rank, block.name, lost)


def _look(block: _Block, first: int, process: ProcessIdentity) -> str | None:
    """How the block ended, None while it has not."""
    channel = block.channel
    report = channel.read(f"{block.key}/done")
    if report is None and channel.has_left(first):
        # It may have finished between the two looks: what it published last counts.
        death = _describe_death(block, first, process)
        report = channel.read(f"{block.key}/done") or channel.claim(f"{block.key}/done", death)
    return report


def _describe_rank(block: _Block, rank: int, process: ProcessIdentity) -> str:
    return f"rank {rank} of {block.channel.ranks.world_size} on {process}"


def _describe_death(block: _Block, rank: int, process: ProcessIdentity) -> str:
    who = _describe_rank(block, rank, process)
    return f"{who} has ended (killed, or left early) before it was done with {block.name}"


def _describe_loss(block: _Block) -> str:
    channel = block.channel
    return (
        f"rank {channel.ranks.global_rank} at {block.name} lost {channel.origin}: its host has ended, so nobody "
        "can tell any more whether the first rank succeeds"
    )


def _describe_election(block: _Block) -> str:
    rank = block.channel.ranks.global_rank
    return f"rank {rank} waits at {block.name} for the first rank of its node, which has not reached any block"


def _describe_wait(block: _Block, first: int, process: ProcessIdentity) -> str:
    since = block.channel.read(f"{block.key}/run")
    state = "which has not reached it" if since is None else f"running for {time.time() - float(since):.0f} s"
    rank = block.channel.ranks.global_rank
    return f"rank {rank} waits at {block.name} for {_describe_rank(block, first, process)}, {state}"


def _call_site(frame: FrameType | None) -> str:
    """Module, function and line of a block, the same on every rank."""
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back  # ExitStack.enter_context
    if frame is None:
        return "unknown"
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}:{frame.f_lineno}"
