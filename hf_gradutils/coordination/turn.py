"""A turn: the part of one rank in a block, which the ranks behind it wait for.

The rank that has the turn publishes how its part ended and does not wait for readers. The ranks behind it poll for
that and for the death of its process, so they learn of a failure at once and of a slow success whenever it comes.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.failure import encode_failure, error_of
from hf_gradutils.coordination.heartbeat import Pulse, start_heartbeat
from hf_gradutils.coordination.passages import Passage
from hf_gradutils.coordination.waiting import OK, Duty, WaitOptions, await_verdict, poll
from hf_gradutils.coordination.work import NO_WORK, Work
from hf_gradutils.errors import FirstRankError

logger = logging.getLogger("hf_gradutils.first_rank")

T = TypeVar("T")

HOLD_S = 2.0
"""Seconds that a rank waits for the turn's rank to come to the same work, before their values count as different by
nature: a folder of each rank's own."""

HOLD_IN_LOOP_S = 10.0
"""The same where a ``for`` loop sets the values."""

AGAIN_S = 60.0
"""Seconds that a rank which has failed by itself waits for the turn's rank to come to the same work again."""

FOUND = "found"
"""Ends a wait on this rank alone; never written to the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One passage of this rank through a block."""

    channel: Channel
    name: str
    options: WaitOptions
    passage: Passage
    work: Work = NO_WORK
    has_turn: bool = False
    """True if this rank is the first of its node."""

    def key(self, pattern: str, **fields: object) -> str:
        """Fill a pattern: the same key on all ranks, different between passages."""
        return pattern.format(**{"name": self.name, "count": self.passage.count} | fields)

    def describe(self) -> str:
        """The place and the work, for messages."""
        return f"{self.name} with {self.work.text}" if self.work.text else self.name


