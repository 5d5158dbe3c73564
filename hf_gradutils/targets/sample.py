"""A few rows of the data set that tell what the first batch cannot: a mean over targets from other means.

A batch of one row cannot be cut, and one with rows of equal length or one class passes for too much. Rows from all over
the data set, collated as in training, differ more. Every rank takes the same rows.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_gradutils._undisturbed import seeded
from hf_gradutils.targets.contrast import Amounts, amounts_of, contrast_of, least_contrast
from hf_gradutils.targets.counter import TargetCounter, is_class_labels, labels_of
from hf_gradutils.targets.probe import Parts, cut_after
from hf_gradutils.targets.rows import entries_of, is_divisible

NUM_CANDIDATES = 64
"""Rows that are looked at, from the first to the last of the data set."""
_MOST_ROWS = 4
"""Rows of each part; that many if a row has one class."""
_SMALL = 2**12
"""Elements of all tensors of a batch that is small for any model."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row, collated alone, before it is counted."""

    row: Any
    batch: Any

    @property
    def kind(self) -> tuple[str, int]:
        """What sort of labels it has; rows of one batch have the same."""
        labels = labels_of(self.batch)
        if not isinstance(labels, Tensor):
            return type(labels).__name__, 0
        return "classes" if is_class_labels(labels) else "numbers", labels.dim()

    @property
    def size(self) -> int:
        """Elements of its tensors."""
        return sum(value.numel() for value in entries_of(self.batch).values() if isinstance(value, Tensor))


class DatasetRows:
    """Rows of a map-style data set.

    Args:
        dataset: Anything; without a length, or with rows that cannot be read one by one, it gives no rows.
        collate: The loader's.
        prepare: Collated batch → a batch as it is trained on.
        device: Of the random states to restore.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], prepare: Callable[[Any], Any], device: Any):
        self._collate, self._prepare, self._device = collate, prepare, device
        self.candidates: list[Candidate] = []
        """Empty if the data set cannot be used."""
        with seeded(device, 0):
            try:
                # A copy, because some data sets open files when they are first read, which workers must not inherit.
                dataset = copy.copy(dataset)
                last = len(dataset) - 1
                indices = sorted(
                    {round(i * last / (NUM_CANDIDATES - 1)) for i in range(NUM_CANDIDATES)} if last else {0}
                )
                for index in indices:
                    row = dataset[index]
                    self.candidates.append(Candidate(row, self.batch([row])))
            except Exception:  # whatever a user's data set or collator raises, it trains without
                self.candidates = []

    def batch(self, rows: list[Any], *, seed: int = 0) -> Any:
        """Collate rows as in training; the same random numbers for the same seed."""
        with seeded(self._device, seed):
            return self._prepare(self._collate(rows))

    def first_of(self, is_wanted: Callable[[Any], bool]) -> Any | None:
        """The first batch of one row that is wanted."""
        return next((found.batch for found in self.candidates if is_wanted(found.batch)), None)

    def choose(self, counter: TargetCounter, *, batch_size: int) -> "Sample | None":
        """The rows of the most frequent kind that tell most; None if there are fewer than two with targets.

        Args:
            counter: Batch → targets.
            batch_size: Of training. Where a row has many labels, all chosen rows are not much larger than two batches.
        """
        kinds = Counter(found.kind for found in self.candidates)
        if not kinds:
            return None
        kind = max(kinds, key=lambda name: kinds[name])
        try:
            looked_at = [(found, amounts_of(found.batch, counter)) for found in self.candidates if found.kind == kind]
        except Exception:  # of the user's count
            return None
        looked_at = [(found, amounts) for found, amounts in looked_at if amounts.targets > 0]
        if len(looked_at) < 2:
            return None
        if kind == ("classes", 1):
            first, second = _of_different_classes(looked_at)
        else:
            first, second = _of_different_lengths(looked_at, batch_size)
        return Sample(
            self, [found.row for found, _ in first], [found.row for found, _ in second], _contrast(first, second)
        )


_LookedAt = list[tuple[Candidate, Amounts]]


def _contrast(first: _LookedAt, second: _LookedAt) -> float:
    return float(contrast_of([amounts for _, amounts in first + second])[len(first) - 1])


def _of_different_lengths(rows: _LookedAt, batch_size: int) -> tuple[_LookedAt, _LookedAt]:
    """The two groups of rows, each with about as many targets, that differ most; neither the longest, if others do."""
    rows = sorted(rows, key=lambda row: row[1].targets)
    room = max(2 * batch_size * max(found.size for found, _ in rows), _SMALL)

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
        whole = self.dataset.batch(self.first + self.second)
        if not is_divisible(whole, num_blocks=num_blocks):
            return None
        return cut_after(whole, len(self.first), num_blocks=num_blocks)

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
