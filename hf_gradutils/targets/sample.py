"""A few rows of the data set that tell what the first batch cannot: a mean over targets from other means.

A batch of one row cannot be cut, and one with rows of equal length or one class passes for too much. Rows from all over
the data set, collated as in training, differ more. Every rank takes the same rows.
"""

import copy
import queue
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_gradutils._undisturbed import seeded
from hf_gradutils.targets.contrast import NO_RIVAL, Amounts, amounts_of, contrast_of, least_contrast
from hf_gradutils.targets.counter import TargetCounter, is_class_labels, labels_of
from hf_gradutils.targets.mixture import POSITION, Traits, is_of_one_kind, mixed, order_of, telling, traits_of
from hf_gradutils.targets.probe import Parts, cut_after
from hf_gradutils.targets.rows import count_rows, entries_of, is_divisible

NUM_CANDIDATES = 64
"""Rows that are looked at, from the first to the last of the data set."""
_MOST_ROWS = 4
"""Rows of each part; that many if a row has one class."""
_SMALL = 2**12
"""Elements of all tensors of a batch that is small for any model."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row, and what it was found to have when it was collated alone."""

    row: Any
    kind: tuple[str, int]
    """What sort of labels it has; rows of one batch have the same."""
    size: int
    """Elements of its tensors."""
    amounts: Amounts | None
    """None if it cannot be counted."""
    traits: Traits


