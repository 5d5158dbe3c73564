"""A mean of one data set plus a mean of another is refused also if the first batch has rows of one only."""

import logging
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.sample import DatasetRows
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, warnings_of
from tests.trainer.mixed_cases import (
    CLASSES,
    IN_ORDER,
    MEANS_OF_TWO,
    RIGHT,
    by_number,
    collate,
    concatenated,
    loss_of,
    pairs,
    pairs_in_blocks,
    pairs_of_two_sources,
    train_of,
    truth,
    weighted_sum,
)

TOLERANCE = 1e-5
NO_CHECK = GradUtilsPlugin(check_loss_unit=False)
ON_MEANS_OF_TWO = pytest.mark.parametrize("case", MEANS_OF_TWO)


# ---- Means of two data sets ----


@on_layouts("one_rank", "ddp2")
@ON_MEANS_OF_TWO
def test_means_of_concatenated_data_sets_are_refused_if_shuffled_and_else_said(case, layout):
    head, loss, entries = MEANS_OF_TWO[case]
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) = .* set loss_unit or count_targets"):
        train_of(head, loss, layout, concatenated(head, entries), arguments={})
    with warnings_of("hf_gradutils.loss_unit") as said:
        train_of(head, loss, layout, concatenated(head, entries))
    assert_said(said)


