"""Signs of life for ranks that no other rank on their node could see dying.

Within a node the process table says who has ended, at once and without doubt. A rank that is alone on its
node can only be judged from afar, by whether it still writes. A thread cannot write while a C extension
holds the GIL, so the limit is generous.
"""

import threading
import time
from typing import Self

from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.process import is_alive

BEAT_S = 5.0
"""Between two signs of life."""

SILENCE_S = 300.0
"""After so long without one a rank counts as ended: long, since loading a large JSON file can hold the GIL."""


class Heartbeat:
    """A thread that writes a new number every few seconds, from creation to :meth:`stop`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hf_gradutils-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def where_needed(cls, channel: Channel) -> Self | None:
        """A heartbeat if other nodes may wait for this rank and it may be alone on its own."""
        ranks = channel.ranks
        is_needed = ranks.local_size is None or (ranks.local_size == 1 < ranks.world_size)
        return cls(channel) if is_needed else None

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            try:
                self._channel.add(f"beat/{self._channel.ranks.global_rank}", 1)
            except RuntimeError:  # the store is lost: the ranks that wait see that too
                return
            if self._stop.wait(BEAT_S):
                return


class Pulse:
    """Watches another rank's heartbeat."""

    def __init__(self, channel: Channel, global_rank: int) -> None:
        self._channel = channel
        self._global_rank = global_rank
        self._beats = 0
        self._changed_at: float | None = None

    def has_stopped(self) -> bool:
        """Whether that rank, having beaten once, has been silent for too long. False where it can be seen itself."""
        process = self._channel.process_of(self._global_rank)
        if process is None or is_alive(process) is not None:
            return False
        beats, now = self._channel.count(f"beat/{self._global_rank}"), time.monotonic()
        if beats != self._beats or self._changed_at is None:
            self._beats, self._changed_at = beats, now
        return beats > 0 and now - self._changed_at > SILENCE_S
