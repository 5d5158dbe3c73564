"""Rows of two kinds are found by what they have, and mixed in other proportions."""

import itertools

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, WeightedRandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.mixture import is_of_one_kind, mixed, order_of, telling, traits_of

ROOM = 10_000


def row(**entries):
    return {"input_ids": torch.zeros(1, 12, dtype=torch.int64), "labels": torch.tensor([1]), **entries}


ENTRIES = {
    "number": lambda i: {"source": torch.tensor([i])},
    "flag": lambda i: {"source": torch.tensor([bool(i)])},
    "number in two dims": lambda i: {"source": torch.tensor([[i]])},
    "a pair's": lambda i: {"source": torch.tensor([i, i])},
    "name": lambda i: {"source": ["web" if i else "code"]},
    "plain number": lambda i: {"source": i},
    "one more entry": lambda i: {"teacher": torch.rand(1, 3)} if i else {},
    "no label": lambda i: {"labels": torch.tensor([-100 if i else 2])},
    "labels of another kind": lambda i: {"labels": torch.rand(1) if i else torch.tensor([[1, 2]])},
}


def kinds_of(entries, kinds):
    return [traits_of(row(**entries(kind), number=torch.tensor([i])), TargetCounter()) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("kinds", [[0] * 20 + [1] * 20, [1, 0, 0, 0] * 10], ids=["concatenated", "in turn"])
def test_rows_of_two_kinds_are_mixed_three_to_one_and_one_to_three(entries, kinds):
    first, second = mixed(kinds_of(entries, kinds), [12] * 40, room=ROOM)
    assert sorted(sum(kinds[place] for place in part) for part in (first, second)) == [1, 3]
    assert len({*first, *second}) == len(first) + len(second) == 8
    assert kinds[first[0]] == kinds[second[0]], "the first row may choose for all"


def test_rows_that_differ_in_numbers_of_their_own_only_are_of_one_kind():
    rows = kinds_of(lambda i: {"tokens": torch.rand(1, 3)}, [0] * 40)
    assert telling(rows) == []
    assert mixed(rows, [12] * 40, room=ROOM) is None


def test_of_several_traits_the_parts_differ_in_all():
    rows = [{name: (i * 37 >> bit) % 2 for bit, name in enumerate("abcd")} for i in range(64)]
    first, second = mixed(rows, [1] * 64, room=ROOM)
    for name in "abcd":
        assert abs(sum(rows[i][name] for i in first) - sum(rows[i][name] for i in second)) == 2


@pytest.mark.parametrize(("num_rare", "counts"), [(3, (4, 2)), (2, (4, 2)), (1, (2, 2))])
def test_of_a_rare_kind_fewer_rows_are_enough(num_rare, counts):
    kinds = [0] * 17 + [1] * num_rare
    first, second = mixed([{"kind": kind} for kind in kinds], [12] * len(kinds), room=ROOM)
    assert (len(first), len(second)) == counts
    assert sum(kinds[i] for i in first) * len(second) != sum(kinds[i] for i in second) * len(first)


@pytest.mark.parametrize(("batch_size", "num_rows"), [(1, 3), (2, 4), (3, 6), (4, 8)])
def test_the_chosen_rows_are_not_much_larger_than_two_batches(batch_size, num_rows):
    rows = [{"kind": i % 2} for i in range(40)]
    assert sum(map(len, mixed(rows, [4096] * 40, room=2 * batch_size * 4096))) == num_rows


def test_chosen_rows_are_no_neighbours_which_may_belong_together():
    first, second = mixed([{"kind": i >= 32} for i in range(64)], [12] * 64, room=ROOM)
    places = sorted(first + second)
    assert min(b - a for a, b in itertools.pairwise(places)) == 8


@pytest.mark.parametrize(("sources", "want"), [([0, 0, 0], True), ([0, 1, 0], False), ([[0, 1, 0]] * 2, False)])
def test_a_batch_is_of_one_kind_if_its_rows_have_all_traits_in_common(sources, want):
    batch = {"x": torch.rand(3, 2), "source": torch.tensor(sources)}
    assert is_of_one_kind(batch, ["source"], TargetCounter(), num_blocks=1) == want


class OwnBatches(BatchSampler):
    pass


ROWS = range(10)


@pytest.mark.parametrize(
    ("sampler", "want"),
    [
        (RandomSampler(ROWS), "shuffled"),
        (SeedableRandomSampler(ROWS), "shuffled"),
        (WeightedRandomSampler([1.0] * 10, 10), "shuffled"),
        (LengthGroupedSampler(2, lengths=[1] * 10), "shuffled"),
        (SequentialSampler(ROWS), "in order"),
        ([3, 1, 2], "the user's"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_order_is_read_from_the_loaders_sampler(sampler, want):
    batches = BatchSampler(sampler, 2, drop_last=False)
    assert order_of(batches) == order_of(BatchSamplerShard(batches, 2, 0)) == want
    assert order_of(OwnBatches(sampler, 2, drop_last=False)) == order_of(None) == "batches"
