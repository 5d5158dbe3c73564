"""Two parts that mix the rows of a data set in other proportions, because a batch may have rows of one kind only.

The mean of one data set plus the mean of another is a mean on rows of one of them, and no mean on both. The kind of a
row shows in its traits: entries with few values, the names of its entries, whether it has targets, and the half of the
data set that it is from.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.utils.data import SequentialSampler

from hf_gradutils.targets.counter import TargetCounter, is_class_labels, labels_of
from hf_gradutils.targets.rows import count_rows, entries_of, is_divisible, take_rows

Traits: TypeAlias = Mapping[Any, Hashable]
Order: TypeAlias = Literal["shuffled", "in order", "the user's", "batches"]
"""How a loader takes its rows; ``batches``: the user decides which rows are in one batch."""

POSITION = ("position",)
"""The trait that is no entry of a batch, as the other tuples."""
_MOST_ELEMENTS = 4
"""Of an entry that may be a trait. More than one, because a row may be a pair in its batch."""
_MOST_VALUES = 8
"""Of a trait; one with more is a length, a number of a row or a position."""
_MIXTURES = ("aaab", "abbb"), ("aaab", "ab"), ("aa", "ab"), ("a", "ab")
"""Parts with rows of two kinds. All begin with the same kind: the first row may choose the head of a whole batch."""
_LABELS = ("labels", "shift_labels")
_LIBRARIES = ("torch", "torchdata", "transformers", "accelerate")


def order_of(batch_sampler: Any) -> Order:
    """How a loader with such a batch sampler takes its rows; ``batches`` without one."""
    while getattr(batch_sampler, "batch_sampler", None) is not None:  # accelerate's are around the loader's own
        batch_sampler = batch_sampler.batch_sampler
    sampler = getattr(batch_sampler, "sampler", None)
    if sampler is None or not _is_of_a_library(batch_sampler):
        return "batches"
    if isinstance(sampler, SequentialSampler):
        return "in order"
    return "shuffled" if _is_of_a_library(sampler) else "the user's"


def _is_of_a_library(sampler: object) -> bool:
    return type(sampler).__module__.split(".")[0] in _LIBRARIES


def traits_of(row: Any, counter: TargetCounter) -> Traits:
    """What tells kinds of rows apart in a batch of one row. Host syncs: one for each entry of few elements."""
    entries, labels = entries_of(row), labels_of(row)
    traits: dict[Any, Hashable] = {name: _trait(value) for name, value in entries.items() if name not in _LABELS}
    has_targets = not is_class_labels(labels) or bool(labels.ne(counter.ignore_index).any())
    kind = labels.dim() if isinstance(labels, Tensor) else type(labels).__name__
    return traits | {("names",): frozenset(entries), ("has targets",): has_targets, ("kind",): kind}


def _trait(value: Any) -> Hashable:
    """None for an entry that is none."""
    if isinstance(value, Tensor):
        is_discrete = not (value.is_floating_point() or value.is_complex()) and value.numel() <= _MOST_ELEMENTS
        return tuple(value.flatten().tolist()) if is_discrete else None
    if isinstance(value, list | tuple):
        is_discrete = len(value) <= _MOST_ELEMENTS and all(isinstance(entry, str | int) for entry in value)
        return tuple(value) if is_discrete else None
    return value if isinstance(value, str | int) else None


def telling(rows: Sequence[Traits]) -> list[Any]:
    """The traits in which rows differ, and which have few values."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if 1 < len({row.get(name) for row in rows}) <= _MOST_VALUES]


def is_of_one_kind(batch: Any, names: Sequence[Any], counter: TargetCounter, *, num_blocks: int) -> bool:
    """True if all rows of a batch have these traits in common; False if its rows cannot be taken."""
    if not is_divisible(batch, num_blocks=num_blocks):
        return False
    num_rows = count_rows(batch, num_blocks=num_blocks)
    rows = [traits_of(take_rows(batch, i, i + 1, num_blocks=num_blocks), counter) for i in range(num_rows)]
    return len({tuple(row.get(name) for name in names) for row in rows}) == 1


def mixed(rows: Sequence[Traits], sizes: Sequence[int], *, room: int) -> tuple[list[int], list[int]] | None:
    """The places of the rows of two parts; None if the rows do not differ, or too few do.

    Args:
        rows: In the order of the data set.
        sizes: Elements of each.
        room: The most elements of all chosen rows, if these are more than three.
    """
    names = telling(rows)
    values = [tuple(row.get(name) for name in names) for row in rows]
    frequent = [value for value, _ in Counter(values).most_common()]
    if len(frequent) < 2:
        return None
    one, other = max(combinations(frequent, 2), key=lambda pair: _distance(*pair))
    likeness = [_distance(value, other) - _distance(value, one) for value in values]
    like_one, like_other = ([i for i, like in enumerate(likeness) if sign * like > 0] for sign in (1, -1))
    frequent_kind, other_kind = sorted((like_one, like_other), key=len, reverse=True)
    for mixture in _MIXTURES:
        kinds = {"a": frequent_kind, "b": other_kind}
        chosen = {name: _most_like(kinds[name], likeness, "".join(mixture).count(name)) for name in kinds}
        places = [place for kind in chosen.values() for place in kind]
        fits = len(places) * max((sizes[place] for place in places), default=0) <= room or mixture == _MIXTURES[-1]
        if fits and len(places) == len("".join(mixture)):
            draws = {name: iter(kind) for name, kind in chosen.items()}
            first, second = ([next(draws[name]) for name in part] for part in mixture)
            return first, second
    return None


def _distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _most_like(kind: list[int], likeness: Sequence[int], num_rows: int) -> list[int]:
    """Of rows that are as much like it, some from all over the data set: neighbours may belong together."""
    best = sorted(kind, key=lambda place: -abs(likeness[place]))
    num_equal = sum(abs(likeness[place]) == abs(likeness[best[0]]) for place in best)
    pool = best[: max(num_equal, num_rows)]
    return [pool[i * len(pool) // num_rows] for i in range(num_rows)] if len(pool) >= num_rows else []
