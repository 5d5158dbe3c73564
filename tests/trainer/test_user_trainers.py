"""Trainers of users that drop, restore or change gradients, or train more than their model.

They train as the stock Trainer with the whole batch on one process, or an error stops them before a step.
"""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_gradutils import GradUtilsTrainerMixin
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from tests.harness.layouts import on_layouts
from tests.harness.user_loops import Clamped, Constant, Sign
from tests.harness.user_trainers import Net, User, are_close, assert_as_stock, train

FINAL = [("auto", 0.05), ("first", 0.0)]
SETTINGS = [*FINAL, ("streamed", 0.0), ("streamed", 0.05)]
"""(counts, largest norm of the gradient)."""
SEVERAL = pytest.mark.parametrize(("layout", "accumulation"), [("one_rank", 2), ("ddp2", 1), ("ddp2", 2)])


# ---- Gradients dropped between two losses of a step ----

DROP = {
    "to none": lambda trainer, model: model.zero_grad(),
    "to zeros": lambda trainer, model: model.zero_grad(set_to_none=False),
    "by the optimizer": lambda trainer, model: trainer.optimizer.zero_grad(),
    "kept": lambda trainer, model: None,
}


def attacks(base, drop, restores=False):
    class Attacks(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            saved = [p.grad.clone() for p in model.parameters()]
            DROP[drop](self, model)
            self.accelerator.backward(self.compute_loss(model, inputs | {"x": inputs["x"] + 0.3}))
            for p, g in zip(model.parameters(), saved, strict=True) if restores else ():
                p.grad += g
            return loss.detach()

    return Attacks


def sharpness(base, drop):
    class Sharpness(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            first = super().training_step(model, inputs, num_items_in_batch)
            parameters = list(model.parameters())
            old = [p.detach().clone() for p in parameters]
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            with torch.no_grad():
                for p in parameters:
                    p += 0.2 * p.grad / norm
            DROP[drop](self, model)
            super().training_step(model, inputs, num_items_in_batch)
            with torch.no_grad():
                for p, was in zip(parameters, old, strict=True):
                    p.copy_(was)
            return first

    return Sharpness


def projects(base, drop):
    """Two tasks, whose gradients are taken apart and put together by hand."""

    class Projects(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            first = [p.grad.clone() for p in model.parameters()]
            DROP[drop](self, model)
            self.accelerator.backward(self.compute_loss(model, inputs | {"x": -inputs["x"]}))
            for p, g in zip(model.parameters(), first, strict=True):
                p.grad += g - (g * p.grad).sum().clamp(max=0) / p.grad.square().sum() * p.grad
            return loss.detach()

    return Projects


@pytest.mark.parametrize("make", [attacks, sharpness])
@pytest.mark.parametrize("drop", ["to none", "to zeros", "by the optimizer"])
@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_gradients_that_are_dropped_count_for_nothing(layout, drop, make):
    user, keeping = User(make, (drop,)), User(make, ("kept",))
    assert not are_close(train(keeping, stock=True)[0], train(user, stock=True)[0]), "control"
    assert_as_stock(user, layout, 1, SETTINGS)


BY_HAND = {
    "restores": User(attacks, ("to none", True)),
    "restores into zeros": User(attacks, ("to zeros", True)),
    "projects": User(projects, ("to none",)),
}


@pytest.mark.parametrize("user", BY_HAND)
@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_gradients_that_are_restored_by_hand_add_up(layout, user):
    assert_as_stock(BY_HAND[user], layout, 1, FINAL)


@on_layouts("one_rank", "ddp2")
def test_sums_that_are_restored_by_hand_are_refused(layout):
    for user in BY_HAND.values():
        with pytest.raises(TargetCountError, match=r"by hand.*counts='first'"):
            train(user, layout, counts="streamed")


# ---- Parameters of no model ----


def weighs(base, where):
    """A loss with a parameter of its own, stepped on in one of three places."""

    class Weighs(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.other = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.second = torch.optim.SGD([self.other], lr=0.1)

        def create_optimizer(self, *args, **kwargs):
            super().create_optimizer(*args, **kwargs)
            if where == "the Trainer's":
                self.optimizer.add_param_group({"params": [self.other], "lr": 0.1})
            if where == "prepared":
                self.second = self.accelerator.prepare(self.second)
            return self.optimizer

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs["loss"] * torch.exp(-self.other[0]) + self.other[0]
            return (loss, outputs) if return_outputs else loss

    return Weighs


class StepsOnTheSecond(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.second.step()
        self.trainer.second.zero_grad()


STRANGERS = {
    "the Trainer's": User(weighs, ("the Trainer's",)),
    "prepared": User(weighs, ("prepared",), callback=StepsOnTheSecond),
    "not prepared": User(weighs, ("not prepared",), callback=StepsOnTheSecond),
}


@pytest.mark.parametrize("place", STRANGERS)
def test_parameters_of_no_model_are_trained_in_one_micro_batch_on_one_process(place):
    assert_as_stock(STRANGERS[place], "one_rank", 1, FINAL)


@SEVERAL
@on_layouts()
def test_elsewhere_nothing_steps_on_them(layout, accumulation):
    for place, user in STRANGERS.items():
        made = []
        error = InvalidArgumentError if place == "the Trainer's" else TargetCountError
        with pytest.raises(error, match=r"no model .* part of (a module|the model)"):
            train(user, layout, accumulation, keeps=made)
        assert made[0].other.item() == 0, place


# ---- Backwards of the user's own that are not linear ----


@pytest.mark.parametrize("function", [Constant, Clamped, Sign])
def test_a_backward_that_is_not_linear_gets_the_gradient_of_the_mean(function):
    user = User(model_options=(function,))
    assert_as_stock(user, "one_rank", 1, FINAL)
    assert not are_close(train(user, counts="streamed")[0], train(user, stock=True)[0]), "control"


# ---- Complex parameters ----


class Fourier(Net):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x, labels=None):
        return super().forward(torch.fft.ifft(torch.fft.fft(x) * self.weight).real, labels)


@pytest.mark.parametrize(("layout", "accumulation"), [("one_rank", 1), ("one_rank", 2), ("ddp2", 1), ("ddp2", 2)])
def test_complex_parameters_are_exact(layout, accumulation):
    assert_as_stock(User(model=Fourier), layout, accumulation, [*SETTINGS, ("auto", 100.0)])


# ---- A second model, trained inside of the step ----


def adversary(base, where):
    class Adversary(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            with torch.random.fork_rng():  # the order of the rows stays
                self.other = nn.Linear(2, 1).double()
            nn.init.constant_(self.other.weight, 0.3)
            self.second = torch.optim.SGD(self.other.parameters(), lr=0.1)
            if where != "create_optimizer":
                self.other, self.second = self.accelerator.prepare(self.other, self.second)

        def create_optimizer(self, *args, **kwargs):
            if where != "__init__":
                self.other, self.second = self.accelerator.prepare(self.other, self.second)
            return super().create_optimizer(*args, **kwargs)

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            fake = model(**inputs)["logits"]
            loss = self.other(fake.detach()).square().mean() + (self.other(-fake.detach()) - 1).square().mean()
            told = {"num_targets": len(fake), "model": self.other}
            self.accelerator.backward(loss, **(told if isinstance(self, GradUtilsTrainerMixin) else {}))
            self.second.step()
            self.second.zero_grad()
            self.other.requires_grad_(False)
            of_model = (self.other(fake) - 1).square().mean()
            self.accelerator.backward(of_model)
            self.other.requires_grad_(True)
            return of_model.detach()

    return Adversary


@pytest.mark.parametrize("where", ["__init__", "create_optimizer", "in both"])
def test_a_second_model_is_trained_as_with_the_stock_trainer(where):
    assert_as_stock(User(adversary, (where,)), "one_rank", 1, SETTINGS)
