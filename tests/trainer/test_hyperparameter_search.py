"""A search trains one model after the other; each trial is exact, and the model of the one before is gone."""

import contextlib
import gc
import importlib.machinery
import sys
import tempfile
import types
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_gradutils import GradUtilsPlugin, GradUtilsSeq2SeqTrainer, GradUtilsTrainer
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.trainer_cases import GradientTap, make_data, make_model, reset_accelerate, truth

HEAD = "gpt2 causal"
TOLERANCE = 1e-5
TRIALS = [
    {"gradient_accumulation_steps": 4, "learning_rate": 0.1},
    {"gradient_accumulation_steps": 1, "learning_rate": 0.2},
    {"gradient_accumulation_steps": 2, "learning_rate": 0.3},
]


@dataclass
class Trial:
    """As much of optuna's as transformers asks for."""

    params: dict[str, float]
    number: int


@dataclass
class Study:
    values: list[float] = field(default_factory=list)

    def optimize(self, objective, n_trials, **_):
        for number, params in enumerate(TRIALS[:n_trials]):
            self.values.append(objective(Trial(params, number)))

    def _is_multi_objective(self):
        return False

    @property
    def best_trial(self):
        number = min(range(len(self.values)), key=self.values.__getitem__)
        return types.SimpleNamespace(number=number, value=self.values[number], params=TRIALS[number])


@contextlib.contextmanager
def optuna():
    """A stand-in for the package, so that transformers' own loop over trials runs."""
    module = types.ModuleType("optuna")
    module.__spec__ = importlib.machinery.ModuleSpec("optuna", None)
    module.Trial, module.trial = Trial, types.SimpleNamespace(BaseTrial=Trial, FixedTrial=Trial)
    module.create_study = lambda **_: Study()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optuna", module)
        yield


def space(trial):
    """The trial's own values, and a batch that makes one optimizer step of all rows."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    size = 16 // (num_ranks * trial.params["gradient_accumulation_steps"])
    return {**trial.params, "per_device_train_batch_size": size}


class CountsModels(TrainerCallback):
    def __init__(self):
        self.models, self.alive = [], []

    def build(self):
        model = make_model(HEAD)
        self.models.append(weakref.ref(model))
        return model

    def on_step_end(self, *args, **kwargs):
        self.alive.append(sum(model() is not None for model in self.models))


class KeepsLosses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_evaluate(self, *args, metrics, **kwargs):
        self.seen.append(metrics["eval_loss"])


def make_trainer(trainer_class, *, callbacks, build=lambda: make_model(HEAD), arguments=None, **options):
    """A Trainer that makes its models itself; with the arguments' class that it wants."""
    reset_accelerate()
    arguments_class = Seq2SeqTrainingArguments if issubclass(trainer_class, Seq2SeqTrainer) else TrainingArguments
    told = {"output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-tests"), "use_cpu": True}
    told |= {"max_steps": 1, "logging_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "disable_tqdm": True}
    told |= {"save_strategy": "no", "lr_scheduler_type": "constant", "report_to": [], "dataloader_pin_memory": False}
    return trainer_class(
        model_init=build,
        args=arguments_class(**told | (arguments or {})),
        train_dataset=make_data(HEAD),
        eval_dataset=make_data(HEAD, 7),
        data_collator=HEADS[HEAD].collate,
        callbacks=callbacks,
        **options,
    )


def search(trainer):
    with optuna():
        return trainer.hyperparameter_search(space, n_trials=len(TRIALS), backend="optuna")


@pytest.mark.parametrize("trainer_class", [GradUtilsTrainer, GradUtilsSeq2SeqTrainer])
@pytest.mark.parametrize("checks", [False, True])
@on_layouts("one_rank", "ddp2")
def test_every_trial_is_exact(trainer_class, checks, layout):
    tap = GradientTap()
    trainer = make_trainer(trainer_class, callbacks=[tap], check_invariance=checks)
    best = search(trainer)
    want, _ = truth(HEAD, make_data(HEAD))
    assert len(tap.steps) == len(TRIALS)
    assert [relative_error(got, want) < TOLERANCE for got in tap.steps] == [True] * len(TRIALS)
    assert LAYOUTS[layout].num_ranks == trainer.args.world_size
    if trainer.args.process_index == 0:
        assert best.hyperparameters == TRIALS[int(best.run_id)]


@on_layouts("one_rank", "ddp2")
def test_the_evaluation_of_each_trial_is_exact(layout):
    arguments = {"eval_strategy": "epoch", "per_device_eval_batch_size": 2}
    trainer = make_trainer(GradUtilsTrainer, callbacks=[losses := KeepsLosses()], arguments=arguments)
    search(trainer)
    gradients, _ = truth(HEAD, make_data(HEAD))
    for params, got in zip(TRIALS, losses.seen, strict=True):
        model = make_model(HEAD).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= params["learning_rate"] * gradients[name]
            want = model(**HEADS[HEAD].collate(make_data(HEAD, 7)))["loss"].item()
        assert got == pytest.approx(want, rel=1e-5)


@on_layouts("one_rank", "ddp2")
def test_models_of_earlier_trials_live_as_long_as_in_the_stock_trainer(layout):
    gc.collect()
    gc.disable()
    try:
        stock, ours = [CountsModels(), CountsModels()]
        search(make_trainer(Trainer, callbacks=[stock], build=stock.build))
        search(make_trainer(GradUtilsTrainer, callbacks=[ours], build=ours.build))
    finally:
        gc.enable()
    assert ours.alive == stock.alive == [1] * len(TRIALS)


class Interrupts(TrainerCallback):
    def on_substep_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_a_trial_that_is_interrupted_leaves_gradients_as_wide_as_their_parameters():
    plugin = GradUtilsPlugin(accumulate_in_float32=True)
    trainer = make_trainer(
        GradUtilsTrainer, callbacks=[], build=lambda: make_model(HEAD).bfloat16(), grad_plugin=plugin
    )
    with optuna():
        trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, space
        trainer.train(trial=Trial(TRIALS[1], 0))
        trainer.add_callback(Interrupts())
        with pytest.raises(KeyboardInterrupt):
            trainer.train(trial=Trial(TRIALS[0], 1))
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
