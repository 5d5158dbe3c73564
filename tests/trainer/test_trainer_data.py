"""Data that comes in: any length or none, any split over ranks, every sample once, one batch ahead."""

import itertools

import datasets
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorWithFlattening, Trainer

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.trainer._batches import BatchStream, MicroBatches
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
HEAD = "t5 seq2seq"
collate = HEADS[HEAD].collate


def joined(steps, counts):
    """The gradient over several windows of the same weights."""
    names = set(itertools.chain.from_iterable(steps))
    return {n: sum(step[n] * count for step, count in zip(steps, counts, strict=True)) / sum(counts) for n in names}


def counts_of(trainer):
    return [entry["num_targets"] for entry in trainer.state.log_history if "num_targets" in entry]


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


STILL = {"learning_rate": 0.0, "per_device_train_batch_size": 2}
"""No learning, so that all windows are at the same weights."""


@on_layouts("one_rank", "ddp2", "fsdp2x2", "tp2")
def test_the_short_last_window_of_data_without_a_length_is_stepped_on_its_own(layout):
    # tp2's ranks see the same batches; the others share 20 or 10 rows out.
    head = "llama causal" if layout == "tp2" else HEAD
    data = make_data(head, 10 * LAYOUTS[layout].num_data_ranks)
    arguments = STILL | {"max_steps": 4}
    trainer, tap = train(head, 3, layout=layout, data=Stream(data), arguments=arguments)
    counts = counts_of(trainer)
    want, _ = truth(head, data)
    targets = HEADS[head].targets(collate(data))
    # 5 micro-batches a rank: windows of 3 and 2, and the next epoch the same.
    assert len(tap.steps) == 4
    assert counts[0] + counts[1] == counts[2] + counts[3] == targets
    for epoch in (slice(0, 2), slice(2, 4)):
        assert relative_error(joined(tap.steps[epoch], counts[epoch]), want) < TOLERANCE


def test_control_the_stock_trainer_merges_it_with_the_next_epoch():
    data = make_data(HEAD, 10)
    _, tap = train(HEAD, 3, data=Stream(data), arguments=STILL | {"max_steps": 2}, trainer_class=Trainer)
    third, _ = truth(HEAD, data[6:])
    assert relative_error(tap.steps[1], third) > 0.1


