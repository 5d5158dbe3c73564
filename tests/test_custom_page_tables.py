"""What the tables of the page on writing around the Trainer say, tried."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector
from torch.utils.data import IterableDataset, default_collate
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, check_invariance
from hf_gradutils.errors import InvalidArgumentError, LossUnitError, TargetCountError
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import warnings_of
from tests.test_custom_page import (
    LAYOUTS,
    TOLERANCE,
    error,
    exact,
    focal,
    num_ranks,
    own_losses,
    page,
    plain,
    trained,
    truth,
)


def test_counts_first_are_announced_with_the_reason(caplog):
    hooked, batches = page().LayerWise, type("Batches", (page().Focal,), {"get_batch_samples": _hands_on})
    with caplog.at_level(logging.WARNING, "hf_gradutils.trainer"):
        for trainer_class in (page().Focal, page().FocalByCount, hooked, batches):
            trained(exact(trainer_class))
    said = [record.getMessage() for record in caplog.records if record.name == "hf_gradutils.trainer"]
    start = "counts='first': each window's targets are counted before its first forward: "
    assert [message.removeprefix(start) for message in said] == [
        "compute_loss divides by num_items_in_batch, the count of the whole window",
        "a hook on bert.embeddings.word_embeddings.weight reads gradients in the backward",
        "get_batch_samples is overridden, and sees a list of batches and their count",
    ]


def _hands_on(self, epoch_iterator, num_batches, device):
    return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)


class Seen(TrainerCallback):
    def __init__(self):
        self.sums, self.gradients = [], []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.sums.append(parameters_to_vector([p.grad for p in model.parameters()]))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(parameters_to_vector([p.grad for p in model.parameters()]))


def test_callbacks_see_sums_within_a_window_and_the_gradient_before_the_step():
    streamed, first = Seen(), Seen()
    for seen, counts in ((streamed, "streamed"), (first, "first")):
        trained(exact(Trainer), 2, callbacks=[seen], grad_plugin=GradUtilsPlugin(counts=counts))
        assert error(-seen.gradients[0], truth(plain)[0]) < TOLERANCE
    ratio = streamed.sums[0].norm() / first.sums[0].norm()
    assert error(streamed.sums[0], first.sums[0] * ratio) < TOLERANCE
    assert abs(ratio - 1) > 0.01


@pytest.mark.parametrize(("counts", "num_ahead"), [("streamed", 1), ("first", 3)])
def test_batches_are_fetched_ahead_as_the_page_says(counts, num_ahead):
    fetched, ahead = [], []

    def collate(rows):
        fetched.append(len(rows))
        return default_collate(rows)

    class Counting(Trainer):
        def training_step(self, *args, **kwargs):
            ahead.append(len(fetched) - len(ahead))
            return super().training_step(*args, **kwargs)

    plugin = GradUtilsPlugin(counts=counts, check_loss_unit=False)
    trained(exact(Counting), 4, data_collator=collate, grad_plugin=plugin)
    assert max(ahead) == num_ahead + 1, "with the one that is trained on"


@on_layouts("ddp2")
def test_counts_first_cost_one_more_all_reduce_a_step(layout, monkeypatch):
    calls = []
    original = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        calls.append(kwargs.get("async_op", False))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def of_a_step(counts):
        short, long = [], []
        for found, max_steps in ((short, 2), (long, 3)):
            calls.clear()
            arguments = {"max_steps": max_steps, "logging_strategy": "no"}
            trained(exact(Trainer), arguments=arguments, grad_plugin=GradUtilsPlugin(counts=counts))
            found += calls
        return len(long) - len(short), any(long)

    assert of_a_step("streamed") == (1, False)
    assert of_a_step("first") == (2, True)


class KeptNumber(Trainer):
    """A number of ranks that is not read where the loss is computed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_ranks = self.k = 2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, _ = own_losses(model, inputs)
        return (losses * self.scale).sum() / num_items_in_batch * self.num_ranks

    scale = 1.0


class KeptNumberOfAnotherLoss(KeptNumber):
    scale = 0.7


class KeptUnderAnotherName(KeptNumber):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, _ = own_losses(model, inputs)
        return (losses * self.scale).sum() / num_items_in_batch * self.k


class KeptUnderAnotherNameOfAnotherLoss(KeptUnderAnotherName):
    scale = 0.7


@on_layouts("ddp2")
def test_a_number_that_is_kept_is_seen_by_its_name_or_in_multiples_of_the_models_own_loss(layout):
    want, want_loss = truth(plain)
    assert error(trained(KeptNumber)[1], want) < TOLERANCE
    for trainer_class in (KeptNumber, KeptUnderAnotherName):
        trainer, got = trained(exact(trainer_class))
        assert error(got, want) < TOLERANCE
        assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    _, got = trained(exact(KeptNumberOfAnotherLoss))
    assert error(got, 0.7 * want) < TOLERANCE
    trainer, got = trained(exact(KeptUnderAnotherNameOfAnotherLoss))
    assert error(got, 2 * 0.7 * want) < TOLERANCE
    assert check_invariance(trainer, num_samples=8).passed


