"""Signs of life of ranks that no other rank on their node could see dying.

Within a node the process table says who has ended, at once and without doubt. A rank that is alone on its
node can only be judged from afar, by whether it still writes. A thread cannot write while a C extension
holds the GIL, so the limit is generous.
"""

import contextlib
import threading
import time
from collections.abc import Callable

from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.process import is_alive

BEAT_S = 5.0
"""Seconds between two signs of life."""

SILENCE_S = 300.0
"""Seconds without one after which a rank counts as ended: many, since loading a large JSON file can hold the GIL."""


def start_heartbeat(channel: Channel, key: str) -> Callable[[], None]:
    """Add to a counter every few seconds, in a thread, until the returned function is called.

    Does nothing on a rank that shares its node with others, which would see it end.
    """
    if (channel.ranks.local_size or 1) > 1:
        return lambda: None
    has_stopped = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the store is lost: the ranks that wait see that too
            channel.add(key, 1)
            while not has_stopped.wait(BEAT_S):
                channel.add(key, 1)

    def stop() -> None:
        has_stopped.set()
        thread.join()

    thread = threading.Thread(target=beat, name="hf_gradutils-heartbeat", daemon=True)
    thread.start()
    return stop


class Pulse:
    """The heartbeat of another rank, as this rank sees it."""

    def __init__(self, channel: Channel, global_rank: int, key: str) -> None:
        self._channel = channel
        self._global_rank = global_rank
        self._key = key
        self._num_beats = 0
        self._changed_at = time.monotonic()

    def has_stopped(self) -> bool:
        """True once that rank, having beaten, has been silent for too long. False where its process can be seen."""
        process = self._channel.process_of(self._global_rank)
        if process is None or is_alive(process) is not None:
            return False
        num_beats, now = self._channel.count(self._key), time.monotonic()
        if num_beats != self._num_beats:
            self._num_beats, self._changed_at = num_beats, now
        return num_beats > 0 and now - self._changed_at > SILENCE_S