class DatasetRows:
    """Rows of a map-style data set, read once. At most one batch of a row is there at a time.

    Args:
        dataset: Anything; without a length, or with rows that cannot be read one by one, it gives no rows.
        collate: The loader's.
        prepare: Collated batch → a batch as it is trained on.
        device: Of the random states to restore.
        batch_sampler: The loader's; None if it has none.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        prepare: Callable[[Any], Any],
        device: Any,
        batch_sampler: Any = None,
    ):
        self._collate, self._prepare, self._device = collate, prepare, device
        self._order = order_of(batch_sampler)
        self.rows: list[Any] = []
        """Empty if the data set cannot be used."""
        self._counter: TargetCounter | None = None
        self._candidates: list[Candidate] = []
        with seeded(device, 0):
            self.rows = [] if _draws_rows(dataset) else _rows_of(dataset)

    def batch(self, rows: list[Any], *, seed: int = 0) -> Any:
        """Collate rows as in training; the same random numbers for the same seed."""
        with seeded(self._device, seed):
            # Copies, because a row is collated more than once, and a collator may take entries out.
            return self._prepare(self._collate([copy.copy(row) for row in rows]))

    @property
    def is_shuffled(self) -> bool:
        """Any rows may come together."""
        return self._order == "shuffled"

    def forget(self) -> None:
        """Free the rows that were not chosen."""
        self.rows, self._candidates, self._counter = [], [], None

    def first_of(self, is_wanted: Callable[[Any], bool]) -> Any | None:
        """The first batch of one row that is wanted."""
        for row in self.rows:
            try:
                batch = self.batch([row])
            except Exception:  # of the user's collator
                return None
            if is_wanted(batch):
                return batch
            del batch  # before the next one is made
        return None

    def choose(self, counter: TargetCounter, *, batch_size: int) -> "Sample | None":
        """The rows of the most frequent kind that tell most; None if there are fewer than two with targets.

        Args:
            counter: Batch → targets.
            batch_size: Of training. Where a row has many labels, all chosen rows are not much larger than two batches.
        """
        candidates = self._look(counter)
        kinds = Counter(found.kind for found in candidates)
        if not kinds:
            return None
        kind = max(kinds, key=lambda name: kinds[name])
        looked_at = [(found, found.amounts) for found in candidates if found.kind == kind]
        if any(amounts is None for _, amounts in looked_at):
            return None
        counted = [(found, amounts) for found, amounts in looked_at if amounts is not None and amounts.targets > 0]
        if len(counted) < 2:
            return None
        if kind == ("classes", 1):
            first, second = _of_different_classes(counted)
        else:
            first, second = _of_different_lengths(counted, batch_size)
        return Sample(
            self, [found.row for found, _ in first], [found.row for found, _ in second], _contrast(first, second)
        )

    def mix(self, batch: Any, counter: TargetCounter, *, batch_size: int, num_blocks: int) -> "Sample | None":
        """Rows of two kinds in other proportions; None if there is one kind, or if batches may never mix them so.

        Args:
            batch: The first of training. Where rows are not shuffled it tells: one with rows of several kinds may have
                them in the only proportion there is.
            counter: Batch → targets.
            batch_size: As for :meth:`choose`.
            num_blocks: As in :mod:`hf_gradutils.targets.rows`.
        """
        if self._order == "batches":
            return None
        candidates = self._look(counter)
        traits = [found.traits for found in candidates]
        if self._order != "shuffled" and not is_of_one_kind(batch, telling(traits), counter, num_blocks=num_blocks):
            return None
        if self._order != "the user's":
            halves = [2 * place < len(traits) for place in range(len(traits))]
            traits = [{**own, POSITION: half} for own, half in zip(traits, halves, strict=True)]
        sizes = [found.size for found in candidates]
        places = mixed(traits, sizes, room=_room(sizes, batch_size))
        if places is None:
            return None
        first, second = ([candidates[place].row for place in part] for part in places)
        return Sample(self, first, second, NO_RIVAL)

    def _look(self, counter: TargetCounter) -> list[Candidate]:
        """What each row has; one pass over the rows for each counter. Host syncs: a few per row."""
        if self._counter != counter:
            try:
                self._candidates = [_looked_at(row, self.batch([row]), counter) for row in self.rows]
            except Exception:  # whatever a user's collator raises, it trains without
                self._candidates = []
            self._counter = counter
        return self._candidates


def _rows_of(dataset: Any) -> list[Any]:
    """Some rows, from the first to the last; none if they cannot be read, or if reading uses up a list of them."""
    lists = [(part, list(part)) for part in getattr(dataset, "__dict__", {}).values() if type(part) is list]
    try:
        # A copy, because some data sets open files when they are first read, which workers must not inherit.
        dataset = copy.copy(dataset)
        last = len(dataset) - 1
        indices = sorted({round(i * last / (NUM_CANDIDATES - 1)) for i in range(NUM_CANDIDATES)} if last else {0})
        rows = [dataset[index] for index in indices]
    except Exception:  # whatever a user's data set raises, it trains without
        rows = []
    used_up = [(now, before) for now, before in lists if len(now) != len(before)]
    for now, before in used_up:
        now[:] = before
    return [] if used_up else rows


def _draws_rows(dataset: Any) -> bool:
    """True if a data set, or one in it, may draw rows from an iterator or queue, which reading uses up."""
    parts = list(getattr(dataset, "__dict__", {}).values())
    return any(
        hasattr(part, "__next__")
        or isinstance(part, queue.Queue | deque)
        or (isinstance(part, torch.utils.data.Dataset) and _draws_rows(part))
        for part in parts
    )


def _looked_at(row: Any, batch: Any, counter: TargetCounter) -> Candidate:
    labels, entries = labels_of(batch), entries_of(batch)
    kind = type(labels).__name__, 0
    if isinstance(labels, Tensor):
        kind = "classes" if is_class_labels(labels) else "numbers", labels.dim()
    size = sum(value.numel() for value in entries.values() if isinstance(value, Tensor))
    try:
        amounts = amounts_of(batch, counter)
    except Exception:  # of the user's count
        amounts = None
    return Candidate(row, kind, size, amounts, traits_of(batch, counter))


def _room(sizes: Sequence[int], batch_size: int) -> int:
    """Elements of the largest sample: two batches, or what is small for any model."""
    return max(2 * batch_size * max(sizes, default=0), _SMALL)


_LookedAt = list[tuple[Candidate, Amounts]]


def _contrast(first: _LookedAt, second: _LookedAt) -> float:
    return float(contrast_of([amounts for _, amounts in first + second])[len(first) - 1])


def _of_different_lengths(rows: _LookedAt, batch_size: int) -> tuple[_LookedAt, _LookedAt]:
    """The two groups of rows, each with about as many targets, that differ most; neither the longest, if others do."""
    rows = sorted(rows, key=lambda row: row[1].targets)
    room = _room([found.size for found, _ in rows], batch_size)

    def best_of(candidates: _LookedAt) -> tuple[_LookedAt, _LookedAt]:
        size = max(found.size for found, _ in candidates)
        most = max(min(_MOST_ROWS, room // (2 * size or 1), len(candidates) // 2), 1)
        best: tuple[_LookedAt, _LookedAt] = ([], [])
        for num_rows in range(most, 0, -1):
            groups = [candidates[i : i + num_rows] for i in range(0, len(candidates) - num_rows + 1, num_rows)]
            pairs = [(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]]
            best = max([best, *pairs], key=lambda pair: _contrast(*pair) if pair[0] else -1.0)
            if _contrast(*best) >= least_contrast(is_rounded=True):
                break
        return best

    middle = rows[len(rows) // 4 : len(rows) - len(rows) // 4]
    pair = best_of(middle) if len(middle) > 1 else best_of(rows)
    return pair if _contrast(*pair) >= least_contrast(is_rounded=True) else best_of(rows)


def _of_different_classes(rows: _LookedAt) -> tuple[_LookedAt, _LookedAt]:
    """Rows of the most frequent class, and as many of the others, a class in turn; any rows if there is one class."""
    by_class: dict[int, _LookedAt] = {}
    for found, amounts in rows:
        assert amounts.classes is not None
        by_class.setdefault(int(amounts.classes.argmax()), []).append((found, amounts))
    frequent, *others = sorted(by_class.values(), key=len, reverse=True)
    if not others:
        half = len(frequent) // 2
        return frequent[:half][:_MOST_ROWS], frequent[half : 2 * half][:_MOST_ROWS]
    # One class more often than the others: the weight of the first may be the mean of their weights.
    extra, rest = others[0][:1], [others[0][1:], *others[1:]]
    in_turn = extra + [group[i] for i in range(max(map(len, rest))) for group in rest if i < len(group)]
    num_rows = min(_MOST_ROWS, len(frequent), len(in_turn))
    return frequent[:num_rows], in_turn[:num_rows]


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows for two parts that differ."""

    dataset: DatasetRows
    first: list[Any]
    second: list[Any]
    contrast: float

    def cut(self, *, num_blocks: int) -> Parts | None:
        """One batch of all rows, cut in two; None if it cannot be cut."""
        rows = self.first + self.second
        whole = self.dataset.batch(rows)
        if not is_divisible(whole, num_blocks=num_blocks):
            return None
        # A row may be several in its batch, such as a pair.
        num_first = len(self.first) * count_rows(whole, num_blocks=num_blocks) // len(rows)
        return cut_after(whole, max(num_first, 1), num_blocks=num_blocks)

    def collated(self) -> Parts | None:
        """Three batches, each collated from its rows; None if the collator draws random numbers."""
        rows = self.first + self.second
        parts = Parts(*(self.dataset.batch(part) for part in (rows, self.first, self.second)))
        return parts if _are_equal(parts.whole, self.dataset.batch(rows, seed=1)) else None


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    mine, others = entries_of(a), entries_of(b)
    return mine.keys() == others.keys() and all(_are_equal(mine[name], others[name]) for name in mine)
