"""Counts of this process's passages through each block, and the other ranks' passages that they were paired with."""

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """One passage of this rank through a block."""

    count: int
    """Number of earlier passages of this rank there."""

    is_repeated: bool = False
    """True if this rank failed by itself in its previous passage with the same work."""


class Passages:
    """The passages of one process. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._failed: set[tuple[str, str]] = set()
        self._paired: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self.differing: set[str] = set()
        """Blocks in which the ranks' values have turned out to differ."""

    def begin(self, name: str, digest: str) -> Passage:
        """Count one more passage, with the work of that digest."""
        with self._lock:
            passage = Passage(count=self._counts[name], is_repeated=(name, digest) in self._failed)
            self._failed.discard((name, digest))
            self._counts[name] += 1
        return passage

    def fail(self, name: str, digest: str) -> None:
        """Note that this rank has failed by itself, behind a first rank that has done well."""
        with self._lock:
            self._failed.add((name, digest))

    def have_begun(self, name: str, count: int) -> bool:
        """True if this rank has come to that passage."""
        with self._lock:
            return self._counts[name] > count

    def pair(self, name: str, turn: str, count: int) -> None:
        """Note the passage of the turn's rank, by its count, that this rank's was."""
        with self._lock:
            self._paired[name, turn] = count

    def last_paired(self, name: str, turn: str) -> int:
        """The count of the last one; −1 before the first."""
        with self._lock:
            return self._paired.get((name, turn), -1)
