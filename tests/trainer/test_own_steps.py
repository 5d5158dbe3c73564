"""A user's own training_step, get_batch_samples, hooks, optimizers and batches around a Trainer."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS, collate
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth, warnings_of
from tests.trainer.test_overrides import (
    CAUSAL,
    LOSSES,
    ON_LAYOUTS_AND_PLACES,
    PLACES,
    TOLERANCE,
    own_loss,
    placed,
    summed,
)

LAYOUTS = ["one_rank", "ddp2", "fsdp2x2"]
HEADS_OF_BOTH_KINDS = pytest.mark.parametrize("head", [CAUSAL, "bert tokens"])  # with and without loss arguments


# ---- Several losses in a micro-batch ----


def two_steps(base):
    """As adversarial training does: the same batch, twice."""

    class TwoSteps(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, inputs, num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    return TwoSteps


def a_copy_for_each_step(base):
    class Copies(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, dict(inputs), num_items_in_batch)
            return super().training_step(model, dict(inputs), num_items_in_batch)

    return Copies


def two_backwards(base):
    class TwoBackwards(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            for _ in range(2):
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
            return loss.detach()

    return TwoBackwards


def step_and_backward(base):
    class StepAndBackward(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            again = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(again)
            return loss

    return StepAndBackward


TWICE = {f.__name__: f for f in (two_steps, a_copy_for_each_step, two_backwards, step_and_backward)}


@pytest.mark.wide
@ON_LAYOUTS_AND_PLACES
@on_layouts()
@HEADS_OF_BOTH_KINDS
@pytest.mark.parametrize("user", TWICE)
def test_losses_of_one_micro_batch_add_up(layout, place, head, user):
    want, want_loss = truth(head, make_data(head))
    trainer, tap = train(head, 4, layout=layout, trainer_class=placed(TWICE[user], place))
    assert relative_error(tap.steps[0], {name: 2 * g for name, g in want.items()}) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5), "what the step returns"
    assert trainer.state.log_history[0]["num_targets"] == HEADS[head].targets(collate(make_data(head)))


def in_parts(base):
    """Each part is divided by the count of the whole window, as transformers does for models that take it."""

    class Parts(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            parts = [{k: v[rows] for k, v in inputs.items()} for rows in (slice(1), slice(1, None))]
            return sum(super(Parts, self).training_step(model, part, num_items_in_batch) for part in parts)

    return Parts


def halves_of_mean(base):
    class Halves(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            parts = [{k: v[rows] for k, v in inputs.items()} for rows in (slice(1), slice(1, None))]
            return sum(
                super(Halves, self).compute_loss(model, part, num_items_in_batch=num_items_in_batch)
                for part in parts
                if len(part["labels"])
            )

    return Halves


@ON_LAYOUTS_AND_PLACES
@on_layouts()
@pytest.mark.parametrize("user", [0, 1])
def test_parts_of_a_micro_batch_count_by_their_targets(layout, place, user):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed((in_parts, halves_of_mean)[user], place))
    assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Steps without a weighted loss ----


def plain_backward(base):
    class Plain(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            loss.backward()
            return loss.detach()

    return Plain


def plain_backward_of_the_model(base):
    class Plain(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            (loss / self.args.gradient_accumulation_steps).backward()
            return loss.detach()

    return Plain


@pytest.mark.parametrize("user", [0, 1])
@pytest.mark.parametrize(("layout", "place", "clips"), [("one_rank", "around", 1.0), ("ddp2", "behind", 0.0)])
@on_layouts()
def test_a_plain_backward_stops_before_the_first_step(layout, place, clips, user):
    make = (plain_backward, plain_backward_of_the_model)[user]
    model = make_model(CAUSAL)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TargetCountError, match=r"accelerator\.backward"):
        train(
            CAUSAL,
            2,
            layout=layout,
            model=model,
            trainer_class=placed(make, place),
            arguments={"max_grad_norm": clips},
        )
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# ---- Steps that divide by the number of micro-batches ----


def divides(base):
    class Divides(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            if self.args.gradient_accumulation_steps > 1:
                loss = loss / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    return Divides


def divides_by_its_own_number(base):
    class Divides(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss * 0.25)
            return loss.detach()

    return Divides


def divides_by_what_the_trainer_says(base):
    class Divides(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            return loss.detach()

    return Divides


def does_not_divide(base):
    class Plain(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    return Plain


DIVIDES = {
    f.__name__: f for f in (divides, divides_by_its_own_number, divides_by_what_the_trainer_says, does_not_divide)
}


@pytest.mark.wide
@ON_LAYOUTS_AND_PLACES
@on_layouts()
@HEADS_OF_BOTH_KINDS
@pytest.mark.parametrize("user", DIVIDES)
def test_a_step_that_divides_by_the_accumulation_is_exact(layout, place, head, user):
    want, want_loss = truth(head, make_data(head))
    trainer, tap = train(head, 4, layout=layout, trainer_class=placed(DIVIDES[user], place))
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


def divides_a_loss_of_its_own(base):
    class Divides(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            loss = cross_entropy_of(model(**inputs), inputs["labels"]) / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    return Divides


def cross_entropy_of(outputs, labels):
    return summed(outputs, labels) / (labels[:, 1:] != -100).sum() + 0.5


@PLACES
def test_a_step_that_computes_and_divides_its_own_loss_stops(place):
    with pytest.raises(InvalidArgumentError, match="current_gradient_accumulation_steps"):
        train(CAUSAL, 4, trainer_class=placed(divides_a_loss_of_its_own, place))


def asks_the_model(divided, *, wrapped=True):
    """A step without ``compute_loss``, around the model's own loss."""

    def make(base):
        class Asks(base):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.accum = self.args.gradient_accumulation_steps

            def training_step(self, model, inputs, num_items_in_batch=None):
                model.train()
                loss = divided(self, (model if wrapped else self.model)(**inputs).loss)
                self.accelerator.backward(loss)
                return loss.detach()

        return Asks

    return make


