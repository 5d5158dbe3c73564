"""Numbers of ranks and of micro-batches that a user's loss has read before: in attributes, globals and closures."""

import functools
import os
import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed import get_world_size

from hf_gradutils.trainer import _kept
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, train, truth
from tests.trainer.test_overrides import CAUSAL, TOLERANCE, own_loss, placed, summed, true_ranks

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
ACCUM = 4
elsewhere = types.ModuleType("users_losses")
exec("def times(loss):\n    return loss * NUM_GPUS\n\ndef over(loss):\n    return loss / GRAD_ACCUM\n", vars(elsewhere))
elsewhere.NUM_GPUS, elsewhere.GRAD_ACCUM = WORLD, ACCUM


def keeping(loss_of, **numbers):
    """A Trainer that keeps numbers of its own, which are those at the start."""

    def make(base):
        class Keeps(own_loss(loss_of)(base)):
            NUM_PROCESSES = WORLD

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.world_size = self.accelerator.num_processes
                self.accum = self.args.gradient_accumulation_steps
                self.settings = types.SimpleNamespace(num_gpus=self.world_size)
                self.entries = {"world": self.world_size, 0: self.world_size}
                self.loss_head = Loss(self.accelerator.num_processes)

            def scaled(self, loss):
                return loss * self.world_size

            over = staticmethod(elsewhere.over)

        return Keeps

    return make


class Loss:
    def __init__(self, num_ranks):
        self.num_ranks = num_ranks

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return summed(outputs, labels) / num_items_in_batch * self.num_ranks


def enclosed(world):
    return lambda t, out, y, n: summed(out, y) / n * world


RANKS = {
    "attribute": lambda t, out, y, n: summed(out, y) / n * t.world_size,
    "attribute in a method": lambda t, out, y, n: t.scaled(summed(out, y) / n),
    "attribute of the class": lambda t, out, y, n: summed(out, y) / n * t.NUM_PROCESSES,
    "attribute of an attribute": lambda t, out, y, n: summed(out, y) / n * t.settings.num_gpus,
    "attribute of an object": lambda t, out, y, n: t.loss_head(out, y, n),
    "entry": lambda t, out, y, n: summed(out, y) / n * t.entries["world"],
    "global": lambda t, out, y, n: summed(out, y) / n * WORLD,
    "global of another module": lambda t, out, y, n: elsewhere.times(summed(out, y) / n),
    "imported function": lambda t, out, y, n: summed(out, y) / n * (get_world_size() if dist.is_initialized() else 1),
    "closure": enclosed(WORLD),
    "half of each": lambda t, out, y, n: (summed(out, y) / n * t.world_size + out.loss / t.accum) / 2,
    # no loss that is the model's own times it
    "twice": lambda t, out, y, n: 2 * summed(out, y) / n * t.world_size,
}
MICRO_BATCHES = {
    "attribute": lambda t, out, y, n: 2 * out.loss / t.accum,
    "global": lambda t, out, y, n: 2 * out.loss / ACCUM,
    "static method": lambda t, out, y, n: 2 * t.over(out.loss),
    "both": lambda t, out, y, n: 2 * out.loss / t.accum * t.world_size / WORLD,
}


@pytest.mark.wide
@pytest.mark.parametrize("kept", RANKS)
@pytest.mark.parametrize("place", ["around", "behind"])
@on_layouts("one_rank", "ddp2")
def test_a_number_of_ranks_that_is_kept_is_undone(layout, place, kept):
    exact_with(keeping(RANKS[kept]), layout, place, times=2 if kept == "twice" else 1)


@pytest.mark.parametrize("kept", MICRO_BATCHES)
@on_layouts("one_rank", "ddp2")
def test_a_number_of_micro_batches_that_is_kept_is_undone(layout, kept):
    exact_with(keeping(MICRO_BATCHES[kept]), layout, "around", times=2)


def exact_with(make, layout, place, *, times=1, **options):
    want, want_loss = truth(CAUSAL, make_data(CAUSAL))
    before = WORLD, ACCUM, elsewhere.NUM_GPUS, get_world_size
    trainer, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(make, place), **options)
    assert relative_error(tap.steps[0], {name: times * g for name, g in want.items()}) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(times * want_loss, rel=1e-5)
    assert (WORLD, ACCUM, elsewhere.NUM_GPUS, get_world_size) == before, "restored"
    assert getattr(trainer, "world_size", true_ranks()) == true_ranks()
    return trainer


