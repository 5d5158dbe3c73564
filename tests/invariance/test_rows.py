"""The rows of a check: from all of a dataset with an order, the first of a stream, the same on all ranks."""

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_gradutils.invariance._rows import drawn_rows
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data
from tests.invariance import planted
from tests.invariance.checks import HEAD, of, report_of


def _first_alike(num_alike):
    """The first rows have equal numbers of targets, as rows that are cut to a length have; the others have two."""
    rows = make_data(HEAD, 64)
    for index, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][6 if index < num_alike else 3 :] = -100
    return rows


@on_layouts("one_rank", "ddp2")
def test_a_sorted_dataset_is_checked_beyond_its_first_rows(layout):
    kind = of(planted.OwnMean, planted.MeansAreDivided, Trainer)
    report = report_of(kind, layout=layout, data=_first_alike(32), num_samples=None)
    assert report.verdict == "FAILED", str(report)
    assert "off by" in report.answer
    again = report_of(kind, layout=layout, data=_first_alike(32), num_samples=None)
    assert str(again) == str(report)
    other = report_of(kind, layout=layout, data=_first_alike(32), num_samples=None, arguments={"data_seed": 3})
    assert other.comparisons[1].loss != report.comparisons[1].loss
    alike = report_of(kind, layout=layout, data=_first_alike(64), num_samples=None)
    assert alike.passed, str(alike)  # control: of rows that are all alike the mean of means is right


class _Stream(IterableDataset):
    def __iter__(self):
        yield from range(40)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        raise AssertionError("a stream has no numbers")


class _WithoutLength:
    def __getitem__(self, index):
        if index >= 40:
            raise IndexError(index)
        return index


def test_rows_are_drawn_once_each():
    drawn = drawn_rows(range(40), 16, seed=0)
    assert len(set(drawn)) == 16
    assert max(drawn) > 24
    assert drawn == drawn_rows(range(40), 16, seed=0) != drawn_rows(range(40), 16, seed=1)
    assert sorted(drawn_rows(range(7), 16, seed=0)) == list(range(7))
    random_state = torch.get_rng_state()
    assert drawn_rows(_Stream(), 16, seed=0) == drawn_rows(_WithoutLength(), 16, seed=0) == list(range(16))
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(KeyError):
        drawn_rows({"a": 1, "b": 2}, 2, seed=0)