ASKS = {
    "literal": asks_the_model(lambda t, loss: loss / 4),
    "inverse": asks_the_model(lambda t, loss: loss * 0.25),
    "kept": asks_the_model(lambda t, loss: loss / t.accum),
    "argument": asks_the_model(lambda t, loss: loss / t.args.gradient_accumulation_steps),
    "what the trainer says": asks_the_model(lambda t, loss: loss / t.current_gradient_accumulation_steps),
    "not": asks_the_model(lambda t, loss: loss),
    "literal, without its wrapper": asks_the_model(lambda t, loss: loss / 4, wrapped=False),
}


@pytest.mark.wide
@pytest.mark.parametrize(
    ("layout", "user"),
    [(layout, user) for layout in LAYOUTS for user in ASKS if "wrapper" not in user or layout != "ddp2"],
)
@on_layouts()
@HEADS_OF_BOTH_KINDS
def test_a_step_that_divides_the_models_loss_is_exact(layout, head, user):
    want, want_loss = truth(head, make_data(head))
    with warnings_of("hf_gradutils.trainer") as said:
        trainer, tap = train(head, 4, layout=layout, trainer_class=placed(ASKS[user], "around"))
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert not any("nothing tells" in message for message in said)


def hands_the_model_a_count(times, own=False):
    """As with transformers: the model divides by the count of the whole window."""

    def make(base):
        class Hands(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                inputs = self._prepare_inputs(inputs)
                count = (inputs["labels"][:, 1:] != -100).sum() if own else num_items_in_batch
                loss = model(**inputs, num_items_in_batch=count).loss * times(self)
                self.accelerator.backward(loss)
                return loss.detach()

        return Hands

    return make


COUNTED = {
    "as it is": hands_the_model_a_count(lambda t: 1),
    "times ranks": hands_the_model_a_count(lambda t: t.accelerator.num_processes),
    "its own count": hands_the_model_a_count(lambda t: 1, own=True),
}


@pytest.mark.wide
@pytest.mark.parametrize("user", COUNTED)
@pytest.mark.parametrize("counts", ["auto", "streamed"])
@pytest.mark.parametrize("accumulation", [1, 4])
@on_layouts(*LAYOUTS)
def test_a_step_that_hands_the_model_a_count_is_exact(layout, user, counts, accumulation):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    trainer_class = placed(COUNTED[user], "around")
    plugin = GradUtilsPlugin(counts=counts)
    _, tap = train(CAUSAL, accumulation, layout=layout, trainer_class=trainer_class, grad_plugin=plugin)
    assert relative_error(tap.steps[0], want) < TOLERANCE


def own_criterion(divided, *, with_loss=False):
    """A step of a loss that no one else computes."""

    def make(base):
        class Own(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                inputs = self._prepare_inputs(inputs)
                outputs = model(**inputs) if with_loss else model(input_ids=inputs["input_ids"])
                loss = divided(self, cross_entropy_of(outputs, inputs["labels"]))
                self.accelerator.backward(loss)
                return loss.detach()

        return Own

    return make


def says_what_it_divides_by(base):
    class Says(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            loss = cross_entropy_of(model(**inputs), inputs["labels"])
            self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            return loss.detach()

    return Says


CRITERIA = {
    "literal": (own_criterion(lambda t, loss: loss / 4), True),
    "literal beside the model's": (own_criterion(lambda t, loss: loss / 4, with_loss=True), True),
    "not": (own_criterion(lambda t, loss: loss), True),
    "what the trainer says": (says_what_it_divides_by, False),
}


@pytest.mark.wide
@pytest.mark.parametrize("user", CRITERIA)
@pytest.mark.parametrize("accumulation", [1, 4])
@on_layouts("one_rank", "ddp2")
def test_a_step_that_nothing_can_tell_warns_once(layout, accumulation, user):
    make, warns = CRITERIA[user]
    with warnings_of("hf_gradutils.trainer") as said:
        trainer, tap = train(
            CAUSAL, accumulation, layout=layout, trainer_class=placed(make, "around"), arguments={"max_steps": 2}
        )
    said = [message for message in said if "nothing tells if training_step divides" in message]
    assert len(said) == (1 if warns and accumulation > 1 and trainer.is_world_process_zero() else 0)
    if not warns or user == "not":
        assert relative_error(tap.steps[0], truth(CAUSAL, make_data(CAUSAL))[0]) < TOLERANCE


# ---- Steps that clip ----


class Lines(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def clips(base):
    class Clips(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.norms = [*getattr(self, "norms", []), self.accelerator.clip_grad_norm_(model.parameters(), 0.5)]
            return loss

    return Clips


@pytest.mark.wide
@pytest.mark.parametrize("max_norm", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["list", "stream", "longer", "uneven"])
@on_layouts("one_rank", "ddp2")
def test_a_step_that_clips_itself_is_exact_on_any_data(layout, kind, max_norm):
    num_ranks = 1 if layout == "one_rank" else 2
    data, options = make_data(CAUSAL), {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": max_norm}
    rows = {"list": data, "stream": Lines(data), "longer": Lines(data[:16]), "uneven": Lines(data[:14])}[kind]
    if kind in ("longer", "uneven"):  # epochs of less than three windows; the last one is filled up, or short
        options |= {"max_steps": 5, "per_device_train_batch_size": 2 // num_ranks * 2}
    trainer, tap = train(CAUSAL, 2, layout=layout, trainer_class=placed(clips, "around"), data=rows, arguments=options)
    norms = [float(norm) for norm in trainer.norms]
    assert len(norms) == options["max_steps"]
    want, _ = truth(CAUSAL, data if kind in ("list", "stream") else data[: 2 * 4])
    norm = float(sum(g.square().sum() for g in want.values()) ** 0.5)
    assert norms[0] == pytest.approx(norm, rel=1e-5)
    scale = (max_norm or 0.5) / norm
    assert scale < 1
    assert relative_error(tap.steps[0], {name: scale * g for name, g in want.items()}) < 1e-4


@on_layouts("ddp2")
def test_a_step_that_clips_needs_one_reduction_as_ever(layout):
    numbers, reduce = [], torch.distributed.all_reduce
    for user in (leaves_clipping, clips):
        calls = []
        torch.distributed.all_reduce = lambda *args, calls=calls, **kwargs: calls.append(1) or reduce(*args, **kwargs)
        try:
            trainer_class = placed(user, "around")
            train(CAUSAL, 2, layout=layout, trainer_class=trainer_class, data=Lines(make_data(CAUSAL)), taps=False)
        finally:
            torch.distributed.all_reduce = reduce
        numbers.append(len(calls))
    assert numbers[0] == numbers[1]


def leaves_clipping(base):
    """Control: a step that leaves clipping to the Trainer."""

    class Leaves(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    return Leaves


# ---- Forwards that are not trained ----


def looks_besides(look):
    """A step that looks at another loss between the one that it trains and its backward."""

    def make(base):
        def loss_of(trainer, outputs, labels, count):
            return outputs.loss if count is None else LOSSES["sum / count × processes"](trainer, outputs, labels, count)

        class Looks(own_loss(loss_of)(base)):
            def training_step(self, model, inputs, num_items_in_batch=None):
                model.train()
                inputs = self._prepare_inputs(inputs)
                if look == "before, with another count":
                    self.model(**inputs, num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum())
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                with torch.set_grad_enabled(look == "with a graph"):
                    if look == "compute_loss":
                        self.compute_loss(self.model, inputs)
                    elif "before" not in look:
                        self.model(**inputs)
                self.accelerator.backward(loss)
                return loss.detach()

        return Looks

    return make


@pytest.mark.parametrize("look", ["model", "with a graph", "compute_loss", "before, with another count"])
@on_layouts("one_rank", "ddp2")
def test_a_loss_that_is_looked_at_does_not_weight_the_one_that_is_trained(layout, look):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(looks_besides(look), "around"))
    assert relative_error(tap.steps[0], want) < TOLERANCE


def test_no_batch_of_the_last_window_stays_on_the_device():
    seen = []

    def make(base):
        class Sees(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                seen.append(weakref.ref(inputs["labels"]))
                return super().training_step(model, inputs, num_items_in_batch)

        return Sees

    trainer, _ = train(CAUSAL, 4, trainer_class=placed(make, "around"))
    gc.collect()
    assert [ref() is None for ref in seen[:3]] == [True] * 3
    assert trainer.state.global_step == 1


# ---- get_batch_samples ----


def looks(base):
    class Looks(base):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.seen = [len(batches), len(list(batches)), batches[0]["labels"].shape[0], type(batches), count]
            return batches, count

    return Looks


def makes_a_new_list(base):
    class New(base):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            return [dict(batch) for batch in batches], count

    return New


def draws_itself(base):
    class Draws(base):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)], None

    return Draws


BATCHES = {f.__name__: f for f in (looks, makes_a_new_list, draws_itself)}


@pytest.mark.wide
@ON_LAYOUTS_AND_PLACES
@on_layouts()
@HEADS_OF_BOTH_KINDS
@pytest.mark.parametrize("user", BATCHES)
def test_get_batch_samples_gives_a_list_and_a_count(layout, place, head, user):
    want, _ = truth(head, make_data(head))
    trainer, tap = train(head, 4, layout=layout, trainer_class=placed(BATCHES[user], place))
    assert relative_error(tap.steps[0], want) < TOLERANCE
    if user == "looks":
        rows = len(make_data(head)) // 4 // (1 if layout == "one_rank" else 2)
        assert trainer.seen[:4] == [4, 4, rows, list]
        count = trainer.seen[4]
        targets = HEADS[head].targets(collate(make_data(head)))
        assert (count.dtype, count.dim(), count.item()) == (torch.float32, 0, targets)


def counts_itself(base):
    class Counts(base):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            return batches, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    return Counts


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("loss", ["sum / count", "sum / count × processes", "mean"])
def test_a_count_of_the_users_own_is_taken_as_it_is_or_refused(layout, loss):
    def make(base):
        return own_loss(LOSSES[loss])(counts_itself(base))

    want, _ = truth(CAUSAL, make_data(CAUSAL))
    if layout == "ddp2" and loss == "sum / count":
        with pytest.raises(InvalidArgumentError, match="a count of its own"):
            train(CAUSAL, 4, layout=layout, trainer_class=placed(make, "around"))
        return
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(make, "around"))
    if layout == "one_rank" or loss == "mean":
        assert relative_error(tap.steps[0], want) < TOLERANCE


def test_a_patch_of_transformers_is_taken_for_the_users(monkeypatch):
    original = Trainer.training_step

    def patched(self, model, inputs, num_items_in_batch=None):
        original(self, model, inputs, num_items_in_batch)
        return original(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(Trainer, "training_step", patched)
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4)
    assert relative_error(tap.steps[0], {name: 2 * g for name, g in want.items()}) < TOLERANCE


# ---- Gradients that are read in the backward ----


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["post accumulate", "tensor", "module"])
def test_hooks_see_the_true_gradients(layout, accumulation, kind):
    model, seen = make_model(CAUSAL), {}
    parameter = model.lm_head.weight

    def see_accumulated(p):
        seen["gradient"] = p.grad.detach().clone()

    def see(*args):
        gradient = args[-1][0] if isinstance(args[-1], tuple) else args[-1]
        seen["gradient"] = seen.get("gradient", 0) + gradient.detach().clone()

    if kind == "post accumulate":
        parameter.register_post_accumulate_grad_hook(see_accumulated)
    elif kind == "tensor":
        parameter.register_hook(see)
    else:
        model.lm_head.register_full_backward_hook(lambda module, before, after: see(after))
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, accumulation, layout=layout, model=model)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    if kind == "module":
        assert seen["gradient"].abs().sum() > 0
        return
    got = seen["gradient"].double()
    if layout == "ddp2":  # before DDP averages
        torch.distributed.all_reduce(got)
        got /= 2
    assert relative_error({"w": got}, {"w": want["lm_head.weight"]}) < TOLERANCE


class HooksOnOneRank(TrainerCallback):
    """As wandb.watch does."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            model.lm_head.weight.register_hook(lambda gradient: None)


@on_layouts("ddp2")
def test_a_hook_on_one_rank_begins_windows_alike_on_all(layout):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, layout=layout, callback=HooksOnOneRank())
    assert relative_error(tap.steps[0], want) < TOLERANCE


def test_hooks_are_refused_with_streamed_counts():
    model = make_model(CAUSAL)
    model.lm_head.weight.register_hook(lambda gradient: None)
    with pytest.raises(InvalidArgumentError, match="counts='auto'"):
        train(CAUSAL, 2, model=model, grad_plugin=GradUtilsPlugin(counts="streamed"))


class LayerWise(torch.optim.Optimizer):
    """Steps each parameter as soon as its gradient is there, as GaLore's and APOLLO's layer-wise optimizers do."""

    def __init__(self, parameters, lr):
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._step)

    def _step(self, p):
        with torch.no_grad():
            p -= self.param_groups[0]["lr"] * p.grad
        p.grad = None

    def step(self, closure=None):
        pass


def test_a_layer_wise_optimizer_steps_on_the_true_gradient():
    model, lr = make_model(CAUSAL), 0.1
    before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    optimizer = LayerWise(model.parameters(), lr)
    train(CAUSAL, 1, model=model, optimizers=(optimizer, None), arguments={"max_grad_norm": 1.0}, taps=False)
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    got = {name: (before[name] - p.detach().double()) / lr for name, p in model.named_parameters()}
    assert relative_error(got, want) < 1e-4


def test_a_step_in_the_middle_of_a_window_is_refused():
    model = make_model(CAUSAL)
    optimizer = LayerWise(model.parameters(), 0.1)
    with pytest.raises(InvalidArgumentError, match="gradient_accumulation_steps=1"):
        train(CAUSAL, 2, model=model, optimizers=(optimizer, None), taps=False)


# ---- Counts first for any Trainer ----


@on_layouts()
@pytest.mark.parametrize(
    ("layout", "head"),
    [("tp2", CAUSAL), *((layout, head) for layout in LAYOUTS for head in (CAUSAL, "bert tokens", "mixtral moe"))],
)
def test_counts_first_are_exact_for_plain_trainers(layout, head):
    want, want_loss = truth(head, make_data(head))
    trainer, tap = train(head, 4, layout=layout, grad_plugin=GradUtilsPlugin(counts="first"))
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert trainer.state.log_history[0]["num_targets"] == HEADS[head].targets(HEADS[head].collate(make_data(head)))


# ---- The type of the count ----


@pytest.mark.parametrize("counts", ["streamed", "first"])
def test_a_loss_function_gets_the_type_that_transformers_hands_over(counts):
    seen = {}

    def loss_of(outputs, labels, num_items_in_batch=None):
        seen["count"] = num_items_in_batch
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        seen["loss"] = loss
        return loss

    stock = {}
    train(CAUSAL, 2, trainer_class=Trainer, compute_loss_func=loss_of)
    stock.update(seen)
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 2, compute_loss_func=loss_of, grad_plugin=GradUtilsPlugin(counts=counts))
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert (seen["count"].dtype, seen["count"].shape) == (stock["count"].dtype, stock["count"].shape)
    assert seen["loss"].dtype == stock["loss"].dtype == torch.float32
    if counts == "first":
        assert seen["count"].item() == stock["count"].item()


# ---- Labels that the user's code changes ----


def masked(inputs):
    """Without the targets of the first half of each row, but for the last position."""
    labels = inputs["labels"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    return {**inputs, "labels": labels}


def masks_in_its_step(base):
    class Masks(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, masked(inputs), num_items_in_batch)

    return Masks


def masks_in_place(base):
    class Masks(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs["labels"] = masked(inputs)["labels"]
            return super().training_step(model, inputs, num_items_in_batch)

    return Masks


def masks_as_it_prepares(base):
    class Masks(base):
        def _prepare_inputs(self, inputs):
            return masked(super()._prepare_inputs(inputs))

    return Masks


MASKS = {f.__name__: f for f in (masks_in_its_step, masks_in_place, masks_as_it_prepares)}


@pytest.mark.wide
@ON_LAYOUTS_AND_PLACES
@on_layouts()
@pytest.mark.parametrize("user", MASKS)
@pytest.mark.parametrize("counts", ["auto", "first"])
def test_targets_are_those_that_reach_the_loss(layout, place, user, counts):
    data = [masked({k: v[None] for k, v in row.items()}) for row in make_data(CAUSAL)]
    want, want_loss = truth(CAUSAL, [{k: v[0] for k, v in row.items()} for row in data])
    whole, _ = truth(CAUSAL, make_data(CAUSAL))
    assert relative_error(want, whole) > 0.1, "control"
    plugin = GradUtilsPlugin(counts=counts)
    trainer, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(MASKS[user], place), grad_plugin=plugin)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
