"""The first rank of each node runs a block before the node's other ranks.

The order of the ranks is decided here. A rank waits for another's turn (``turn``) on the store and by watching
processes; no process group, hence no process group timeout, takes part.
"""

import contextlib
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast, get_args

import torch.distributed as dist

from hf_gradutils import _environment
from hf_gradutils.coordination.nodes import claim_first_rank, is_first_rank, wait_for_nodes
from hf_gradutils.coordination.place import Call, find_place
from hf_gradutils.coordination.shared_directory import share_any
from hf_gradutils.coordination.store import current_channel, open_channel
from hf_gradutils.coordination.turn import Block, Turn, tell_where
from hf_gradutils.coordination.waiting import POLL_S, WaitOptions, poll
from hf_gradutils.errors import FirstRankError, InvalidArgumentError

F = TypeVar("F", bound=Callable[..., Any])

Scope = Literal["node", "world", "auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """State that ``__enter__`` leaves for ``__exit__``."""

    block: Block | None
    """The passage of the rank that this one has waited for, or its own; None in a world of one."""

    turns: tuple[Turn, ...]
    """The turns to report on; none on ranks that only wait."""

    is_outermost: bool


class _Depth(threading.local):
    """Number of blocks that this thread is in."""

    value = 0


_depth = _Depth()


class FirstRankPerNode(contextlib.ContextDecorator):
    """Let the first rank of each node finish a block before the node's other ranks enter it.

        with FirstRankPerNode() as is_first:  # True on the first rank
            dataset = load_dataset(...)  # the first rank prepares, the others find the cache

        @FirstRankPerNode()
        def prepare(): ...

    It works before, after and around ``init_process_group``, without a launcher (a world of one) and
    nested. Whatever ends the first rank's block other than success, its own death included, is raised on
    the waiting ranks; they never enter. Time does not matter: the block may take hours.

    Nodes run the block independently of each other. Behind the outermost block they wait for each other, since
    a rank that went on would meet the process group's timeout in its next collective; what failed on one
    node is raised there on all.

    Passages pair up by name and by the values that the block reads (text, numbers, paths, data sets), so ranks may skip
    some, as in a loop that leaves out what is there already. If the first rank has not had a rank's values, that rank
    is held back for 2 s, or 10 s if a ``for`` loop sets them; then it enters with a warning, and passages of that block
    pair up by their number alone from there on. A rank paired by number also waits while its first rank is in a later
    passage. Nothing inside may need the other ranks (no collectives).

    Args:
        name: The same on all ranks; it says what the block works on, whose values then do not matter. Default: where
            the block is (module, function and line of the ``with``, or the name of the decorated function and where
            it is called).
        scope: ``"node"``: every node prepares for itself. ``"world"``: for a cache that the nodes share; global
            rank 0 is the only first, then come the first ranks of the nodes, then the rest, so that a cache that
            is not shared after all is prepared once per node and by one rank at a time. ``"auto"``: ``"world"``
            on nodes that turn out to share ``cache_dir`` with global rank 0, else ``"node"``; found out once for each
            list of directories.
        cache_dir: The directory, or several, that the block writes to, for ``"auto"``. Default: the caches of datasets
            and of the hub as they are set on entering.
        waits_for_nodes: Let nodes wait for each other behind the block. False where only some nodes come.
        poll_s: Longest pause between two polls of a waiting rank.
        log_every_s: A waiting rank logs what it waits for this often, as a warning.
        timeout_s: Waiting ranks give up after that, all waits of one entry taken together; None never. The wait for
            other nodes behind the block has a limit of the same length.

    Collectives: none. The ranks of a node enter, each once; with ``waits_for_nodes``, ``"world"`` or ``"auto"``
    at least the first rank of every node does.

    Raises:
        FirstRankError: on waiting ranks, when the first rank failed, ended, or ``timeout_s`` passed; or when a rank
            that failed by itself enters again and its first rank does not within 60 s.
        LauncherError: there are several ranks and no way to reach them.
        InvalidArgumentError: an option out of range, or a generator or coroutine function to decorate.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        scope: Scope = "node",
        cache_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        waits_for_nodes: bool = True,
        poll_s: float = POLL_S,
        log_every_s: float = 60.0,
        timeout_s: float | None = None,
    ) -> None:
        for option, value in (("poll_s", poll_s), ("log_every_s", log_every_s), ("timeout_s", timeout_s)):
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{option} must be > 0, got {value}")
        if scope not in get_args(Scope):
            raise InvalidArgumentError(f"scope must be 'node', 'world' or 'auto', got {scope!r}")
        self._name = name
        self._scope: Scope = scope
        given = [cache_dir] if isinstance(cache_dir, str | os.PathLike) else cache_dir or ()
        self._directories = [Path(directory) for directory in given]
        self._waits_for_nodes = waits_for_nodes
        self._options = WaitOptions(poll_s=poll_s, log_every_s=log_every_s, timeout_s=timeout_s)
        # By thread, because one object may be entered in several, and nested in each.
        self._entries: dict[int, list[_Entry]] = {}
        self._call: Call | None = None

    def __call__(self, func: F) -> F:
        """Decorate a function: each call is a block of its own, named after the function and the place of the call."""
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(func) for is_kind in kinds):
            raise InvalidArgumentError(
                f"FirstRankPerNode decorates plain functions, got {func!r}, whose body runs after the call "
                "has returned; use `with FirstRankPerNode():` inside it"
            )

        @functools.wraps(func)
        def call_in_block(*args: Any, **kwargs: Any) -> Any:
            with self._of_call(func, args, kwargs):  # names no module's functions: datasets hashes those too
                return func(*args, **kwargs)

        return cast(F, call_in_block)

    def _of_call(self, func: F, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        context = self._recreate_cm()
        context._call = Call(func, args, kwargs)
        return context

    def _recreate_cm(self) -> Self:
        copy = type(self).__new__(type(self))
        copy.__setstate__(self.__getstate__())
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: data sets hash, and hand to processes, whatever a function to map refers to."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_entries", "_call")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _entries={}, _call=None)

    def _try_bootstrap_pg(self) -> bool:
        """Open the channel that the ranks talk through when no process group exists yet.

        Leaves no process group behind, despite its name. Entering does this by itself.

        Returns:
            True when this call opened it; False when there was nothing to do: a process group exists, the
            channel is open already, or this is a world of one.
        """
        if dist.is_initialized() or current_channel() is not None:
            return False
        options = self._options
        return open_channel(log_every_s=options.log_every_s, timeout_s=options.timeout_s) is not None

    def __enter__(self) -> bool:
        """Enter; True on the first rank at once, False on the others after it has finished."""
        block: Block | None = None
        turns: list[Turn] = []
        is_first = True
        options = self._options.started()  # one limit for all waits of this entry
        channel = open_channel(log_every_s=options.log_every_s, timeout_s=options.timeout_s)
        if channel is not None:
            name, work = find_place(sys._getframe(1), name=self._name, call=self._call)
            passage = channel.passages.begin(name, work.digest)
            block = Block(channel=channel, name=name, options=options, passage=passage, work=work)
            block, turns, is_first = self._wait_for_turn(block)
        entry = _Entry(block=block, turns=tuple(turns), is_outermost=_depth.value == 0)
        self._entries.setdefault(threading.get_ident(), []).append(entry)
        _depth.value += 1
        return is_first

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Publish how this rank's turn ended, if it had one, and wait for the other nodes. Exceptions keep going."""
        thread = threading.get_ident()
        entry = self._entries[thread].pop()
        if not self._entries[thread]:
            del self._entries[thread]
        _depth.value -= 1
        # A child that was forked inside the block leaves it too, and must not speak for its parent.
        if entry.block is None or entry.block.channel.process.pid != os.getpid():
            return
        for turn in entry.turns:
            turn.end(exc_val)
        is_error = isinstance(exc_val, Exception)  # not of a generator that is closed inside of the block
        if is_error and not entry.turns and entry.block.work.text:
            entry.block.channel.passages.fail(entry.block.name, entry.block.work.digest)
        # A rank that runs an inner block first may have others waiting for it in an outer one: it must not wait.
        if exc_val is None and entry.is_outermost and self._waits_for_nodes:
            with _first_rank_errors(entry.block):
                wait_for_nodes(entry.block)

    def _wait_for_turn(self, block: Block) -> tuple[Block, list[Turn], bool]:
        """Wait until this rank may enter; returns the passage it follows, its own turns, which have begun, is_first."""
        own: list[Turn] = []
        try:
            with _first_rank_errors(block):
                turns = self._turns_in_order(block)
                own = [turn for turn in turns if turn.is_own]
                if own:
                    tell_where(turns[0].block)
                passage = block.passage
                if passage.is_repeated and not turns[0].is_own:
                    turns[0].check_that_it_comes_again()
                for turn in turns:
                    if turn.is_own:
                        break
                    passage = replace(passage, count=turn.wait())
                for turn in own:
                    turn.begin()
        except BaseException as error:
            # The others would wait for a part that this rank is not going to run.
            if not own and is_first_rank(block.channel):
                own = [Turn(block, block.channel.ranks.global_rank, block.channel.ranks.node)]
            for turn in own:
                turn.end(error)
            raise
        return block if own else replace(block, passage=passage), own, turns[0].is_own

    def _turns_in_order(self, block: Block) -> list[Turn]:
        """The turns, one after the other, that the ranks of this node wait for."""
        channel = block.channel
        rank = channel.ranks.global_rank
        first_rank = poll(
            lambda: claim_first_rank(channel),
            lambda: f"rank {rank} waits for the first rank of its node, which has not reached any block ({block.name})",
            block.options,
        )
        block = replace(block, has_turn=first_rank == rank)
        here = Turn(block, first_rank, channel.ranks.node)
        scope = self._scope
        if scope == "auto":
            scope = "world" if share_any(block, self._directories or _environment.read_cache_directories()) else "node"
        return [Turn(block, 0, None), here] if scope == "world" else [here]


@contextlib.contextmanager
def _first_rank_errors(block: Block) -> Iterator[None]:
    """Raise FirstRankError where a rank has waited too long or has lost the store."""
    try:
        yield
    except TimeoutError as error:
        raise FirstRankError(str(error)) from None
    except RuntimeError as lost:
        rank, origin = block.channel.ranks.global_rank, block.channel.origin
        raise FirstRankError(
            f"rank {rank} at {block.name} lost {origin}: its host has ended, so how the first rank ended is unknown"
        ) from lost