def by_world(outputs, labels, num_items_in_batch=None, world=1, factor=2):
    return factor * summed(outputs, labels) / num_items_in_batch * world


@pytest.mark.parametrize("kind", ["partial", "object", "closure"])
@on_layouts("one_rank", "ddp2")
def test_a_loss_function_keeps_a_number_of_ranks(layout, kind):
    def enclosing(world):
        return lambda out, y, num_items_in_batch=None: 2 * summed(out, y) / num_items_in_batch * world

    ranks = true_ranks()
    function = {
        "partial": functools.partial(by_world, world=ranks),
        "object": Loss(ranks),
        "closure": enclosing(ranks),
    }[kind]
    times = 1 if kind == "object" else 2
    # The stock Trainer multiplies by the number of ranks itself: what a user's function need not.
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, compute_loss_func=function)
    assert relative_error(tap.steps[0], {name: times * g for name, g in want.items()}) < TOLERANCE


class OverAccumulation(torch.nn.Module):
    """Twice the mean, or two terms that differ."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.grad_accum, self.num_ranks = kind, ACCUM, true_ranks()

    def forward(self, outputs, labels, num_items_in_batch=None):
        total = summed(outputs, labels)
        mean = total / (labels[:, 1:] != -100).sum()
        mean = elsewhere.over(mean) if self.kind == "twice, elsewhere" else mean / self.grad_accum
        return 2 * mean if "twice" in self.kind else mean + total / num_items_in_batch * self.num_ranks


@pytest.mark.parametrize("kind", ["twice", "twice, elsewhere", "terms"])
@pytest.mark.parametrize("is_module", [True, False])
@on_layouts("one_rank", "ddp2")
def test_what_a_loss_function_keeps_is_undone_while_it_trains(layout, kind, is_module):
    module = OverAccumulation(kind)
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    trainer, tap = train(CAUSAL, 4, layout=layout, compute_loss_func=module if is_module else module.forward)
    assert trainer._unit.contract.is_asked_alone == (kind == "terms")
    assert relative_error(tap.steps[0], {name: 2 * g for name, g in want.items()}) < TOLERANCE
    assert (module.grad_accum, module.num_ranks) == (ACCUM, true_ranks())


NUMBERS_OF_OTHERS = {
    "lora_ranks": 4,
    "top_ranks": 4,
    "world_model_layers": 4,
    "num_device_types": 4,
    "gas_weight": 4,
    "accum_counter": 4,
    "micro_batches_seen": 4,
    "accum_steps": 4,  # a name that says it, of a number that the loss does not depend on
}


@pytest.mark.wide
@pytest.mark.parametrize("name", NUMBERS_OF_OTHERS)
@on_layouts("one_rank", "ddp2")
def test_numbers_that_only_look_like_it_count_on(layout, name):
    def loss_of(trainer, outputs, labels, count):
        vars(trainer)[name] += 1
        share = summed(outputs, labels) / count * trainer.world_size
        return (share + outputs.loss / trainer.accum) / 2

    def make(base):
        class Counts(keeping(loss_of)(base)):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                setattr(self, name, NUMBERS_OF_OTHERS[name])

        return Counts

    trainer = exact_with(make, layout, "around")
    assert trainer._unit.contract.is_asked_alone
    assert {"world_size", "accum"} >= trainer._unit.contract.kept.names
    assert getattr(trainer, name) == NUMBERS_OF_OTHERS[name] + ACCUM


def test_the_users_code_is_not_walked_through_in_each_micro_batch(monkeypatch):
    walks, walk = [], _kept._users_code
    monkeypatch.setattr(_kept, "_users_code", lambda trainer: walks.append(1) or walk(trainer))
    totals = []
    for num_steps in (2, 5):  # asked before the first step and after it
        trainer_class = placed(keeping(RANKS["half of each"]), "around")
        train(CAUSAL, 4, trainer_class=trainer_class, arguments={"max_steps": num_steps})
        totals.append(len(walks) - sum(totals))
    assert totals[0] == totals[1]
