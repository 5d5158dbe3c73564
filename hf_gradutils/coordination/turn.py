"""A turn: the part of one rank in a block, which the ranks behind it wait for.

The rank that has the turn publishes how its part ended and does not wait for anybody to read it. The ranks
behind it poll for that, and for the death of its process, so they learn of a failure at once and of a slow
success whenever it comes.
"""

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hf_gradutils.coordination.channel import Channel, poll
from hf_gradutils.coordination.heartbeat import Heartbeat, Pulse
from hf_gradutils.coordination.process import has_ended
from hf_gradutils.errors import FirstRankError

logger = logging.getLogger("hf_gradutils.first_rank")

T = TypeVar("T")

OK = "ok"
"""The report of a part that ended well; any other report is the text of an error."""

MAX_REPORT_CHARS = 20_000
"""Longest message and traceback that are published; a longer message loses its end, a traceback its start."""

DEATH_GRACE_S = 1.0
"""A dying process closes its connections a moment before it counts as ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One passage of all ranks through a block."""

    channel: Channel
    name: str
    count: int
    """How often this rank has entered a block of that name before."""

    @property
    def key(self) -> str:
        """The same on all ranks, different between passages."""
        return f"block/{self.name}/{self.count}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How a rank waits; as documented for ``FirstRankPerNode``."""

    poll_s: float
    log_every_s: float
    timeout_s: float | None

    def wait(self, attempt: Callable[[], T | None], describe: Callable[[], str]) -> T:
        """What ``attempt`` returns once that is not None. Raises FirstRankError after ``timeout_s``."""
        try:
            return poll(attempt, describe, poll_s=self.poll_s, log_every_s=self.log_every_s, timeout_s=self.timeout_s)
        except TimeoutError as error:
            raise FirstRankError(str(error)) from None


class Turn:
    """The part of ``global_rank`` in a block.

    Args:
        block: The block.
        key: The same on all ranks, different between the turns of a block.
        global_rank: Who has the turn.
    """

    def __init__(self, block: Block, key: str, global_rank: int) -> None:
        self.block = block
        self.key = f"{block.key}/{key}"
        self.global_rank = global_rank
        self._channel = block.channel
        self._pulse = Pulse(self._channel, global_rank)
        self._heartbeat: Heartbeat | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this process has the turn."""
        return self.global_rank == self._channel.ranks.global_rank

    # ---- The rank that has the turn ----

    def begin(self) -> None:
        """Say that the part is running."""
        self._channel.write(f"{self.key}/run", repr(time.time()))
        self._heartbeat = Heartbeat.where_needed(self._channel)

    def end(self, error: BaseException | None) -> None:
        """Say how the part ended; a store that is lost must not hide the block's own exception."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        try:
            self.publish(OK if error is None else self._describe_failure(error))
        except RuntimeError as lost:  # the others notice that this rank has ended
            logger.error("rank %d cannot tell how %s ended: %s", self.global_rank, self.block.name, lost)

    # ---- The ranks behind it ----

    def wait(self, patience: Patience) -> None:
        """Return once the part has ended well.

        Raises:
            FirstRankError: it failed, its rank has ended, or patience has.
        """
        try:
            report = patience.wait(self.look, self.describe_wait)
        except RuntimeError as lost:
            # The rank may host the store: then its death is what ended both.
            process = self._channel.process_if_known(self.global_rank)
            died = process is not None and has_ended(process, grace_s=DEATH_GRACE_S)
            raise FirstRankError(self._describe_death() if died else describe_loss(self.block)) from lost
        if report != OK:
            raise FirstRankError(report)

    def look(self) -> str | None:
        """How the part ended, None while it has not."""
        report = self._channel.read(f"{self.key}/done")
        if report is None and (self._channel.has_left(self.global_rank) or self._pulse.has_stopped()):
            # It may have finished between the two looks: what it published last counts.
            report = self._channel.read(f"{self.key}/done") or self.publish(self._describe_death())
        return report

    def publish(self, report: str) -> str:
        """Write the report, and if it is a failure, where those who wait for all nodes look; the one that stands."""
        standing = self._channel.claim(f"{self.key}/done", report)
        if standing != OK:
            self._channel.claim(f"{self.block.key}/end", standing)
        return standing

    # ---- Words ----

    def _describe_failure(self, error: BaseException) -> str:
        what = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
        report = (
            f"{self._describe_rank()} failed in {self.block.name}: {what[:MAX_REPORT_CHARS]}\n\n"
            f"Its traceback:\n{trace[-MAX_REPORT_CHARS:]}"
        )
        # What a file name brought into a message may not be encodable.
        return report.encode(errors="backslashreplace").decode()

    def _describe_death(self) -> str:
        return f"{self._describe_rank()} has ended (killed, or left early) before it was done with {self.block.name}"

    def _describe_rank(self) -> str:
        process = self._channel.process_if_known(self.global_rank)
        return f"rank {self.global_rank} of {self._channel.ranks.world_size} on {process or 'a host unknown so far'}"

    def describe_wait(self) -> str:
        """What this rank waits for, and whether that has begun."""
        process = self._channel.process_of(self.global_rank)
        where = "" if process is None else f" on host {process.host}"
        since = self._channel.read(f"{self.key}/run")
        state = (
            "which has not reached it" if since is None else f"running for {max(0, time.time() - float(since)):.0f} s"
        )
        waiting = self._channel.ranks.global_rank
        return f"rank {waiting} waits for rank {self.global_rank}{where}, {state} ({self.block.name})"


def describe_loss(block: Block) -> str:
    """What a rank says that has lost the store."""
    channel = block.channel
    return (
        f"rank {channel.ranks.global_rank} at {block.name} lost {channel.origin}: its host has ended, so nobody "
        "can tell any more whether the first rank succeeds"
    )
