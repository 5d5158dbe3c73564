"""Inputs with which a hostile tester broke the claim, or nearly so."""

import functools
import os

import pytest
import torch
from accelerate import PartialState
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth
from tests.trainer.test_overrides import CAUSAL, ON_LAYOUTS_AND_PLACES, PLACES, TOLERANCE, own_loss, placed, summed

TOKENS = "bert tokens"


def calls_super(base):
    class CallsSuper(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    return CallsSuper


@PLACES
@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing_under_an_override(place, accumulation):
    data, model = make_data(CAUSAL), make_model(CAUSAL).double()
    batch = HEADS[CAUSAL].collate(data)
    labels = batch.pop("labels")
    LabelSmoother(0.1)(model(**batch), labels, shift_labels=True).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    arguments = {"label_smoothing_factor": 0.1}
    _, tap = train(CAUSAL, accumulation, trainer_class=placed(calls_super, place), arguments=arguments)
    assert relative_error(tap.steps[0], want) < TOLERANCE


def nested(base):
    class Nested(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs["own"], return_outputs, num_items_in_batch=num_items_in_batch)

    return Nested


def own_label_name(base):
    class Renames(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {("labels" if name == "targets" else name): value for name, value in inputs.items()}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    return Renames


def doubled(base):
    class Doubled(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
            return super().training_step(model, inputs, num_items_in_batch)

    return Doubled


@PLACES
@pytest.mark.parametrize("head", [CAUSAL, TOKENS])
@pytest.mark.parametrize("user", ["nested", "renamed"])
def test_batches_that_are_no_parts_are_not_rescaled(place, head, user):
    make = {"nested": nested, "renamed": own_label_name}[user]

    def collate(rows):
        batch = HEADS[head].collate(rows)
        return (
            {"own": batch} if user == "nested" else {("targets" if k == "labels" else k): v for k, v in batch.items()}
        )

    want, _ = truth(head, make_data(head))
    _, tap = train(head, 1, trainer_class=placed(make, place), data_collator=collate)
    assert relative_error(tap.steps[0], want) < TOLERANCE


@PLACES
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_batch_twice_over_is_no_part_to_a_head_that_ignores_the_count(place, accumulation):
    want, _ = truth(TOKENS, make_data(TOKENS))
    _, tap = train(TOKENS, accumulation, trainer_class=placed(doubled, place))
    assert relative_error(tap.steps[0], want) < TOLERANCE


def ranks_of_the_state():
    return PartialState().num_processes


LOSSES = {
    "÷ accumulation in training": lambda t, out, y, n: (
        out.loss / t.args.gradient_accumulation_steps if t.model.training else out.loss
    ),
    "÷ accumulation with gradients": lambda t, out, y, n: (
        out.loss / t.args.gradient_accumulation_steps if out.logits.requires_grad else out.loss
    ),
    "÷ 4, a number": lambda t, out, y, n: out.loss / 4,
    "× WORLD_SIZE": lambda t, out, y, n: summed(out, y) / n * int(os.environ.get("WORLD_SIZE", "1")),
    "× ranks of the state": lambda t, out, y, n: summed(out, y) / n * ranks_of_the_state(),
    "× ranks in training": lambda t, out, y, n: (
        summed(out, y) / n * t.accelerator.num_processes if t.model.training else out.loss
    ),
}


@pytest.mark.wide
@pytest.mark.parametrize("loss", LOSSES)
@ON_LAYOUTS_AND_PLACES
@on_layouts()
def test_factors_that_hide(layout, place, loss):
    if torch.distributed.is_initialized():
        os.environ.setdefault("WORLD_SIZE", str(torch.distributed.get_world_size()))
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(own_loss(LOSSES[loss]), place))
    assert relative_error(tap.steps[0], want) < TOLERANCE


def drops_the_count(base):
    class Drops(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss
            if num_items_in_batch is not None:
                loss = summed(outputs, inputs["labels"]) / num_items_in_batch * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs)

    return Drops


@ON_LAYOUTS_AND_PLACES
@on_layouts()
def test_a_step_that_drops_the_count_gets_a_mean(layout, place):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(drops_the_count, place))
    assert relative_error(tap.steps[0], want) < TOLERANCE


def adds_and_divides(base):
    class Adds(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs) + 0.2 * self.compute_loss(model, inputs)
            self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
            return loss.detach()

    return Adds


@PLACES
def test_a_loss_that_is_added_to_and_divided_stops(place):
    with pytest.raises(InvalidArgumentError, match="current_gradient_accumulation_steps"):
        train(CAUSAL, 4, trainer_class=placed(adds_and_divides, place))


def two_passes_of_half(base):
    class Passes(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            for _ in range(2):
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) / 2
                self.accelerator.backward(loss)
            return 2 * loss.detach()

    return Passes


@PLACES
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_weight_is_not_taken_for_the_accumulation(place, accumulation):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, accumulation, trainer_class=placed(two_passes_of_half, place))
    assert relative_error(tap.steps[0], want) < TOLERANCE