class FirstHalf(Trainer):
    """A loss over other targets than the labels say."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = half_of(self._prepare_inputs(inputs))
        loss = model(**inputs).loss
        self.accelerator.backward(loss, num_targets=(inputs["labels"] != -100).sum())
        return loss.detach()


def half_of(batch):
    return {name: value[:, :6].contiguous() for name, value in batch.items()}


@on_layouts(*LAYOUTS)
def test_a_step_may_say_over_how_many_targets_its_loss_is_a_mean(layout):
    want, want_loss = truth(lambda model, batch: plain(model, half_of(batch)))
    trainer, got = trained(exact(FirstHalf))
    assert error(got, want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


class InParts(page().Focal):
    """A mean of the user's own for each part of a micro-batch, multiplied by its part of the targets."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        whole = (inputs["labels"] != -100).sum()
        inputs = self._prepare_inputs(inputs)
        for rows in (slice(1), slice(1, None)):
            part = {name: value[rows] for name, value in inputs.items()}
            loss = super().compute_loss(model, part) * (part["labels"] != -100).sum() / whole
            self.accelerator.backward(loss)
        return loss.detach()


@on_layouts(*LAYOUTS)
def test_means_of_parts_are_exact_if_they_are_multiplied_by_their_part_of_the_targets(layout):
    assert error(trained(exact(InParts), 2)[1], truth(focal)[0]) < TOLERANCE


def test_plain_backward_hooks_with_streamed_counts_and_graphs_without_labels_are_errors():
    class Plain(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    with pytest.raises(TargetCountError, match=r"not made by accelerator\.backward"):
        trained(exact(Plain))
    with pytest.raises(InvalidArgumentError, match="which counts='streamed' cannot give it"):
        trained(exact(page().LayerWise), grad_plugin=GradUtilsPlugin(counts="streamed"))

    class WithoutLabels(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.nn.functional.linear(inputs["x"], model.weight).square().mean()

    def join(rows):
        return {name: value for name, value in page().join(rows).items() if name != "labels"}

    options = page().examples["Trainer"][2] | {"data_collator": join}
    with pytest.raises(TargetCountError, match="have different first dims and none is labels"):
        trained(exact(WithoutLabels), **options)


class TwoMeans(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, is_target = own_losses(model, inputs)
        is_clean = inputs["is_clean"][:, None].expand_as(is_target)[is_target]
        return sum((losses * part).sum() / part.sum().clamp(min=1) for part in (is_clean, ~is_clean))


@on_layouts(*LAYOUTS)
def test_the_sum_of_two_means_is_refused_where_rows_of_both_are_seen(layout):
    with pytest.raises(LossUnitError, match="is not a mean over the targets counted"):
        trained(exact(TwoMeans), 16 // num_ranks(), rows=page().examples["TwoSets"][2]["rows"])


def test_the_sum_of_two_means_is_said_where_rows_stay_in_their_order():
    rows = sorted(page().examples["TwoSets"][2]["rows"], key=lambda row: -row["is_clean"])
    with warnings_of("hf_gradutils.loss_unit") as said:
        trained(exact(TwoMeans), rows=rows, arguments={"train_sampling_strategy": "sequential"})
    assert ["but not on rows that mix two kinds" in text for text in said] == [True]


# ---- What the check says ----


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Drawn(page().Focal):
    def mean(self, total, num_targets, num_items_in_batch):
        return total / num_targets * (1 + 0.1 * torch.rand(()))


class Grown(page().Focal):
    """A term that is no mean, and grows from a weight of 0."""

    def mean(self, total, num_targets, num_items_in_batch):
        return total / num_targets + 0.1 * self.state.global_step * total


def alike():
    return [row | {"labels": torch.where(torch.arange(12) < 3, row["input_ids"] % 5, -100)} for row in page().rows]


@pytest.mark.parametrize(
    ("trainer_class", "options", "said"),
    [
        (Drawn, {}, "the loss differs between equal forwards"),
        (page().Focal, {"rows": alike}, "nothing tells if it is one over the targets counted"),
        (
            page().Focal,
            {"rows": lambda: Stream(page().rows), "arguments": {"per_device_train_batch_size": 1}},
            "could not be checked to be a mean",
        ),
        (Grown, {}, "after 1 optimizer steps the loss is no longer a mean over the targets counted"),
    ],
    ids=["random", "alike", "stream", "grown"],
)
def test_the_check_says_what_the_page_quotes(trainer_class, options, said, caplog):
    options = dict(options)
    if "rows" in options:
        options["rows"] = options["rows"]()
    options["arguments"] = {"max_steps": 3, "learning_rate": 1e-3} | options.get("arguments", {})
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        trained(exact(trainer_class), **options)
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_gradutils.loss_unit"]
    assert len(messages) == 1
    assert said in messages[0]
