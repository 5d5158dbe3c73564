"""Losses of the whole batch, and of several means: exact in every layout, for every cut."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import CLIPModel, Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from tests.harness.gradients import cast, norm_of, relative_error
from tests.harness.layouts import on_layouts
from tests.harness.shared_heads import SHARED_HEADS
from tests.harness.trainer_cases import CHECKPOINTING, make_data, make_model, train, truth

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("head", SHARED_HEADS)
def test_the_gradient_is_that_of_the_whole_batch(head, layout):
    assert_exact(layout, head, *((1, 4, 8) if layout == "one_rank" else (1, 4)))


@on_layouts("fsdp2x2", "hsdp2x2")
def test_it_is_so_for_pairs_under_fsdp2(layout):
    assert_exact(layout, "siglip pairs", 1, 4)


@on_layouts("fsdp2x2")
def test_it_is_so_for_several_means_under_fsdp2(layout):
    assert_exact(layout, "bert pretraining", 1, 4)


@on_layouts("fsdp2x2")
def test_clip_can_be_made_to_go_with_fsdp2_which_refuses_it_as_it_is(layout):
    """accelerate asks it for embeddings that it does not name, and torch shards no scalar."""
    data = make_data("clip pairs", 32)
    want, _ = truth("clip pairs", data)
    model = make_model("clip pairs")
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):
        train("clip pairs", 4, layout=layout, data=data, model=model)
    model = make_model("clip pairs")
    embedding = model.text_model.embeddings.token_embedding
    model.get_input_embeddings = lambda: embedding
    with pytest.raises(ValueError, match="scalar"):
        train("clip pairs", 4, layout=layout, data=data, model=model)
    model = make_model("clip pairs")
    model.get_input_embeddings = lambda: embedding
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    tap = train("clip pairs", 4, layout=layout, data=data, model=model, arguments=IN_ORDER)[1]
    tap.steps[0]["logit_scale"] = tap.steps[0]["logit_scale"].reshape(())
    assert relative_error(tap.steps[0], want) < TOLERANCE


def assert_exact(layout, head, *accumulations):
    data = make_data(head, 32)
    want, want_loss = truth(head, data)
    for accumulation in accumulations:
        trainer, tap = train(head, accumulation, layout=layout, data=data, arguments=IN_ORDER)
        assert relative_error(tap.steps[0], want) < TOLERANCE, accumulation
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
        assert entry["num_targets"] == len(data)


@pytest.mark.parametrize("head", SHARED_HEADS)
def test_control_the_mean_of_the_micro_batches_is_another_gradient(head):
    data = make_data(head, 32)
    _, tap = train(head, 8, trainer_class=Trainer, data=data)
    assert relative_error(tap.steps[0], truth(head, data)[0]) > 0.1
    plugin = GradUtilsPlugin(check_loss_unit=False)  # which asks for that mean
    _, tap = train(head, 8, data=data, grad_plugin=plugin)
    assert relative_error(tap.steps[0], truth(head, data)[0]) > 0.01


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("head", SHARED_HEADS)
def test_steps_in_a_row_are_those_of_one_device(head, layout):
    """Three steps of eight rows with clipping, and a last one of four."""
    data = make_data(head, 28)
    each = {"num_train_epochs": 1, "max_steps": -1, "max_grad_norm": 0.5, "learning_rate": 0.05} | IN_ORDER
    size = {"per_device_train_batch_size": 1 if layout == "ddp2" else 2}
    trainer, _ = train(head, 4, layout=layout, data=data, arguments=each | size)
    model = make_model(head).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for start in range(0, 28, 8):
        batch = SHARED_HEADS[head].collate(data[start : start + 8])
        model(**cast(batch, torch.float64)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    got = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    began = {name: p.detach().double() for name, p in make_model(head).named_parameters()}
    change = {name: value - began[name] for name, value in got.items()}
    assert relative_error(change, {n: p.detach() - began[n] for n, p in model.named_parameters()}) < 1e-4
    assert trainer.state.global_step == 4


DRAWN: list[torch.Tensor] = []
"""Not in the module, where a first pass leaves no trace."""


class Noise(nn.Module):
    """Draws as dropout does, and keeps what it has drawn; or multiplies by masks that were drawn before."""

    def __init__(self, replayed=None):
        super().__init__()
        self.replayed = replayed

    def forward(self, hidden):
        if not self.training:
            return hidden
        if self.replayed is not None:
            return hidden * self.replayed.to(hidden)
        mask = (torch.rand_like(hidden) > 0.3) / 0.7
        DRAWN.append(mask.detach().clone())
        return hidden * mask


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("head", ["clip pairs", "siglip pairs"])
def test_both_passes_drop_out_the_same(head, checkpoints):
    data = make_data(head, 16)
    model = make_model(head)
    place, name = (model, "text_projection") if head == "clip pairs" else (model.text_model, "head")
    setattr(place, name, nn.Sequential(getattr(place, name), Noise()))
    before = copy.deepcopy(model)
    arguments = IN_ORDER | {CHECKPOINTING: checkpoints}
    DRAWN.clear()
    tap = train(head, 4, data=data, model=model, arguments=arguments)[1]
    first, second = DRAWN[-8:-4], DRAWN[-4:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])

    place = before if head == "clip pairs" else before.text_model
    getattr(place, name)[1] = Noise(torch.cat(second))
    before = before.double().train()
    batch = SHARED_HEADS[head].collate(data)
    before(**batch | {"pixel_values": batch["pixel_values"].double()}).loss.backward()
    assert relative_error(tap.steps[0], {n: p.grad for n, p in before.named_parameters()}) < TOLERANCE


@pytest.mark.parametrize("frozen", [("vision_model", "visual_projection"), ("logit_scale",), ("text_",)])
def test_frozen_parts_stay_so_and_the_others_are_exact(frozen):
    data = make_data("clip pairs", 32)
    want, _ = truth("clip pairs", data)
    model = make_model("clip pairs")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    tap = train("clip pairs", 4, data=data, model=model)[1]
    want = {name: gradient for name, gradient in want.items() if not name.startswith(frozen)}
    assert tap.steps[0].keys() == want.keys()
    assert relative_error(tap.steps[0], want) < TOLERANCE


@pytest.mark.parametrize("head", SHARED_HEADS)
def test_bf16_is_as_far_off_as_in_one_pass(head):
    data = make_data(head, 32)
    want, _ = truth(head, data)
    one_pass = relative_error(
        train(head, 1, data=data, arguments={"bf16": True}, trainer_class=Trainer)[1].steps[0], want
    )
    two_passes = relative_error(train(head, 4, data=data, arguments={"bf16": True} | IN_ORDER)[1].steps[0], want)
    assert one_pass > 1e-4
    assert two_passes < 1.5 * one_pass


class Regularised(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.1 * model.get_parameter("logit_scale").square()


class Halved(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) / 2


@pytest.mark.parametrize("base", [Regularised, Halved])
def test_a_loss_around_the_models_stops_before_the_first_step(base):
    from hf_gradutils import GradUtilsTrainerMixin

    class Exact(GradUtilsTrainerMixin, base):
        pass

    with pytest.raises(LossUnitError, match="code of yours adds to it or scales it"):
        train("clip pairs", 4, trainer_class=Exact)


def test_rows_that_depend_on_each_other_stop_before_the_first_step():
    model = make_model("clip pairs")
    model.text_projection = nn.Sequential(model.text_projection, Centred())
    with pytest.raises(LossUnitError, match="depends on the rows beside it"):
        train("clip pairs", 4, model=model)


class Centred(nn.Module):
    def forward(self, rows):
        return rows - rows.mean(0)


class OnlyInTraining(CLIPModel):
    weight = 0.0

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs["loss"] = outputs["loss"] + self.training * self.weight * self.logit_scale
        return outputs


class Grows(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.weight = 1.0


@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_term_that_only_training_shows_stops(from_the_start):
    model = make_model("clip pairs")
    model.__class__ = OnlyInTraining
    model.weight = float(from_the_start)
    with pytest.raises(LossUnitError, match="adds a term that its share does not have"):
        train("clip pairs", 2, model=model, arguments={"max_steps": 3}, callback=Grows())
    assert model.training


class Poisoned(CLIPModel):
    num_forwards = 0

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        factor = float("nan") if type(self).num_forwards < 2 else 1.0
        type(self).num_forwards += torch.is_grad_enabled()
        for name in ("text_embeds", "loss"):
            outputs[name] = outputs[name] * factor
        return outputs


def test_a_first_window_that_is_not_finite_is_skipped():
    model = make_model("clip pairs")
    model.__class__ = Poisoned
    Poisoned.num_forwards = 0
    plugin = GradUtilsPlugin(on_nonfinite="skip")
    trainer, _ = train("clip pairs", 2, model=model, grad_plugin=plugin, arguments={"max_steps": 2}, taps=False)
    steps = trainer.state.log_history[:2]
    assert [step["skipped_steps"] for step in steps] == [1, 1]
    assert math.isfinite(steps[1]["loss"])


class Changes(TrainerCallback):
    """Sets another accumulation after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = 4


