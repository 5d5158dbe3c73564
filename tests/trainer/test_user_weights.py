"""Losses of users with weights and counters of their own train as the stock Trainer with the whole batch."""

import copy

import pytest
import torch

from tests.harness.user_trainers import NUM_STEPS, Net, User, are_close, assert_as_stock, train

AUTO = [("auto", 0.05)]


class Accepts(Net):
    """Its loss may take a count, so that transformers does not divide it."""

    def forward(self, x, labels=None, **kwargs):
        return super().forward(x, labels)


# ---- Weights that look like a division by the number of micro-batches ----


def keeps_close(base, weight, divides):
    """In its own step: the rest of the weight is that of a term that begins at 0."""

    class KeepsClose(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if not hasattr(self, "at_first"):
                self.at_first = copy.deepcopy(self.model).eval()
            model.train()
            inputs = self._prepare_inputs(inputs)
            outputs = model(**inputs)
            with torch.no_grad():
                target = self.at_first(**inputs)["logits"]
            counts = inputs["labels"] != -100
            loss = weight * outputs["loss"] + (1 - weight) * (outputs["logits"] - target)[counts].square().mean()
            if divides:
                loss = loss / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    return KeepsClose


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize(("accumulation", "weight"), [(4, 0.25), (2, 0.5)])
def test_a_weight_in_an_own_step_stays_a_weight(accumulation, weight, divides):
    user = User(keeps_close, (weight, divides), model=Accepts)
    assert are_close(train(user, accumulation=accumulation)[0], train(user, stock=True)[0])


def combine(a, b, weight):
    return weight * a + b


def in_dict(a, b, weight):
    return sum({"task": weight * a, "rest": b}.values())


SPELLED = {
    "function": combine,
    "dict": in_dict,
    "torch.add": lambda a, b, weight: torch.add(weight * a, b),
    "stack": lambda a, b, weight: torch.stack([weight * a, b]).sum(),
    "lerp": lambda a, b, weight: torch.lerp(b / (1 - weight), a, weight),
    "average": lambda a, b, weight: (a + b / weight) * weight,
}


def penalizes(base, weight, spelled="function"):
    """A penalty for leaving the first weights."""

    class Penalizes(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not hasattr(self, "at_first"):
                self.at_first = [p.detach().clone() for p in self.model.parameters()]
            outputs = model(**inputs)
            pairs = zip(self.model.parameters(), self.at_first, strict=True)
            penalty = sum((p - at_first).square().sum() for p, at_first in pairs)
            loss = SPELLED[spelled](outputs["loss"], penalty, weight)
            return (loss, outputs) if return_outputs else loss

    return Penalizes


@pytest.mark.parametrize(
    ("layout", "accumulation", "weight"), [("one_rank", 2, 0.5), ("one_rank", 4, 0.25), ("ddp2", 2, 0.5)]
)
def test_a_weight_in_compute_loss_stays_a_weight(layout, accumulation, weight):
    assert_as_stock(User(penalizes, (weight,), model=Accepts), layout, accumulation, AUTO)


@pytest.mark.parametrize("spelled", SPELLED)
def test_however_it_is_spelled(spelled):
    assert_as_stock(User(penalizes, (0.25, spelled), model=Accepts), "one_rank", 4, AUTO)


def divides_in_its_step(base, number):
    class Divides(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs)) / number
            self.accelerator.backward(loss)
            return loss.detach()

    return Divides


def divides_a_sum(base, number):
    class Divides(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            term = outputs["logits"][inputs["labels"] != -100].square().mean()
            loss = (outputs["loss"] + term) / self.args.gradient_accumulation_steps
            return (loss, outputs) if return_outputs else loss

    return Divides


@pytest.mark.parametrize("make", [divides_in_its_step, divides_a_sum])
def test_control_a_division_of_all_of_the_loss_is_undone(make):
    got, _ = train(User(make, (4,), model=Accepts), accumulation=4)
    assert are_close(got, train(User(make, (1,), model=Accepts), stock=True)[0])


# ---- Counters outside of the Trainer ----

NUM_CALLS = 0


def counts_calls(base, where):
    num_calls = 0

    class Counts(base):
        def __init__(self, *args, **kwargs):
            global NUM_CALLS
            NUM_CALLS = 0
            super().__init__(*args, **kwargs)
            self.seen = []

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            global NUM_CALLS
            nonlocal num_calls
            NUM_CALLS += 1
            num_calls += 1
            self.seen.append(NUM_CALLS if where == "global" else num_calls)
            outputs = model(**inputs)
            loss = min(1, self.seen[-1] / 20) * outputs["loss"]
            return (loss, outputs) if return_outputs else loss

    return Counts


@pytest.mark.parametrize("where", ["global", "closure"])
def test_counters_count_training_only(where):
    made = []
    train(User(counts_calls, (where,)), accumulation=2, keeps=made)
    assert made[0].seen == list(range(1, 2 * NUM_STEPS + 1))
