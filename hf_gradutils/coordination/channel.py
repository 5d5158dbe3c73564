"""Keys that all ranks of the job see, and the identities of the ranks.

The store of torchrun's agent outlives a restart of the ranks, so keys belong to an attempt. Ranks find its number out
themselves: torchrun counts restarts on the node at fault only (pytorch#108158).
"""

import json
import threading
from collections import Counter
from dataclasses import asdict

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # documented there

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.passages import Passages
from hf_gradutils.coordination.process import ProcessIdentity, current_process, has_ended
from hf_gradutils.coordination.ranks import Ranks
from hf_gradutils.errors import LauncherError


class Channel:
    """Keys that all ranks of the job see. No method blocks; all raise RuntimeError once the store is lost."""

    def __init__(self, store: Store, *, ranks: Ranks, origin: str, server: Store | None, num_restarts: str) -> None:
        self.ranks = ranks
        self.origin = origin
        """The place of the store, for messages."""

        self.process = current_process()
        self._attempts = store
        self._num_restarts = num_restarts
        self._join_attempt()
        self.server = server
        """The object that keeps the server alive, if that lives in this process; None if it cannot."""

        self.passages = Passages()
        self.reached: dict[int, set[str]] = {}
        """Global rank → addresses at which its lifeline has answered this process."""

        self.seen_directories: dict[tuple[str, ...], bool] = {}
        """A block's name and its directories → whether they have turned out to be global rank 0's, too."""

        self.num_asked: Counter[str] = Counter()
        """A block's name → how often global rank 0 has asked for its directories, as far as this rank knows."""

        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._processes = {ranks.global_rank: self.process}

    def read(self, key: str) -> str | None:
        """The value, None while there is none."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def write(self, key: str, value: str) -> None:
        """Set a value that no other rank writes."""
        self._store.set(key, value)

    def claim(self, key: str, value: str) -> str:
        """Write unless another rank has; the value that stands. ``value`` must not be empty."""
        return self._store.compare_set(key, "", value).decode()

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that starts at 0; the new value."""
        return self._store.add(key, amount)

    def count(self, key: str) -> int:
        """The value of a counter."""
        return int(self.read(key) or 0)

    def next_count(self, name: str) -> int:
        """0, 1, 2, …: how often this process has called this with that name before. No communication."""
        with self._counts_lock:
            self._counts[name] += 1
            return self._counts[name] - 1

    def process_of(self, global_rank: int) -> ProcessIdentity | None:
        """The process of that rank, None until it has opened its channel."""
        if global_rank not in self._processes:
            record = self.read(keys.RANK_PROCESS.format(rank=global_rank))
            if record is None:
                return None
            self._processes[global_rank] = ProcessIdentity(**json.loads(record))
        return self._processes[global_rank]

    def cached_process_of(self, global_rank: int) -> ProcessIdentity | None:
        """The process of that rank if it has been read before: works when the store is lost."""
        return self._processes.get(global_rank)

    def describe_rank(self, global_rank: int) -> str:
        """Rank, host and process for messages, from what has been read before."""
        process = self.cached_process_of(global_rank)
        return f"rank {global_rank} of {self.ranks.world_size} on {process or 'a host unknown so far'}"

    def has_left(self, global_rank: int) -> bool:
        """True if that rank has ended, by its farewell or by the death of its process.

        Raises LauncherError as :meth:`check_attempt`.
        """
        self.check_attempt()
        process = self.process_of(global_rank)
        has_died = process is not None and has_ended(process)
        return has_died or self.read(keys.RANK_LEFT.format(rank=global_rank)) is not None

    def write_farewell(self) -> None:
        """Announce that this rank will write nothing more."""
        self.write(keys.RANK_LEFT.format(rank=self.ranks.global_rank), "left")

    def write_identity(self) -> None:
        """Write down the process of this rank, in the present attempt.

        It begins an attempt if its node's restart count is another by now, or if the rank was a process that has ended.
        Raises LauncherError when another process, which has not ended, claims the same rank.
        """
        while not self._claim_rank():
            self._attempts.compare_set(keys.ATTEMPT, str(self._attempt), str(self._attempt + 1))
            self._join_attempt()
        # Counted in this order: once all ranks are, all nodes are.
        rank = str(self.ranks.global_rank)
        if self.claim(keys.NODE_COUNTED_BY.format(node=self.ranks.node), rank) == rank:
            self.add(keys.NUM_NODES, 1)
        self.add(keys.NUM_RANKS, 1)

    def check_attempt(self) -> None:
        """Raise LauncherError when other nodes have begun another attempt: they will not come here any more."""
        if not self.ranks.are_on_one_node and (newest := self._attempts.add(keys.ATTEMPT, 0)) != self._attempt:
            raise LauncherError(
                f"global rank {self.ranks.global_rank} on {self.process} is in attempt {self._attempt} of the job, but "
                f"by {self.origin} other nodes are in attempt {newest}: the launcher has restarted those only"
            )

    def _join_attempt(self) -> None:
        self._attempt = self._attempts.add(keys.ATTEMPT, 0)
        self._store = PrefixStore(keys.ATTEMPT_PREFIX.format(attempt=self._attempt), self._attempts)

    def _claim_rank(self) -> bool:
        """Claim the rank for this process; False when the attempt is one that the launcher has ended."""
        num_restarts = self.claim(keys.NODE_NUM_RESTARTS.format(node=self.ranks.node), self._num_restarts)
        if num_restarts != self._num_restarts:
            return False
        rank = self.ranks.global_rank
        record = self.claim(keys.RANK_PROCESS.format(rank=rank), json.dumps(asdict(self.process)))
        other = ProcessIdentity(**json.loads(record))
        if other != self.process and not has_ended(other):
            raise LauncherError(
                f"two processes call themselves global rank {rank}: {other} and {self.process}. A helper "
                "process that inherited a rank's variables must not take part; start it without RANK and "
                "WORLD_SIZE, or call this in the rank's own process"
            )
        return other == self.process