class Turn:
    """The part of ``global_rank`` in a block, as the first rank of a node or ahead of all nodes.

    Args:
        block: The block, as this process passes through it.
        global_rank: The rank that has the turn.
        node: The node whose other ranks wait for it; None when all ranks do.
    """

    def __init__(self, block: Block, global_rank: int, node: str | None) -> None:
        self.block = block
        self.global_rank = global_rank
        self._node = node
        self._channel = block.channel
        self._turn = turn = "world" if node is None else f"node/{node}"
        self.report_key = block.key(keys.TURN_REPORT, turn=turn)
        self._end_key = block.key(keys.BLOCK_END)
        self._begun_key = block.key(keys.TURN_BEGUN, turn=turn)
        self._latest_key = block.key(keys.TURN_LATEST, turn=turn)
        self._num_beats_key = block.key(keys.TURN_NUM_BEATS, turn=turn)
        self._stop_heartbeat: Callable[[], None] = lambda: None
        self._num_seen = 0
        """Passages of the turn's rank that are known to have another work."""

        pulse = Pulse(self._channel, global_rank, self._num_beats_key)
        self.duty = Duty(global_rank, self.report_key, f"was done with {block.name}", pulse)

    @property
    def is_own(self) -> bool:
        """True in the process that has the turn."""
        return self.global_rank == self._channel.ranks.global_rank

    def begin(self) -> None:
        """Publish that the part is running, and what it works on, as the rank that has the turn."""
        work = self.block.work
        record = {"at": time.time(), "work": work.text, "digest": work.digest}
        self._channel.write(self._begun_key, json.dumps(record))
        self._channel.write(self._latest_key, str(self.block.passage.count))
        self._stop_heartbeat = start_heartbeat(self._channel, self._num_beats_key)

    def end(self, error: BaseException | None) -> None:
        """Publish how the part ended; a store that is lost must not hide the block's own exception."""
        try:
            report = OK
            if error is not None:  # the block's end first, since other nodes rely on it where there is a report
                rank = self._channel.describe_rank(self.global_rank)
                report = encode_failure(error, global_rank=self.global_rank, rank=rank, block=self.block.name)
                self._channel.claim(self._end_key, report)
            standing = self._channel.claim(self.report_key, report)
            if standing == OK and self._node is not None and not self._channel.ranks.are_on_one_node:
                self._channel.add(self.block.key(keys.BLOCK_NUM_NODES_DONE), 1)
        except RuntimeError as lost:  # the others notice that this rank has ended
            logger.error("rank %d cannot report how %s ended: %s", self.global_rank, self.block.name, lost)
        finally:
            self._stop_heartbeat()  # behind the report: who listens no more has ended

    def wait(self) -> int:
        """Wait, on a rank behind it, until the part has ended well; the count of that passage of the turn's rank.

        Passages with the same work belong together, else those of the same count. If that is not certain, what the rank
        in turn is in at that moment is waited for as well: this rank may have skipped passages and need that one.

        Raises as :func:`await_verdict`, and FirstRankError when a part failed or its rank has ended.
        """
        count, is_certain = self._find_passage()
        self._channel.passages.pair(self.block.name, self._turn, count)
        self._at(count)._await_report(self.block.options)
        running = self._read_latest()
        if running > count and not (is_certain and self._read_digest(running) != self.block.work.digest):
            self._at(running)._await_report(self.block.options.started())
        return count

    def check_that_it_comes_again(self) -> None:
        """Return once the turn's rank has come to this work, to which this rank comes again after its own error.

        Raises FirstRankError if it does not: it was done, and this rank would wait until it ends.
        """
        if self._poll_for_a_while(AGAIN_S, self._next_with_same_work) is None:
            raise FirstRankError(
                f"rank {self._channel.ranks.global_rank} failed by itself in {self.block.describe()} and comes there "
                f"again, but rank {self.global_rank}, which was done, does not within {AGAIN_S:g} s; try again inside "
                "of the block, not around it"
            )

    def read_report(self) -> str | None:
        """The report on the passage that this rank's belongs to; None before there is one."""
        same = self._next_with_same_work() if self.block.work.text else None
        if same is None:
            return self._channel.read(self.report_key)
        report = self._channel.read(self._key(keys.TURN_REPORT, same))
        if report == OK:
            self._channel.passages.pair(self.block.name, self._turn, same)
        return report

    def is_running(self) -> bool:
        """True while the turn's rank is in the passage that this rank's belongs to."""
        counts = [self.block.passage.count]
        if self.block.work.text and (same := self._next_with_same_work()) is not None:
            counts.append(same)
        return any(
            self._channel.read(self._key(keys.TURN_BEGUN, count)) is not None
            and self._channel.read(self._key(keys.TURN_REPORT, count)) is None
            for count in counts
        )

    def describe_wait(self) -> str:
        """Say which rank is waited for, and for how long its part has been running."""
        process = self._channel.process_of(self.global_rank)
        where = "" if process is None else f" on host {process.host}"
        begun = self._channel.read(self._begun_key)
        state = "which has not reached it"
        if begun is not None:
            state = f"running for {max(0, time.time() - json.loads(begun)['at']):.0f} s"
        waiting = self._channel.ranks.global_rank
        return f"rank {waiting} waits for rank {self.global_rank}{where}, {state} ({self.block.describe()})"

    def _key(self, pattern: str, count: int) -> str:
        """The key of a passage of the turn's rank."""
        return pattern.format(name=self.block.name, turn=self._turn, count=count)

    def _at(self, count: int) -> "Turn":
        """The turn of the same rank in another of its passages."""
        if count == self.block.passage.count:
            return self
        return Turn(replace(self.block, passage=Passage(count=count)), self.global_rank, self._node)

    def _await_report(self, options: WaitOptions) -> None:
        report = await_verdict(self._channel, self.report_key, lambda: [self.duty], self.describe_wait, options)
        if report != OK:
            with contextlib.suppress(RuntimeError):  # the store may have ended with the rank
                self._channel.claim(self._end_key, report)
            raise error_of(report)

    def _find_passage(self) -> tuple[int, bool]:
        """Wait until the passage that this rank's belongs to has begun; its count, and whether that is certain."""
        by_work = bool(self.block.work.text) and self.block.name not in self._channel.passages.differing
        same: int | None = None

        def find_same_work() -> str | None:
            nonlocal same
            same = self._next_with_same_work() if by_work else None
            return None if same is None else FOUND

        report = await_verdict(
            self._channel,
            self.report_key,
            lambda: [self.duty],
            self.describe_wait,
            self.block.options,
            contribute=find_same_work,
        )
        if report == OK and by_work:
            same = self._hold()
        return (self.block.passage.count, False) if same is None else (same, self.block.work.is_certain)

    def _hold(self) -> int | None:
        """Wait for a while for the turn's rank to come to this rank's work; the count of that passage."""
        tell_where(self.block, holds=self._next_with_same_work() is None)
        limit_s = HOLD_IN_LOOP_S if self.block.work.is_of_loop else HOLD_S
        same = self._poll_for_a_while(limit_s, self._next_with_same_work)
        tell_where(self.block)
        if same is None:
            self._channel.passages.differing.add(self.block.name)
            begun = self._channel.read(self._key(keys.TURN_BEGUN, self._read_latest()))
            logger.warning(
                "rank %d enters %s behind rank %d, which was there last with %s; from now on their passages there are "
                "paired by number alone. To pair them by what they are for, name the block: FirstRankPerNode(name=…)",
                self._channel.ranks.global_rank,
                self.block.describe(),
                self.global_rank,
                (json.loads(begun)["work"] if begun else "") or "no values",
            )
        return same

    def _next_with_same_work(self) -> int | None:
        """The first passage of the turn's rank with this rank's work, behind the last one that was paired."""
        last = self._channel.passages.last_paired(self.block.name, self._turn)
        for count in range(max(last + 1, self._num_seen), self._read_latest() + 1):
            if self._read_digest(count) == self.block.work.digest:
                return count
            self._num_seen = count + 1
        return None

    def _read_digest(self, count: int) -> str | None:
        begun = self._channel.read(self._key(keys.TURN_BEGUN, count))
        return None if begun is None else str(json.loads(begun)["digest"])

    def _read_latest(self) -> int:
        """The count of the passage that the turn's rank has begun last; −1 before its first."""
        return int(self._channel.read(self._latest_key) or -1)

    def _poll_for_a_while(self, limit_s: float, attempt: Callable[[], T | None]) -> T | None:
        """Poll while the turn's rank lives, for ``limit_s`` or until the limit of the entry."""
        options = self.block.options
        until = min(time.monotonic() + limit_s, options.deadline or math.inf)

        def attempt_or_end() -> tuple[T | None] | None:
            has_left = self._channel.has_left(self.global_rank)  # first: it may have begun it at its end
            found = attempt()
            return (found,) if found is not None or has_left or time.monotonic() >= until else None

        def describe() -> str:
            waiting, awaited = self._channel.ranks.global_rank, self.global_rank
            return f"rank {waiting} waits up to {limit_s:g} s for rank {awaited} to come to {self.block.describe()}"

        return poll(attempt_or_end, describe, replace(options, timeout_s=None, deadline=None))[0]


def tell_where(block: Block, *, holds: bool = False) -> None:
    """Publish where this first rank is, so that nodes do not wait for it at an earlier passage.

    ``holds``: It waits for another rank to come to its work.
    """
    ranks = block.channel.ranks
    if block.has_turn and not ranks.are_on_one_node:
        at = {"name": block.name, "count": block.passage.count, "holds": holds}
        block.channel.write(keys.RANK_AT.format(rank=ranks.global_rank), json.dumps(at))
