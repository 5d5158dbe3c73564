"""Shares among what users write around them: parameters and losses that their code changes, and batches of its own."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, GradUtilsTrainerMixin
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.shared_heads import LOSS_OF_PAIRS, SHARED_HEADS
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}
LARGEST = 0.5
"""Logarithm of the temperature, which a CLIP begins beyond."""


# ---- Parameters that are changed between the passes ----


@torch.no_grad()
def clamp(model):
    model.logit_scale.clamp_(max=LARGEST)


class Clamps(TrainerCallback):
    """As CLIP's authors do."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        clamp(model)


class ClampsInItsStep(GradUtilsTrainer):
    def training_step(self, *args, **kwargs):
        clamp(self.accelerator.unwrap_model(self.model))
        return super().training_step(*args, **kwargs)


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("options", [{"callback": Clamps()}, {"trainer_class": ClampsInItsStep}])
def test_a_temperature_is_that_of_the_step(options, layout):
    data = make_data("clip pairs", 16)
    model = make_model("clip pairs").double()
    clamp(model)
    batch = SHARED_HEADS["clip pairs"].collate(data)
    model(**batch | {"pixel_values": batch["pixel_values"].double()}).loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    assert relative_error(truth("clip pairs", data)[0], want) > 1e-2, "control: the clamp changes the gradient"
    for loss in (None, LOSS_OF_PAIRS):
        more = {"layout": layout, "arguments": IN_ORDER, "whole_batch_loss": loss}
        _, tap = train("clip pairs", 4, data=data, **options, **more)
        assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Losses that are changed ----


class WarmsUp(GradUtilsTrainer):
    """Adds a term to the loss, from the second step on."""

    in_place = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.state.global_step:
            term = 0.1 * next(model.parameters()).square().sum()
            if self.in_place:
                loss += term
            else:
                loss = loss + term
        return (loss, outputs) if return_outputs else loss


class Doubles(WarmsUp):
    """Multiplies the loss in place, from the second step on, and in the tenth window after it is looked at."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = GradUtilsTrainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.state.global_step:
            loss *= 2
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("head", SHARED_HEADS)
@pytest.mark.parametrize("trainer_class", [WarmsUp, type("OutOfPlace", (WarmsUp,), {"in_place": False}), Doubles])
def test_a_loss_that_is_changed_later_stops(head, trainer_class):
    with pytest.raises(LossUnitError, match="the loss that comes to backward is not the model's"):
        train(head, 2, trainer_class=trainer_class, arguments={"max_steps": 3})


class HandsOn(Trainer):
    """The override that most examples begin with."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class HandsOnInFront(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("head", SHARED_HEADS)
@pytest.mark.parametrize("finds_unused", [False, True])
def test_a_count_that_is_handed_on_multiplies_nothing(head, finds_unused, layout):
    data = make_data(head, 16)
    want, want_loss = truth(head, data)
    arguments = IN_ORDER | {"ddp_find_unused_parameters": finds_unused}
    for trainer_class in (type("Behind", (GradUtilsTrainerMixin, HandsOn), {}), HandsOnInFront):
        trainer, tap = train(head, 4, layout=layout, data=data, arguments=arguments, trainer_class=trainer_class)
        assert relative_error(tap.steps[0], want) < TOLERANCE
        assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-4)


class ReadsAccumulation(GradUtilsTrainer):
    def training_step(self, *args, **kwargs):
        self.noted = self.args.gradient_accumulation_steps
        return super().training_step(*args, **kwargs)


def test_a_step_that_reads_the_accumulation_is_not_taken_for_one_that_divides():
    data = make_data("clip pairs", 16)
    for loss in (None, LOSS_OF_PAIRS):
        options = {"trainer_class": ReadsAccumulation, "whole_batch_loss": loss, "arguments": IN_ORDER}
        _, tap = train("clip pairs", 4, data=data, **options)
        assert relative_error(tap.steps[0], truth("clip pairs", data)[0]) < TOLERANCE


class Twice(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("loss", [None, LOSS_OF_PAIRS])
def test_a_loss_that_is_computed_twice_stops(loss):
    with pytest.raises(LossUnitError, match=r"ran 2 times for one loss|computed twice in one micro-batch"):
        train("clip pairs", 2, trainer_class=Twice, whole_batch_loss=loss)


# ---- Batches of the user's own ----


class OtherNumber(GradUtilsTrainer):
    """Returns another number of batches than a step has, once the first windows have been looked at."""

    factor, num_windows = 1.0, 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.num_windows += 1
        factor = self.factor if self.num_windows > 3 else 1
        return super().get_batch_samples(epoch_iterator, int(num_batches * factor), device)


@pytest.mark.parametrize("head", SHARED_HEADS)
@pytest.mark.parametrize("factor", [0.5, 2])
def test_another_number_of_batches_than_a_step_has_stops(head, factor):
    trainer_class = type("Another", (OtherNumber,), {"factor": factor})
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2}
    with pytest.raises(InvalidArgumentError, match="their count is not the count of a step"):
        train(head, 2, data=make_data(head, 48), trainer_class=trainer_class, arguments=arguments)
    arguments = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    trainer, _ = train(head, 4, data=make_data(head, 20), trainer_class=OtherNumber, arguments=arguments)
    assert trainer.state.global_step == 3
    assert math.isfinite(trainer.state.log_history[2]["loss"]), "a short last window is none of these"


def test_it_predicts_and_evaluates_with_some_of_the_labels():
    rows = make_data("bert pretraining", 4)
    some = [{name: value for name, value in row.items() if name != "next_sentence_label"} for row in rows]
    trainer, _ = train("bert pretraining", 2, arguments={"max_steps": 1})
    for again in (trainer, type(trainer)(model=trainer.model, args=trainer.args, train_dataset=rows)):
        assert len(again.predict(some).predictions[0]) == 4
        assert again.evaluate(rows)["eval_loss"] > 0


# ---- The router loss beside a sum ----


def summed(logits, labels, vocab_size, **kwargs):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def test_the_router_loss_beside_a_sum_has_a_weight_of_its_own():
    head, steps = "qwen3 moe aux", []
    data, plugin = make_data(head, 16), GradUtilsPlugin(aux="exact", loss_unit="sum")
    for accumulation in (1, 4):
        model = make_model(head)
        model.loss_function, model.router_aux_loss_coef = summed, 100.0
        _, tap = train(head, accumulation, data=data, model=model, grad_plugin=plugin, arguments=IN_ORDER)
        steps.append(tap.steps[0])
    assert relative_error(steps[1], steps[0]) < TOLERANCE