class _OwnLoader(GradUtilsTrainer):
    """Each rank reads what is its own, as accelerate does not know of it."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=collate)


@on_layouts("ddp2", "fsdp2x2")
@pytest.mark.parametrize("has_length", [True, False])
def test_ranks_may_end_at_different_micro_batches(has_length, layout):
    data = make_data(HEAD, 16)
    rows = data[:14] if dist.get_rank() == 0 else data[14:]  # 7 micro-batches and 1
    arguments = STILL | ({"num_train_epochs": 2, "max_steps": -1} if has_length else {"max_steps": 6})
    rows = rows if has_length else Stream(rows)
    trainer, tap = train(HEAD, 3, layout=layout, data=rows, trainer_class=_OwnLoader, arguments=arguments)
    want, _ = truth(HEAD, data)
    counts = counts_of(trainer)
    assert len(tap.steps) == 6
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sum(counts[epoch]) == HEADS[HEAD].targets(collate(data))
        assert relative_error(joined(tap.steps[epoch], counts[epoch]), want) < TOLERANCE


@ranks(2)
def test_a_rank_without_any_data_is_an_error_on_every_rank():
    rows = make_data(HEAD, 4) if dist.get_rank() == 0 else []
    with pytest.raises(InvalidArgumentError, match="1 of 2 ranks have no data in the first epoch"):
        train(HEAD, 2, data=Stream(rows), trainer_class=_OwnLoader, arguments=STILL | {"max_steps": 2})


def _rows_of(shards, data):
    for shard in shards:
        yield from data[shard::3]


@ranks(2)
def test_shards_of_a_streamed_dataset_of_different_sizes():
    data = make_data(HEAD, 11)
    rows = [{name: value.tolist() for name, value in row.items()} for row in data]
    stream = datasets.IterableDataset.from_generator(_rows_of, gen_kwargs={"shards": [0, 1, 2], "data": tuple(rows)})
    arguments = STILL | {"max_steps": 2, "accelerator_config": {"dispatch_batches": False}}
    trainer, tap = train(HEAD, 3, data=stream.with_format("torch"), arguments=arguments)
    want, _ = truth(HEAD, data)
    counts = counts_of(trainer)
    num_targets = HEADS[HEAD].targets(collate(data))
    # Shards 0 and 2 go to rank 0: 4 + 3 rows; shard 1 to rank 1: 4 rows.
    assert sum(counts) == num_targets
    assert relative_error(joined(tap.steps, counts), want) < TOLERANCE


@ranks(2)
def test_without_even_batches_every_sample_is_taken_once():
    data = make_data(HEAD, 5)
    arguments = {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1}
    arguments |= {"accelerator_config": {"even_batches": False}}
    _, tap = train(HEAD, 3, data=data, arguments=arguments)
    want, _ = truth(HEAD, data)
    assert len(tap.steps) == 1
    assert relative_error(tap.steps[0], want) < TOLERANCE


def test_a_run_without_a_length_resumed_in_its_second_epoch_goes_on_as_if_nothing_had_happened(tmp_path):
    data = make_data(HEAD, 10)
    arguments = {"output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    arguments |= {"save_strategy": "steps", "save_steps": 3}
    whole, _ = train(HEAD, 3, data=Stream(data), arguments=arguments)
    resumed = GradUtilsTrainer(
        model=make_model(HEAD), args=whole.args, train_dataset=Stream(data), data_collator=collate
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for before, after in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(before, after)


# ---- Rows that are packed, labels that are shifted already ----


@on_layouts("one_rank", "ddp2")
def test_flattened_rows_are_exact(layout):
    head = "llama causal"
    data = make_data(head)
    want, _ = truth(head, data)
    rows = [{name: row[name].tolist() for name in ("input_ids", "labels")} for row in data]
    _, tap = train(head, 4, layout=layout, data=rows, data_collator=DataCollatorWithFlattening())
    assert relative_error(tap.steps[0], want) < TOLERANCE


def _collate_shifted(rows):
    batch = collate(rows)
    labels = batch["labels"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return batch | {"shift_labels": shifted}


@on_layouts("one_rank", "ddp2")
def test_labels_shifted_by_the_collator_are_counted_as_they_are(layout):
    head = "llama causal"
    data = make_data(head)
    want, _ = truth(head, data)
    trainer, tap = train(head, 4, layout=layout, data=data, data_collator=_collate_shifted)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert counts_of(trainer) == [HEADS[head].targets(collate(data))]


# ---- The stream itself ----


def with_a_flag(batches):
    """Like accelerate's loader: it knows the last batch when it yields it."""
    state = {"is_last": False}

    def batches_in_order():
        for index, batch in enumerate(batches):
            state["is_last"] = index == len(batches) - 1
            yield batch

    return batches_in_order(), lambda: state["is_last"]


def without_a_flag(batches):
    return iter(batches), lambda: None


@pytest.mark.parametrize("source", [with_a_flag, without_a_flag])
def test_a_window_is_as_short_as_what_is_left(source):
    stream = BatchStream(*source([{"x": i} for i in range(5)]))
    windows = [[b["x"] for b in MicroBatches(stream, 3, pads=False)] for _ in range(3)]
    assert windows == [[0, 1, 2], [3, 4], []]
    assert not stream.has_more()


@pytest.mark.parametrize("source", [with_a_flag, without_a_flag])
def test_a_window_that_pads_repeats_the_last_batch_as_padding(source):
    stream = BatchStream(*source([{"x": 0}, {"x": 1}]))
    first, second = (list(MicroBatches(stream, 3, pads=True)) for _ in range(2))
    assert [b["x"] for b in first] == [0, 1, 1]
    assert [any(b is p for p in stream.paddings) for b in first] == [False, False, True]
    assert [b["x"] for b in second] == [1] * 3
    assert all(any(b is p for p in stream.paddings) for b in second)


def test_an_epoch_without_batches_is_padded_with_one_of_an_earlier_epoch():
    stream = BatchStream(*without_a_flag([]), padding={"x": 7})
    assert not stream.has_more()
    assert [b["x"] for b in MicroBatches(stream, 2, pads=True)] == [7, 7]
