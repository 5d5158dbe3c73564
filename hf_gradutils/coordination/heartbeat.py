"""Signs of life of ranks whose process no other node could see ending.

Within a node the process table says who has ended, at once and without doubt. A rank of another node is judged by
whether it still writes. A thread cannot write while a C extension holds the GIL, so after a few seconds of silence the
kernel is asked instead (``lifeline``).
"""

import contextlib
import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.lifeline import Answer, Line, close_lifeline, drop_connections, open_lifeline
from hf_gradutils.coordination.process import is_alive

BEAT_S = 5.0
"""Seconds between two signs of life."""

LOOK_AFTER_S = 10.0
"""Seconds without one after which a rank's lifeline is looked at: two beats may be late on a busy host."""

ENDED_AFTER_S = 15.0
"""Seconds without one after which a rank whose lifeline refuses has ended."""

UNREACHABLE_S = 120.0
"""Seconds without one after which a rank counts as ended whose lifeline has answered before and does not now: its host
is gone, or cut off for longer than a switch takes to restart."""

SILENCE_S = 300.0
"""Seconds without one after which a rank counts as ended whose lifeline has never answered this one: many, since
loading a large JSON file can hold the GIL."""

REACH_S = 0.2
"""Longest pause for the first connection to a rank's lifeline."""

NUM_ATTEMPTS = 3
"""Attempts at that while the other still beats; behind a firewall all fail."""

NUM_PER_BEAT = 8
"""Nodes that a rank which is in a block itself tries to reach between two beats."""


def start_heartbeat(channel: Channel, key: str) -> Callable[[], None]:
    """Add to a counter every few seconds, in a thread, and listen, until the returned function is called.

    Call that behind the report of what the beats stand for: a rank that does not listen any more has ended. Does
    nothing where all ranks are on one node, which see each other end. Raises RuntimeError once the store is lost.
    """
    if channel.ranks.are_on_one_node:
        return lambda: None
    open_lifeline(channel)
    has_stopped = threading.Event()

    def beat() -> None:
        others = _FirstRanksToReach(channel)
        with contextlib.suppress(RuntimeError):  # the store is lost: the ranks that wait see that too
            while True:
                with contextlib.suppress(Exception):  # of a rank whose beats stop it is believed that it has ended
                    others.reach_some(has_stopped)
                if has_stopped.wait(BEAT_S):
                    return
                channel.add(key, 1)
                drop_connections()

    def stop() -> None:
        has_stopped.set()
        try:
            thread.join()
        finally:
            close_lifeline()

    thread = threading.Thread(target=beat, name="hf_gradutils-heartbeat", daemon=True)
    try:
        channel.add(key, 1)  # not in the thread, which may have to wait minutes for the GIL
        thread.start()
    except BaseException:
        close_lifeline()
        raise
    return stop


class _FirstRanksToReach:
    """The first ranks of other nodes, which a rank in a block connects to once while they live.

    It will wait for them behind the block, and one of them may have ended by then.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._num_read = 0
        self._waiting = deque[tuple[int, int]]()
        """Ranks that have not been reached, each with the number of attempts that are left."""

    def reach_some(self, has_stopped: threading.Event) -> None:
        """Try the next few of them, each ``NUM_ATTEMPTS`` times in all."""
        num_first_ranks = self._channel.count(keys.NUM_FIRST_RANKS)
        for _ in range(min(NUM_PER_BEAT, num_first_ranks - self._num_read)):
            self._read_next()
        for _ in range(min(NUM_PER_BEAT, len(self._waiting))):
            if has_stopped.is_set():
                return
            rank, num_attempts = self._waiting.popleft()
            line = Line(self._channel, rank)
            if line.is_published():  # else its turn is yet to come
                num_attempts -= 1
                line.look(wait_s=REACH_S)
            if num_attempts > 0 and not line.has_been_reached:
                self._waiting.append((rank, num_attempts))

    def _read_next(self) -> None:
        record = self._channel.read(keys.FIRST_RANK.format(index=self._num_read))
        if record is None:  # it has been counted, and is about to be written
            return
        rank = int(json.loads(record)["first_rank"])
        process = self._channel.process_of(rank)
        self._num_read += 1
        if process is not None and is_alive(process) is None and not Line(self._channel, rank).has_been_reached:
            self._waiting.append((rank, NUM_ATTEMPTS))


class Pulse:
    """The heartbeat of another rank, as this rank sees it."""

    def __init__(self, channel: Channel, global_rank: int, key: str) -> None:
        self._channel = channel
        self._global_rank = global_rank
        self._key = key
        self._num_beats = 0
        self._changed_at = time.monotonic()
        self._line = Line(channel, global_rank)
        self._num_attempts = 0

    def has_stopped(self) -> bool:
        """True once that rank, having beaten, has ended or is unreachable. False where its process can be seen.

        On other nodes, local ranks 0 ask the kernel, which takes a few thousand connections, and the others follow
        their verdict; only where none comes, they ask, too.
        """
        process = self._channel.process_of(self._global_rank)
        if process is None or is_alive(process) is not None:
            return False
        num_beats, now = self._channel.count(self._key), time.monotonic()
        if num_beats != self._num_beats:
            self._num_beats, self._changed_at = num_beats, now
            self._line.close()
        silent_s = now - self._changed_at
        if num_beats == 0:
            return False
        asks_after_s = LOOK_AFTER_S if self._asks_early else SILENCE_S
        if silent_s <= asks_after_s:
            self._reach()
            return False
        # For a moment: who watches many nodes may come back to this one after a minute only.
        answer = self._line.look(wait_s=REACH_S)
        if answer is Answer.LIVES:
            return False
        if answer is Answer.HAS_ENDED and silent_s > ENDED_AFTER_S:
            # Read again: the rank may have resumed and ended normally since.
            return self._channel.count(self._key) == num_beats
        limit_s = UNREACHABLE_S if self._line.has_been_reached else SILENCE_S
        return silent_s > max(limit_s, asks_after_s + LOOK_AFTER_S)  # a first answer takes a moment

    @functools.cached_property
    def _asks_early(self) -> bool:
        """Also on all ranks behind the first of their own node, where each has a PID namespace of its own."""
        ranks = self._channel.ranks
        first_rank_key = keys.NODE_FIRST_RANK.format(node=ranks.node)
        return not ranks.local_rank or self._channel.read(first_rank_key) == str(self._global_rank)

    def _reach(self) -> None:
        """Connect once while that rank lives, or its lifeline's refusal could not be believed later."""
        if self._asks_early and not self._line.has_been_reached and self._num_attempts < NUM_ATTEMPTS:
            self._num_attempts += 1
            self._line.look(wait_s=REACH_S)
            self._line.close()