@pytest.mark.parametrize("head", SHARED_HEADS)
def test_a_callback_may_raise_the_accumulation(head):
    data = make_data(head, 10)
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.0} | IN_ORDER
    _, tap = train(head, 1, data=data, arguments=arguments, callback=Changes())
    assert relative_error(tap.steps[1], truth(head, data[2:8])[0]) < TOLERANCE


class OwnMean(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("return_loss")
        outputs = model(**inputs)
        return (outputs.text_embeds - outputs.image_embeds).square().mean()


def test_a_mean_of_the_users_own_on_such_a_head_is_one():
    data = make_data("clip pairs", 16)
    steps = [train("clip pairs", n, data=data, trainer_class=OwnMean)[1].steps[0] for n in (1, 4)]
    assert relative_error(*steps) < TOLERANCE


def test_label_smoothing_without_labels_changes_nothing():
    data = make_data("clip pairs", 16)
    _, tap = train("clip pairs", 4, data=data, arguments={"label_smoothing_factor": 0.1})
    assert relative_error(tap.steps[0], truth("clip pairs", data)[0]) < TOLERANCE


class MasksLabels(GradUtilsTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] % 2 == 0, -100)
        return super().compute_loss(model=model, inputs=inputs, **kwargs)


def test_labels_that_change_after_they_were_counted_stop_before_the_first_step():
    with pytest.raises(InvalidArgumentError, match="were counted before its first backward"):
        train("bert pretraining", 4, trainer_class=MasksLabels)


def test_it_predicts_without_labels():
    trainer, _ = train("bert pretraining", 2)
    data = [{k: v for k, v in row.items() if "label" not in k} for row in make_data("bert pretraining", 4)]
    assert len(trainer.predict(data).predictions[0]) == 4
