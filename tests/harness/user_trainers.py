"""Trainers of users on a tiny float64 net, on some ranks and with the stock Trainer on one process."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from tests.harness.layouts import LAYOUTS, run
from tests.harness.trainer_cases import reset_accelerate

NUM_ROWS, NUM_STEPS = 12, 3


def plain(base):
    return base


def rows():
    """With 1 to 3 targets each."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(NUM_ROWS * NUM_STEPS):
        labels = torch.randint(2, (3,), generator=generator)
        labels[1 + index % 3 :] = -100
        made.append({"x": torch.randn(3, 4, generator=generator, dtype=torch.float64), "labels": labels})
    return made


class Net(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        torch.manual_seed(3)
        self.function = function
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x, labels=None):
        logits = self.last(torch.tanh(self.first(x)))
        if self.function is not None and self.training:
            logits = self.function.apply(logits)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@dataclass(frozen=True)
class User:
    """A user's code; functions and classes of modules, so that ranks get them by their names."""

    make: Callable[..., type[Trainer]] = plain
    """(a base, *options) → the user's Trainer."""
    options: tuple[Any, ...] = ()
    model: Callable[..., nn.Module] = Net
    model_options: tuple[Any, ...] = ()
    callback: Callable[[Trainer], Any] | None = None
    data: Callable[..., Any] = rows
    data_options: tuple[Any, ...] = ()
    collator: Callable[..., Any] | None = None
    """Makes one."""


def train(user, layout="one_rank", accumulation=1, *, stock=False, max_norm=0.0, counts="auto", keeps=None):
    """Weights after a few steps, of the model and of what else is trained, and the log; ``keeps`` gets the Trainer."""
    reset_accelerate()
    options = {} if stock else {"grad_plugin": GradUtilsPlugin(counts=counts)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = user.make(Trainer if stock else GradUtilsTrainer, *user.options)(
            model=user.model(*user.model_options),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=NUM_ROWS // accumulation // LAYOUTS[layout].num_ranks,
                gradient_accumulation_steps=accumulation,
                max_steps=NUM_STEPS,
                optim="sgd",
                learning_rate=0.1,
                lr_scheduler_type="constant",
                max_grad_norm=max_norm,
                logging_steps=1,
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=user.data(*user.data_options),
            data_collator=None if user.collator is None else user.collator(*user.data_options),
            **options,
        )
        if user.callback is not None:
            trainer.add_callback(user.callback(trainer))
        if keeps is not None:
            keeps.append(trainer)
        trainer.train()
    other = getattr(trainer, "other", None)
    others = [] if other is None else [other] if isinstance(other, nn.Parameter) else list(other.parameters())
    weights = [p.detach().clone() for p in (*trainer.model.parameters(), *others)]
    return weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def train_each(layout, user, accumulation, settings):
    return [train(user, layout, accumulation, max_norm=max_norm, counts=counts) for counts, max_norm in settings]


def are_close(weights, others):
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(weights, others, strict=True))


def assert_as_stock(user, layout, accumulation, settings):
    """With each (counts, largest norm) weights, losses, norms and numbers of targets are those of the whole batch."""
    stock = {max_norm: train(user, stock=True, max_norm=max_norm) for _, max_norm in settings}
    assert len(stock) == 1 or len({float(weights[0].abs().sum()) for weights, _ in stock.values()}) > 1, "control"
    for trainings in run(train_each, layout, user, accumulation, settings):
        for (_, max_norm), (got, log) in zip(settings, trainings, strict=True):
            want, stock_log = stock[max_norm]
            assert are_close(got, want)
            assert [entry["num_targets"] for entry in log] == [NUM_ROWS * 2] * NUM_STEPS
            for entry, other in zip(log, stock_log, strict=True):
                assert entry["loss"] == pytest.approx(other["loss"], abs=1e-4)
                assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
