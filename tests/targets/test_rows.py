"""The rows of a batch of any type: counted by its labels, taken without changing the type."""

import collections
import types

import pytest
import torch
from transformers import BatchEncoding

from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets.counter import TargetCounter, with_one_target
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows, with_own_tensors

ROWS = torch.arange(12).reshape(4, 3)
Pair = collections.namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("batch", "num_rows"),
    [
        ({"x": torch.ones(7, 2), "labels": torch.ones(3)}, 3),
        ({"input_ids": torch.ones(1, 20), "labels": torch.ones(3)}, 3),
        ({"labels": torch.tensor(1.0), "x": torch.ones(5, 2)}, 5),
        ({"pixel_values": torch.ones(9, 4), "input_ids": torch.ones(2, 6)}, 2),
        ({"attention_mask": torch.ones(2, 6), "position_ids": torch.ones(3, 2, 6)}, 2),
        ({"x": torch.ones(4, 2), "y": torch.ones(4), "scale": torch.tensor(2.0)}, 4),
        ((torch.ones(4, 2), torch.ones(4)), 4),
        ([torch.ones(4, 2), torch.ones(4)], 4),
        (BatchEncoding({"input_ids": ROWS}), 4),
    ],
)
def test_rows_are_counted_by_the_labels_or_where_all_agree(batch, num_rows):
    assert count_rows(batch) == num_rows


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(7, 2), "sizes": torch.ones(3)},
        {"input_ids": torch.ones(1, 20), "lengths": torch.ones(3)},
        (torch.ones(7, 2), torch.ones(3)),
        {"x": torch.tensor(1.0)},
        {"text": ["a", "b"]},
        types.SimpleNamespace(x=ROWS),
    ],
)
def test_where_nothing_tells_the_rows_it_is_an_error_that_says_what_to_pass(batch):
    with pytest.raises(TargetCountError, match="pass count_targets"):
        count_rows(batch)
    assert not is_divisible(batch)
    assert TargetCounter(count=lambda batch: torch.tensor(3))(batch) == 3


MAKERS = {
    **{make.__name__: make for make in (dict, BatchEncoding, collections.UserDict, collections.OrderedDict)},
    "namedtuple": lambda entries: Pair(*entries.values()),
    "tuple": lambda entries: tuple(entries.values()),
    "list": lambda entries: list(entries.values()),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_rows_are_taken_and_the_type_stays(make):
    batch = make({"labels": ROWS.clone(), "names": ["a", "b", "c", "d"]})
    assert is_divisible(batch)
    part = take_rows(batch, 1, 3)
    assert type(part) is type(batch)
    entries = list(part.values()) if hasattr(part, "values") else list(part)
    assert torch.equal(entries[0], ROWS[1:3])
    assert entries[1] == ["b", "c"]
    own = with_own_tensors(batch)
    assert type(own) is type(batch)
    (own[0] if isinstance(own, tuple | list) else own["labels"]).add_(1)
    first = batch[0] if isinstance(batch, tuple | list) else batch["labels"]
    assert torch.equal(first, ROWS), "what is taken or copied leaves the batch as it is"


def test_a_batch_that_cannot_be_changed_becomes_a_dict():
    part = take_rows(types.MappingProxyType({"labels": ROWS}), 0, 2)
    assert part.keys() == {"labels"}
    assert torch.equal(part["labels"], ROWS[:2])


@pytest.mark.parametrize("make", [dict, BatchEncoding, collections.UserDict])
def test_one_target_is_added_and_the_type_stays(make):
    nothing = torch.full((2, 3), -100)
    batch = make({"labels": nothing})
    changed = with_one_target(batch, torch.tensor(0))
    assert type(changed) is type(batch)
    assert changed["labels"].tolist() == [[-100, -100, 0], [-100, -100, -100]]
    assert torch.equal(batch["labels"], nothing)
    pair = (torch.ones(2, 3), torch.ones(2))
    assert with_one_target(pair, torch.tensor(0)) is pair


@pytest.mark.parametrize("unit", ["tokens", "shifted_tokens"])
def test_labels_of_one_class_a_row_never_shift(unit):
    assert TargetCounter(unit)({"labels": torch.tensor([1, -100, 2])}) == 2