def assert_said(warnings):
    """Once, on rank 0."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    assert ["but not on rows that mix two kinds" in text for text in warnings] == [True] * is_first


@on_layouts("one_rank", "ddp2")
@ON_MEANS_OF_TWO
def test_control_without_the_check_they_are_off(case, layout):
    head, loss, entries = MEANS_OF_TWO[case]
    data = concatenated(head, entries)
    _, tap = train_of(head, loss, layout, data, grad_plugin=NO_CHECK)
    assert relative_error(tap.steps[0], truth(head, loss, data)) > 0.1


@pytest.mark.parametrize("batch_size", [1, 2])
@ON_MEANS_OF_TWO
def test_means_of_shuffled_data_sets_are_refused_by_whatever_batch_comes_first(case, batch_size):
    head, loss, entries = MEANS_OF_TWO[case]
    data = concatenated(head, entries)
    for seed in range(4):
        with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
            train_of(head, loss, "one_rank", data, batch_size=batch_size, arguments={"seed": seed})


class InOwnOrder(GradUtilsTrainer):
    """A source after the other."""

    def _get_train_sampler(self, *args, **kwargs):
        return sorted(range(len(self.train_dataset)), key=lambda i: str(self.train_dataset[i]["source"]))


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("case", ["number", "name"])
def test_means_of_data_that_the_users_sampler_groups_are_refused_or_said(case, layout):
    head, loss, entries = MEANS_OF_TWO[case]
    data = [row | entries(i % 2) for i, row in enumerate(make_data(head))]
    if layout == "one_rank":  # whose first batch is of one class, so that rows of the data set are asked as ever
        with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
            train_of(head, loss, layout, data, base=InOwnOrder)
        return
    with warnings_of("hf_gradutils.loss_unit") as said:
        train_of(head, loss, layout, data, base=InOwnOrder)
    assert_said(said)


# ---- Right losses ----


@pytest.mark.wide
@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("arguments", [IN_ORDER, {}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_losses_of_mixed_data_are_exact(case, arguments, layout):
    head, loss, count = RIGHT[case]
    data = concatenated(head, lambda i: {"source": torch.tensor(i)})
    plugin = GradUtilsPlugin(count_targets=count)
    _, tap = train_of(head, loss, layout, data, arguments=arguments, grad_plugin=plugin)
    assert relative_error(tap.steps[0], truth(head, loss, data)) < TOLERANCE


@pytest.mark.parametrize("case", RIGHT)
def test_of_right_losses_nothing_is_said(case, caplog):
    head, loss, count = RIGHT[case]
    data = concatenated(head, lambda i: {"source": torch.tensor(i)})
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        train_of(head, loss, "one_rank", data, grad_plugin=GradUtilsPlugin(count_targets=count))
    assert not [record for record in caplog.records if record.name == "hf_gradutils.loss_unit"]


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("loss", [pairs, pairs_in_blocks])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_pairs_of_two_sources_are_exact(loss, batch_size, layout):
    data, collator = pairs_of_two_sources(loss)
    model = make_model(CLASSES).double()
    loss_of(loss, model, collator(data)).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    _, tap = train_of(CLASSES, loss, layout, data, batch_size=batch_size, data_collator=collator)
    assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Losses that are right in the batches there are ----


class Balanced(GradUtilsTrainer):
    """As many of each source in each batch."""

    def _get_train_sampler(self, *args, **kwargs):
        half = len(self.train_dataset) // 2
        return [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair]


class OneSourceABatch(GradUtilsTrainer):
    def get_train_dataloader(self):
        batches = OwnBatches(range(len(self.train_dataset)), self.args.per_device_train_batch_size, drop_last=False)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class OwnBatches(BatchSampler):
    """Of which the user knows what they mix."""


def per_task(logits, labels, rest):
    """A head for each batch."""
    task = int(rest["source"][0])
    assert rest["source"].eq(task).all(), "rows of two tasks"
    return cross_entropy(logits * (1 + task), labels)


def per_first_task(logits, labels, rest):
    return cross_entropy(logits * (1 + rest["source"][0]), labels)


BY_BATCH = {
    "balanced by a sampler": (by_number, Balanced, False, IN_ORDER),
    "balanced in order": (by_number, None, True, IN_ORDER),
    "tasks by a batch sampler": (per_task, OneSourceABatch, False, {}),
    "tasks by a batch sampler, silently": (per_first_task, OneSourceABatch, False, {}),
    "tasks in order": (per_task, None, False, IN_ORDER),
    "tasks in order, silently": (per_first_task, None, False, IN_ORDER),
}


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("case", BY_BATCH)
def test_losses_that_are_right_in_the_batches_there_are_pass(case, layout):
    loss, base, alternate, arguments = BY_BATCH[case]
    data = concatenated(CLASSES, lambda i: {"source": torch.tensor(i)})
    if alternate:
        data = [row for pair in zip(data[:8], data[8:], strict=True) for row in pair]
    trainer, _ = train_of(CLASSES, loss, layout, data, base=base, arguments=arguments)
    assert trainer.state.global_step == 1


# ---- What it costs ----


@pytest.mark.parametrize("loss", [weighted_sum, pairs, pairs_in_blocks])
def test_a_right_loss_costs_three_forwards_more_or_six_if_rows_belong_together(loss, monkeypatch):
    calls, num_forwards = [], []

    def counting(logits, labels, rest):
        calls.append(torch.is_grad_enabled())
        return loss(logits, labels, rest)

    data, collator = concatenated(CLASSES, lambda i: {"source": torch.tensor(i)}), collate
    if loss is not weighted_sum:
        data, collator = pairs_of_two_sources(loss)
    for mixes in (lambda rows, *args, **kwargs: None, DatasetRows.mix):
        monkeypatch.setattr(DatasetRows, "mix", mixes)
        calls.clear()
        train_of(CLASSES, counting, "one_rank", data, data_collator=collator)
        num_forwards.append(calls.count(False))
    assert num_forwards[1] - num_forwards[0] == (6 if loss is pairs_in_blocks else 3)


def test_a_loss_of_transformers_costs_nothing_more():
    model, modes = make_model(CLASSES), []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    train(CLASSES, 4, model=model, arguments=IN_ORDER)
    assert modes.count(False) == 3


class Prepared(dict):
    """Can be referred to weakly."""


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("case", [*RIGHT][:3])
def test_before_the_first_step_a_few_prepared_batches_are_there(case, batch_size):
    made, most = [], 0

    class Counting(GradUtilsTrainer):
        def _prepare_inputs(self, inputs):
            nonlocal made, most
            batch = Prepared(super()._prepare_inputs(inputs))
            made = [prepared for prepared in made if prepared() is not None] + [weakref.ref(batch)]
            most = max(most, len(made))
            return batch

    head, loss, count = RIGHT[case]
    data = concatenated(head, lambda i: {"source": torch.tensor(i)}, num_rows=64)
    plugin = GradUtilsPlugin(count_targets=count)
    train_of(head, loss, "one_rank", data, batch_size=batch_size, base=Counting, grad_plugin=plugin)
    assert most <= 5, "the first, one of all chosen rows, two parts, and one more to see if the collator is random"