def starts_at_nothing(base):
    return own_loss(lambda t, out, y, n: summed(out, y) / n * t.accelerator.num_processes * (t.state.global_step > 0))(
        base
    )


@on_layouts("one_rank", "ddp2")
def test_a_loss_that_begins_at_0_is_asked_again(layout):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    arguments = {"max_steps": 2}
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(starts_at_nothing, "around"), arguments=arguments)
    assert relative_error(tap.steps[1], want) < TOLERANCE


@on_layouts("one_rank", "ddp2")
def test_a_patch_that_looks_like_the_original_is_found(layout):
    original = Trainer.compute_loss

    @functools.wraps(original)
    def patched(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = summed(outputs, inputs["labels"]) / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    want, _ = truth(CAUSAL, make_data(CAUSAL))
    Trainer.compute_loss = patched
    try:
        _, tap = train(CAUSAL, 4, layout=layout)
    finally:
        Trainer.compute_loss = original
    assert relative_error(tap.steps[0], want) < TOLERANCE


def splits(base):
    class Splits(base):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            return [{k: v[i::2] for k, v in batch.items()} for batch in batches for i in range(2)], count

        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    return Splits


def test_other_numbers_of_batches_are_weighted_step_by_step():
    data = make_data(CAUSAL)
    _, tap = train(CAUSAL, 2, trainer_class=placed(splits, "around"))
    want, _ = truth(CAUSAL, data[:8])
    assert relative_error(tap.steps[0], want) < TOLERANCE


def test_other_numbers_of_batches_are_refused_where_the_count_matters():
    def make(base):
        return own_loss(lambda t, out, y, n: summed(out, y) / n)(splits(base))

    with pytest.raises(InvalidArgumentError, match="4 batches where 2 make an optimizer step"):
        train(CAUSAL, 2, trainer_class=placed(make, "around"))


def clips_itself(base):
    class Clips(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(model.parameters(), 1e9)
            return loss

    return Clips


@PLACES
@pytest.mark.parametrize("clips", [0.0, 1e9])
def test_a_step_that_clips_by_itself(place, clips):
    want, want_loss = truth(CAUSAL, make_data(CAUSAL))
    trainer, tap = train(CAUSAL, 4, trainer_class=placed(clips_itself, place), arguments={"max_grad_norm": clips})
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


def unlike_the_models(base):
    """A loss of columns that the model's own head cannot take."""

    class Unlike(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return outputs.logits[:, 0].float().square().mean()

        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    return Unlike


@pytest.mark.parametrize("accumulation", [1, 2])
def test_labels_that_the_models_own_head_cannot_take(accumulation):
    def collate(rows):
        batch = HEADS[TOKENS].collate(rows)
        return {**batch, "labels": torch.ones(len(rows), 3)}

    trainer, _ = train(TOKENS, accumulation, trainer_class=placed(unlike_the_models, "around"), data_collator=collate)
    assert trainer.state.global_step == 1


def counts_late(base):
    class Late(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            if num_items_in_batch is None:
                return outputs.loss
            return summed(outputs, inputs["labels"]) / num_items_in_batch * self.accelerator.num_processes

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    return Late


@ON_LAYOUTS_AND_PLACES
@on_layouts()
def test_a_mean_of_a_batch_that_is_counted_late(layout, place):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(counts_late, place))
    assert relative_error(tap.steps[0], want) < TOLERANCE


class Calls(GradUtilsTrainer):
    """Calls its own step by keywords, and draws from a generator of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator, self.drawn = torch.Generator().manual_seed(0), []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.drawn.append(float(torch.rand((), generator=self.generator)))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


def test_generators_of_the_users_are_as_before_the_check():
    trainer, _ = train(CAUSAL, 2, trainer_class=Calls)
    wanted = torch.Generator().manual_seed(0)
    assert trainer.drawn == [float(torch.rand((), generator=wanted)) for _ in range(2)]
