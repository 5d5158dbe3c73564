"""What ranks tell each other: keys that all of them see, who they are, and waiting for either.

Nothing here waits inside the store. That would block every other call on the same client (torch 2.13) and
defer Ctrl-C to its end; :func:`poll` waits in Python.

The store of torchrun's agent outlives a restart of the ranks, so keys belong to an attempt. Which one it is the ranks
find out themselves: torchrun counts restarts on the node at fault only (pytorch#108158).
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # documented there

from hf_gradutils.coordination.process import ProcessIdentity, current_process, has_ended
from hf_gradutils.coordination.ranks import Ranks
from hf_gradutils.errors import LauncherError

logger = logging.getLogger("hf_gradutils.channel")

T = TypeVar("T")

ATTEMPT = "attempt"
"""The key of the present attempt's number, which counts from 0."""


class Channel:
    """Keys that all ranks of the job see. No method blocks; all raise RuntimeError once the store is lost."""

    def __init__(self, store: Store, *, ranks: Ranks, origin: str, server: Store | None, num_restarts: str) -> None:
        self.ranks = ranks
        self.origin = origin
        """Where the store lives, for messages."""

        self.process = current_process()
        self._attempts = store
        self._num_restarts = num_restarts
        self._join_attempt()
        self.server = server
        """The object that keeps the server alive, if that lives in this process; None if it cannot."""

        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._processes = {ranks.global_rank: self.process}

    def read(self, key: str) -> str | None:
        """The value, None if nobody wrote the key yet."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def write(self, key: str, value: str) -> None:
        """Set a value that no other rank writes."""
        self._store.set(key, value)

    def claim(self, key: str, value: str) -> str:
        """Write unless somebody did; the value that stands. ``value`` must not be empty."""
        return self._store.compare_set(key, "", value).decode()

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that starts at 0; the new value."""
        return self._store.add(key, amount)

    def count(self, key: str) -> int:
        """What was added to a counter so far."""
        return int(self.read(key) or 0)

    def next_count(self, name: str) -> int:
        """0, 1, 2, …: how often this process has asked for this name. No communication."""
        with self._counts_lock:
            self._counts[name] += 1
            return self._counts[name] - 1

    def process_of(self, global_rank: int) -> ProcessIdentity | None:
        """Who that rank is, None until it has opened its channel."""
        if global_rank not in self._processes:
            record = self.read(f"process/{global_rank}")
            if record is None:
                return None
            self._processes[global_rank] = ProcessIdentity(**json.loads(record))
        return self._processes[global_rank]

    def process_if_known(self, global_rank: int) -> ProcessIdentity | None:
        """As :meth:`process_of`, from memory: works when the store is lost."""
        return self._processes.get(global_rank)

    def has_left(self, global_rank: int) -> bool:
        """Whether that rank is known to have ended, by its farewell or by the death of its process.

        Raises LauncherError as :meth:`check_attempt`.
        """
        self.check_attempt()
        process = self.process_of(global_rank)
        return (process is not None and has_ended(process)) or self.read(f"left/{global_rank}") is not None

    def say_farewell(self) -> None:
        """Tell the others that this rank will publish nothing more."""
        self.write(f"left/{self.ranks.global_rank}", "left")

    def introduce(self) -> None:
        """Write down who this rank is, in the present attempt.

        It begins one if its node's restart count is another by now, or if the rank was a process that has ended.
        Raises LauncherError when another process, which has not ended, says that it is this rank.
        """
        while not self._claim_rank():
            self._attempts.compare_set(ATTEMPT, str(self._attempt), str(self._attempt + 1))
            self._join_attempt()
        # Counted in this order: once all ranks are, all nodes are.
        rank = str(self.ranks.global_rank)
        if self.claim(f"node/{self.ranks.node}/named_by", rank) == rank:
            self.add("num_nodes_named", 1)
        self.add("num_ranks_introduced", 1)

    def check_attempt(self) -> None:
        """Raise LauncherError when ranks on other nodes have begun another attempt: nobody will come here any more."""
        may_begin_apart = self.ranks.local_size != self.ranks.world_size
        if may_begin_apart and (newest := self._attempts.add(ATTEMPT, 0)) != self._attempt:
            raise LauncherError(
                f"global rank {self.ranks.global_rank} on {self.process} is in attempt {self._attempt} of the job, but "
                f"by {self.origin} other nodes are in attempt {newest}: the launcher has restarted those only"
            )

    def _join_attempt(self) -> None:
        self._attempt = self._attempts.add(ATTEMPT, 0)
        self._store = PrefixStore(f"{self._attempt}/", self._attempts)

    def _claim_rank(self) -> bool:
        """Whether this process is the rank now; False when the attempt is one that the launcher has ended."""
        if self.claim(f"node/{self.ranks.node}/num_restarts", self._num_restarts) != self._num_restarts:
            return False
        rank = self.ranks.global_rank
        other = ProcessIdentity(**json.loads(self.claim(f"process/{rank}", json.dumps(asdict(self.process)))))
        if other != self.process and not has_ended(other):
            raise LauncherError(
                f"two processes call themselves global rank {rank}: {other} and {self.process}. A helper "
                "process that inherited a rank's variables must not take part; start it without RANK and "
                "WORLD_SIZE, or call this in the rank's own process"
            )
        return other == self.process


def poll(
    attempt: Callable[[], T | None],
    describe: Callable[[], str],
    *,
    poll_s: float = 0.25,
    log_every_s: float = 60.0,
    timeout_s: float | None = None,
) -> T:
    """Call ``attempt`` until it returns something other than None; a signal ends the wait at once.

    Args:
        attempt: Must not block.
        describe: What is waited for; logged as a warning every ``log_every_s``.
        poll_s: Longest pause between attempts; the first ones follow faster.
        log_every_s: Seconds between log lines.
        timeout_s: Seconds after which TimeoutError is raised; None waits for ever.
    """
    start = time.monotonic()
    next_log_s, pause_s = log_every_s, min(0.01, poll_s)
    while (found := attempt()) is None:
        waited_s = time.monotonic() - start
        if timeout_s is not None and waited_s >= timeout_s:
            raise TimeoutError(f"{describe()}; gave up after {timeout_s:g} s")
        if waited_s >= next_log_s:
            logger.warning("%s", describe())
            next_log_s += log_every_s
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, poll_s)
    return found
