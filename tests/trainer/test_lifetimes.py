"""What a user deletes is freed at once, and what is copied or pickled trains on, as with transformers' Trainer."""

import contextlib
import copy
import gc
import pickle
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, check_invariance
from hf_gradutils.errors import GradUtilsError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.trainer_cases import make_data, make_model, reset_accelerate, train

BOTH = pytest.mark.parametrize("trainer_class", [Trainer, GradUtilsTrainer])
"""transformers' own is the control: it shows that the test can pass."""
HEAD = "gpt2 causal"


@contextlib.contextmanager
def without_collections():
    """Only what no reference holds any more is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def references(*objects):
    return [weakref.ref(thing) for thing in objects]


def alive(made):
    return [type(thing).__name__ for reference in made if (thing := reference()) is not None]


def trained(trainer_class, layout, **options):
    trainer, _ = train(HEAD, 2, layout=layout, trainer_class=trainer_class, taps=False, **options)
    return trainer


def parts(trainer):
    made = [trainer, trainer.accelerator, trainer.optimizer]
    if not isinstance(trainer.model, FSDPModule):  # FSDP2's own cycles keep the model
        made += [trainer.model, trainer.model_wrapped]
    return references(*(thing for thing in made if thing is not None))


def is_only_built(trainer_class, layout):
    other = trained(trainer_class, layout)
    return parts(trainer_class(model=make_model(HEAD), args=other.args, train_dataset=make_data(HEAD)))


def trains(trainer_class, layout):
    return parts(trained(trainer_class, layout))


def trains_twice(trainer_class, layout):
    trainer = trained(trainer_class, layout)
    trainer.train()
    return parts(trainer)


def evaluates(trainer_class, layout):
    trainer = trained(trainer_class, layout, eval_data=make_data(HEAD, 7))
    trainer.evaluate()
    return parts(trainer)


def only_evaluates(trainer_class, layout):
    if layout == "fsdp2x2":
        return []  # accelerate wants to prepare an optimizer with it
    other = trained(trainer_class, layout)
    trainer = trainer_class(
        model=make_model(HEAD),
        args=other.args,
        eval_dataset=make_data(HEAD, 7),
        data_collator=HEADS[HEAD].collate,
    )
    trainer.evaluate()
    return parts(trainer)


def trains_with_a_loss_function(trainer_class, layout):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    return parts(trained(trainer_class, layout, compute_loss_func=loss))


def smooths_labels(trainer_class, layout):
    return parts(trained(trainer_class, layout, arguments={"label_smoothing_factor": 0.1}))


def is_checked(trainer_class, layout):
    trainer = trained(trainer_class, layout)
    check_invariance(trainer)
    return parts(trainer)


class Interrupts(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def is_set_up_in_many_ways(trainer_class, layout):
    plugin = GradUtilsPlugin(fold_into_optimizer=layout == "one_rank", sync="auto", grad_norm_groups="layer")
    options = {"grad_plugin": plugin} if trainer_class is GradUtilsTrainer else {}
    return parts(trained(trainer_class, layout, arguments={"optim": "adamw_torch_fused", "max_steps": 4}, **options))


class RunsOutOfMemory(TrainerCallback):
    def __init__(self):
        self.has_raised = False

    def on_substep_end(self, *args, **kwargs):
        if not self.has_raised:
            self.has_raised = True
            raise RuntimeError("CUDA out of memory.")


def looks_for_its_batch_size(trainer_class, layout):
    arguments = {"auto_find_batch_size": True}
    return parts(trained(trainer_class, layout, arguments=arguments, callback=RunsOutOfMemory()))


def is_interrupted(trainer_class, layout):
    trainer = trained(trainer_class, layout)
    trainer.add_callback(Interrupts())
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    return parts(trainer)


class RaisesInItsLoss:
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyError("of the user's")
        return super().compute_loss(*args, **kwargs)


def raises_in_its_loss(trainer_class, layout):
    trainer = trained(type("Raises", (RaisesInItsLoss, trainer_class), {}), layout)
    trainer.args.max_steps = 2
    with contextlib.suppress(KeyError):
        trainer.train()
        pytest.fail("no error")
    return parts(trainer)


@pytest.mark.wide
@BOTH
@pytest.mark.parametrize(
    "case",
    [
        is_only_built,
        trains,
        trains_twice,
        evaluates,
        only_evaluates,
        trains_with_a_loss_function,
        smooths_labels,
        is_checked,
        is_set_up_in_many_ways,
        looks_for_its_batch_size,
        is_interrupted,
        raises_in_its_loss,
    ],
)
@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_all_is_freed_with_its_last_reference(case, trainer_class, layout):
    with without_collections():
        assert alive(case(trainer_class, layout)) == []


# ---- Errors of ours ----


def raising(**options):
    """Train until an error of ours, in a frame that is left then; the models of it."""
    models = []
    model = make_model(HEAD)
    models.append(weakref.ref(model))
    with contextlib.suppress(GradUtilsError):
        train(HEAD, 2, model=model, taps=False, **options)
        pytest.fail("no error")
    return models


def has_a_loss_of_another_unit():
    def row_means(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs["logits"][:, :-1], labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (losses.sum(1) / labels.ne(-100).sum(1).clamp(min=1)).mean()

    return raising(compute_loss_func=row_means)


def has_no_targets():
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in make_data(HEAD)]
    return raising(data=data)


def has_labels_that_cannot_be_counted():
    data = [row | {"labels": row["labels"].bool()} for row in make_data(HEAD)]
    return raising(data=data)


class MakesInf(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(model.parameters()).fill_(float("inf"))


def has_no_finite_gradient():
    return raising(callback=MakesInf())


def has_no_finite_gradient_on_the_device():
    return raising(callback=MakesInf(), arguments={"optim": "adamw_torch_fused", "max_steps": 3, "logging_steps": 9})


def skips_once_too_often():
    plugin = GradUtilsPlugin(on_nonfinite="skip", max_skipped_steps=1)
    return raising(callback=MakesInf(), grad_plugin=plugin, arguments={"max_steps": 3})


class DriftsApart(GradUtilsTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for parameter in self.model.parameters():
            parameter.grad *= 1 + self.args.gradient_accumulation_steps
        return loss


def is_not_invariant():
    return raising(trainer_class=DriftsApart, check_invariance=True)


@pytest.mark.parametrize(
    "case",
    [
        has_a_loss_of_another_unit,
        has_no_targets,
        has_labels_that_cannot_be_counted,
        has_no_finite_gradient,
        has_no_finite_gradient_on_the_device,
        skips_once_too_often,
        is_not_invariant,
    ],
)
@on_layouts("one_rank", "ddp2")
def test_an_error_of_ours_keeps_nothing_alive(case, layout):
    with without_collections():
        assert alive(case()) == []


# ---- Copied and pickled ----

TOLERANCE = 1e-5
ARGUMENTS = {
    "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-tests"),
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def collate(rows):  # HEADS' own cannot be pickled
    return HEADS[HEAD].collate(rows)


def built(trainer_class, layout):
    reset_accelerate()
    size = 16 // (2 * LAYOUTS[layout].num_data_ranks)
    return trainer_class(
        model=make_model(HEAD),
        args=TrainingArguments(**ARGUMENTS, per_device_train_batch_size=size),
        train_dataset=make_data(HEAD),
        eval_dataset=make_data(HEAD, 7),
        data_collator=collate,
    )


def learned(num_steps):
    """The weights after so many steps on all the data, in float64 on one process."""
    model = make_model(HEAD).double()
    for _ in range(num_steps):
        model.zero_grad()
        model(**collate(make_data(HEAD)))["loss"].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= ARGUMENTS["learning_rate"] * parameter.grad
    return weights_of(model)


def weights_of(model):
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@BOTH
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@on_layouts("one_rank", "ddp2")
def test_a_trainer_that_has_not_trained_may_be_copied_and_trains_exactly(copied, trainer_class, layout):
    original = built(trainer_class, layout)
    made = copied(original)
    assert type(made) is trainer_class
    for trainer in (made, original):
        trainer.train()
        error = relative_error(weights_of(trainer.model), learned(1))
        assert (error < TOLERANCE) == (trainer_class is GradUtilsTrainer), "the stock Trainer is the control"


@on_layouts("one_rank", "ddp2")
def test_a_trainer_that_has_trained_may_be_copied_and_goes_on_exactly(layout):
    original = built(GradUtilsTrainer, layout)
    original.train()
    made = copy.deepcopy(original)
    assert made.evaluate()["eval_loss"] == original.evaluate()["eval_loss"]
    for trainer in (made, original):
        trainer.train()
        assert relative_error(weights_of(trainer.model), learned(2)) < TOLERANCE


def test_control_a_copy_of_the_stock_trainer_steps_the_optimizer_of_its_original():
    original = built(Trainer, "one_rank")
    original.train()
    made = copy.deepcopy(original)
    before = weights_of(made.model)
    made.train()
    assert relative_error(weights_of(made.model), before) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_does_not_need_its_original_and_is_freed_with_its_last_reference(copied):
    made = copied(built(GradUtilsTrainer, "one_rank"))
    with without_collections():
        made.train()
        assert relative_error(weights_of(made.model), learned(1)) < TOLERANCE
        left = parts(made)
        del made
        assert alive(left) == []
