"""What users write around a Trainer: right where it is right with the stock Trainer, else right or one clear error.

Each class of a user's is a function of its base: `Trainer` for the stock one, ours below it, or behind the mixin.
"""

import types

import pytest
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, GradUtilsTrainerMixin
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, train, truth

CAUSAL, CLASSES = "llama causal", "bert classes"
TOLERANCE = 1e-5


def placed(make, place):
    """The user's class on top of our Trainer, or behind the mixin."""
    if place == "around":
        return make(GradUtilsTrainer)
    return type("InFront", (GradUtilsTrainerMixin, make(Trainer)), {})


PLACES_OF_CODE = ["around", "behind"]
PLACES = pytest.mark.parametrize("place", PLACES_OF_CODE)
ON_LAYOUTS_AND_PLACES = pytest.mark.parametrize(
    ("layout", "place"), [("one_rank", "around"), ("one_rank", "behind"), ("ddp2", "around"), ("fsdp2x2", "behind")]
)


def summed(outputs, labels):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


# ---- Losses of the user's own ----


def own_loss(loss_of):
    """A Trainer whose loss is ``loss_of(trainer, outputs, labels, count)``."""

    def make(base):
        class Own(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                outputs = model(**inputs)
                loss = loss_of(self, outputs, inputs["labels"], num_items_in_batch)
                return (loss, outputs) if return_outputs else loss

        return Own

    return make


def num_ranks(trainer):
    return dist.get_world_size() if dist.is_initialized() else 1


def stored_ranks(trainer, outputs, labels, count):
    """A number of ranks that nothing here can see being read."""
    ranks = vars(trainer).setdefault("ranks_at_first", true_ranks())
    return summed(outputs, labels) / count * ranks


def true_ranks():
    return int(dist.group.WORLD.size()) if dist.is_initialized() else 1


LOSSES = {
    "sum / count × stored ranks": stored_ranks,
    "sum / count × processes": lambda t, out, y, n: summed(out, y) / n * t.accelerator.num_processes,
    "sum / count × world size": lambda t, out, y, n: summed(out, y) / n * t.args.world_size,
    "sum / count × group": lambda t, out, y, n: summed(out, y) / n * num_ranks(t),
    "sum / count": lambda t, out, y, n: summed(out, y) / n,
    "sum / count / accumulation": lambda t, out, y, n: summed(out, y) / n / t.args.gradient_accumulation_steps,
    "mean": lambda t, out, y, n: out.loss,
    "mean / accumulation": lambda t, out, y, n: out.loss / t.args.gradient_accumulation_steps,
    "half of each": lambda t, out, y, n: (
        (summed(out, y) / n * t.accelerator.num_processes + out.loss / t.args.gradient_accumulation_steps) / 2
    ),
    "half of each, one undivided": lambda t, out, y, n: (
        (summed(out, y) / n * t.accelerator.num_processes + out.loss) / 2
    ),
}


SETTINGS_OF_LAYOUTS = [
    *(("one_rank", place, counts) for place in PLACES_OF_CODE for counts in ("auto", "first", "streamed")),
    *(("ddp2", place, "auto") for place in PLACES_OF_CODE),
    *(("ddp2", "around", counts) for counts in ("first", "streamed")),
    ("fsdp2x2", "behind", "auto"),
]


@pytest.mark.wide
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("layout", "place", "counts"), SETTINGS_OF_LAYOUTS)
@on_layouts()
def test_factors_of_a_loss_are_found_out(layout, place, loss, counts):
    want, want_loss = truth(CAUSAL, make_data(CAUSAL))
    plugin = GradUtilsPlugin(counts=counts)
    trainer_class = placed(own_loss(LOSSES[loss]), place)
    trainer, tap = train(CAUSAL, 4, layout=layout, trainer_class=trainer_class, grad_plugin=plugin)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


@pytest.mark.wide
@on_layouts("one_rank", "ddp2")
@PLACES
@pytest.mark.parametrize("loss", ["sum / count × processes", "sum / count", "mean / accumulation", "half of each"])
def test_the_count_over_one_rank_only_is_not_mistaken(layout, place, loss):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    options = {"average_tokens_across_devices": False}
    trainer_class = placed(own_loss(LOSSES[loss]), place)
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=trainer_class, arguments=options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


class EvaluatesFirst(TrainerCallback):
    """Before the first step, and after it."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.losses.append(metrics["eval_loss"])


@pytest.mark.wide
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("layout", "place"), [("one_rank", "behind"), ("ddp2", "around")])
@on_layouts()
def test_the_evaluation_loss_has_no_factor_either(layout, place, loss):
    data, seen = make_data(CAUSAL), EvaluatesFirst()
    _, want = truth(CAUSAL, data)
    trainer_class = placed(own_loss(LOSSES[loss]), place)
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer, _ = train(
        CAUSAL, 4, layout=layout, trainer_class=trainer_class, eval_data=data, arguments=options, callback=seen
    )
    seen.losses.append(trainer.evaluate()["eval_loss"])
    assert seen.losses[:3] == pytest.approx([want] * 3, rel=1e-5)


def among_ranks(trainer, outputs, labels, count):
    """A term of all ranks' activations, which are averaged over the true number of ranks."""
    seen = outputs.logits.detach().mean()
    if dist.is_initialized():
        dist.all_reduce(seen)
        seen /= dist.get_world_size()
    return outputs.loss + 0.1 * seen


@on_layouts("ddp2", "fsdp2x2")
def test_a_loss_that_communicates_is_told_the_true_number_of_ranks(layout):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    trainer_class = placed(own_loss(among_ranks), "around")
    plugin = GradUtilsPlugin(check_loss_unit=False)  # each rank's loss has a term of the others
    trainer, tap = train(CAUSAL, 4, layout=layout, trainer_class=trainer_class, grad_plugin=plugin)
    assert trainer._unit.contract.communicates
    assert not trainer._unit.contract.is_asked_alone
    assert relative_error(tap.steps[0], want) < TOLERANCE


@pytest.mark.parametrize("loss", ["sum / count × processes", "mean / accumulation", "half of each"])
@on_layouts("one_rank", "ddp2")
def test_a_loss_set_on_the_object_is_asked_too(layout, loss):
    class SetsItself(GradUtilsTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.compute_loss = types.MethodType(own_loss(LOSSES[loss])(Trainer).compute_loss, self)

    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=SetsItself)
    assert relative_error(tap.steps[0], want) < TOLERANCE
