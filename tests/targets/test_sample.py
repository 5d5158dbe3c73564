"""The rows of a data set that are chosen tell one mean from another, are the same everywhere, and leave no trace."""

import random
import weakref

import pytest
import torch
from torch.utils.data import BatchSampler, Dataset, RandomSampler

from hf_gradutils.targets.contrast import NO_RIVAL, contrast_of_cuts, least_contrast
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.sample import NUM_CANDIDATES, DatasetRows
from tests.harness.heads import collate

CPU = torch.device("cpu")


def rows_of(dataset, collator=collate):
    return DatasetRows(dataset, collator, lambda batch: batch, CPU)


def row_of(*labels, length=12):
    labels = torch.tensor(labels + (-100,) * (length - len(labels)))
    return {"input_ids": torch.zeros(length, dtype=torch.int64), "labels": labels}


def test_a_few_equal_rows_among_others_and_few_others_among_equal_ones_are_found():
    rare = [row_of(*range(1, 9))] * 500
    rare[-1] = row_of(1, 2)
    sample = rows_of(rare).choose(TargetCounter(), batch_size=1)
    assert sample.contrast >= least_contrast(is_rounded=True)
    counts = {float(TargetCounter()(collate([row]))) for row in sample.first + sample.second}
    assert counts == {2, 8}


def test_rows_that_fit_into_two_batches_are_chosen_and_not_the_longest():
    rows = [row_of(*range(1, n), length=2048) for n in range(3, 1003, 10)]
    sample = rows_of(rows).choose(TargetCounter(), batch_size=1)
    assert len(sample.first) == len(sample.second) == 1
    longest = max(int(row["labels"].ne(-100).sum()) for row in sample.first + sample.second)
    assert longest < 800


def test_of_classes_the_parts_have_others_in_unequal_numbers():
    rows = [{"x": torch.zeros(2), "labels": torch.tensor(i % 4 // 1 % 3)} for i in range(60)]
    sample = rows_of(rows).choose(TargetCounter(), batch_size=1)
    first, second = ([int(row["labels"]) for row in part] for part in (sample.first, sample.second))
    assert len(set(first)) == 1
    assert len(set(second)) == 2
    assert second.count(second[0]) != 2, "the mean of the others' weights may be the first one's"


@pytest.mark.parametrize("labels", [(1, 2, 3), (5, 5, 5)])
def test_control_rows_without_contrast_are_known_to_have_none(labels):
    sample = rows_of([row_of(*labels)] * 20).choose(TargetCounter(), batch_size=1)
    assert sample.contrast < least_contrast(is_rounded=False)


def test_a_mean_over_rows_has_no_rival_without_classes():
    batch = {"x": torch.zeros(4, 2), "labels": torch.zeros(4)}
    assert float(contrast_of_cuts(batch, TargetCounter())[1]) == pytest.approx(NO_RIVAL)


class Drawing(Dataset):
    """Augments at random and opens its file late."""

    def __init__(self, num_rows=100):
        self.num_rows, self.num_read, self.file = num_rows, 0, None

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        self.num_read += 1
        self.file = "open"
        return {"x": torch.rand(2) + random.random(), "labels": torch.tensor(float(index))}


def test_reading_is_the_same_every_time_and_leaves_no_trace():
    dataset, state = Drawing(), (torch.get_rng_state(), random.getstate())
    first, second = (rows_of(dataset) for _ in range(2))
    assert len(first.rows) == NUM_CANDIDATES
    for a, b in zip(first.rows, second.rows, strict=True):
        assert torch.equal(a["x"], b["x"])
    assert first.rows[-1]["labels"] == 99
    assert (dataset.num_read, dataset.file) == (0, None)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def masking(rows):
    batch = collate(rows)
    return batch | {"labels": torch.where(torch.rand(batch["labels"].shape) < 0.5, batch["labels"], -100)}


def test_a_collator_that_draws_labels_is_used_for_cuts_only():
    rows = [row_of(*range(1, n)) for n in range(4, 12)] * 8
    sample = rows_of(rows, masking).choose(TargetCounter(), batch_size=2)
    parts = sample.cut(num_blocks=1)
    counter = TargetCounter()
    assert counter(parts.whole) == counter(parts.first) + counter(parts.second)
    assert sample.collated() is None
    assert rows_of(rows).choose(TargetCounter(), batch_size=2).collated() is not None


class Failing(Drawing):
    def __getitem__(self, index):
        raise OSError("not here")


@pytest.mark.parametrize("dataset", [None, Failing(), iter(()), [], 3, {"a": 1}])
def test_a_data_set_that_cannot_be_read_gives_nothing(dataset):
    rows = rows_of(dataset)
    assert rows.rows == []
    assert rows.choose(TargetCounter(), batch_size=1) is None


# ---- What is held and read ----


class Batch(dict):
    """Can be referred to weakly."""


class Counted:
    """Prepared batches that are alive, the most at a time, and collations."""

    def __init__(self):
        self.made, self.most, self.num_collations = [], 0, 0

    def prepare(self, batch):
        self.num_collations += 1
        batch = Batch(batch)
        self.made = [made for made in self.made if made() is not None] + [weakref.ref(batch)]
        self.most = max(self.most, len(self.made))
        return batch


SHUFFLED = BatchSampler(RandomSampler(range(100)), 2, drop_last=False)
QUESTIONS = {
    "first of": lambda rows: rows.first_of(lambda batch: False),
    "choose": lambda rows: rows.choose(TargetCounter(), batch_size=2),
    "mix": lambda rows: rows.mix({}, TargetCounter(), batch_size=2, num_blocks=1),
}
KINDS = {
    "classes": lambda i: {"x": torch.zeros(2), "labels": torch.tensor(i % 3)},
    "tokens": lambda i: row_of(*range(1, 3 + i % 5)),
    "numbers": lambda i: {"x": torch.zeros(2), "source": torch.tensor(i % 2), "labels": torch.tensor(0.5)},
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_prepared_row_is_there_at_a_time_and_each_is_collated_once_a_question(question, kind):
    counted, num_read = Counted(), []

    class Read(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            num_read.append(index)
            return KINDS[kind](index)

    rows = DatasetRows(Read(), collate, counted.prepare, CPU, SHUFFLED)
    QUESTIONS[question](rows)
    assert counted.most == 1
    assert counted.num_collations <= NUM_CANDIDATES
    for other in QUESTIONS.values():
        other(rows)
    assert counted.most == 1
    assert counted.num_collations <= 3 * NUM_CANDIDATES
    assert len(num_read) == NUM_CANDIDATES


def test_a_collator_that_takes_entries_out_of_the_rows_is_given_them_whole():
    def taking(rows):
        return {"labels": torch.stack([row.pop("labels") for row in rows]), **collate(rows)}

    rows = DatasetRows([KINDS["tokens"](i) for i in range(40)], taking, lambda batch: batch, CPU, SHUFFLED)
    for choose in (QUESTIONS["choose"], QUESTIONS["mix"]):
        assert choose(rows).cut(num_blocks=1) is not None
    assert "labels" in rows.rows[0]
