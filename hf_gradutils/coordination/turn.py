"""A turn: the part of one rank in a block, which the ranks behind it wait for.

The rank that has the turn publishes how its part ended and does not wait for readers. The ranks behind it poll for
that and for the death of its process, so they learn of a failure at once and of a slow success whenever it comes.
"""

import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.heartbeat import Pulse, start_heartbeat
from hf_gradutils.coordination.waiting import OK, Duty, WaitOptions, await_verdict
from hf_gradutils.errors import FirstRankError

logger = logging.getLogger("hf_gradutils.first_rank")

MAX_REPORT_CHARS = 20_000
"""Longest message and traceback that are published; a longer message loses its end, a traceback its start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One passage of all ranks through a block."""

    channel: Channel
    name: str
    count: int
    """Number of times that this rank has entered a block of that name before."""

    options: WaitOptions

    def key(self, pattern: str, **fields: object) -> str:
        """Fill a pattern: the same key on all ranks, different between passages."""
        return pattern.format(name=self.name, count=self.count, **fields)


class Turn:
    """The part of ``global_rank`` in a block, as the first rank of a node or ahead of all nodes.

    Args:
        block: The block.
        global_rank: The rank that has the turn.
        node: The node whose other ranks wait for it; None when all ranks do.
    """

    def __init__(self, block: Block, global_rank: int, node: str | None) -> None:
        self.block = block
        self.global_rank = global_rank
        self._node = node
        self._channel = block.channel
        turn = "world" if node is None else f"node/{node}"
        self.report_key = block.key(keys.TURN_REPORT, turn=turn)
        self._end_key = block.key(keys.BLOCK_END)
        self._begun_at_key = block.key(keys.TURN_BEGUN_AT, turn=turn)
        self._num_beats_key = block.key(keys.TURN_NUM_BEATS, turn=turn)
        self._stop_heartbeat: Callable[[], None] = lambda: None
        pulse = Pulse(self._channel, global_rank, self._num_beats_key)
        self.duty = Duty(global_rank, self.report_key, f"was done with {block.name}", pulse)

    @property
    def is_own(self) -> bool:
        """True in the process that has the turn."""
        return self.global_rank == self._channel.ranks.global_rank

    def begin(self) -> None:
        """Publish that the part is running, as the rank that has the turn."""
        self._channel.write(self._begun_at_key, repr(time.time()))
        self._stop_heartbeat = start_heartbeat(self._channel, self._num_beats_key)

    def end(self, error: BaseException | None) -> None:
        """Publish how the part ended; a store that is lost must not hide the block's own exception."""
        self._stop_heartbeat()
        try:
            report = OK if error is None else self._describe_failure(error)
            if report != OK:  # first, since other nodes rely on it where there is a report
                self._channel.claim(self._end_key, report)
            standing = self._channel.claim(self.report_key, report)
            if standing == OK and self._node is not None and not self._channel.ranks.are_on_one_node:
                self._channel.add(self.block.key(keys.BLOCK_NUM_NODES_DONE), 1)
        except RuntimeError as lost:  # the others notice that this rank has ended
            logger.error("rank %d cannot report how %s ended: %s", self.global_rank, self.block.name, lost)

    def wait(self) -> None:
        """Return once the part has ended well, on a rank behind it.

        Raises as :func:`await_verdict`, and FirstRankError when the part failed or its rank has ended.
        """
        report = await_verdict(
            self._channel, self.report_key, lambda: [self.duty], self.describe_wait, self.block.options
        )
        if report != OK:
            with contextlib.suppress(RuntimeError):  # the store may have ended with the rank
                self._channel.claim(self._end_key, report)
            raise FirstRankError(report)

    def describe_wait(self) -> str:
        """Say which rank is waited for, and for how long its part has been running."""
        process = self._channel.process_of(self.global_rank)
        where = "" if process is None else f" on host {process.host}"
        since = self._channel.read(self._begun_at_key)
        state = "which has not reached it"
        if since is not None:
            state = f"running for {max(0, time.time() - float(since)):.0f} s"
        waiting = self._channel.ranks.global_rank
        return f"rank {waiting} waits for rank {self.global_rank}{where}, {state} ({self.block.name})"

    def _describe_failure(self, error: BaseException) -> str:
        rank = self._channel.describe_rank(self.global_rank)
        what = "".join(traceback.format_exception_only(error)).strip()[:MAX_REPORT_CHARS]
        trace = "".join(traceback.format_exception(error))[-MAX_REPORT_CHARS:]
        report = f"{rank} failed in {self.block.name}: {what}\n\nIts traceback:\n{trace}"
        # A file name in the message may not be encodable.
        return report.encode(errors="backslashreplace").decode()
