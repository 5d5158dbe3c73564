"""What changes in mid-training: the numbers that a loss is divided by, and the number of micro-batches."""

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, train, truth, warnings_of
from tests.trainer.test_overrides import CAUSAL, TOLERANCE, own_loss, placed, summed

STILL = {"learning_rate": 0.0}


def mean(trainer, outputs, labels, count):
    return outputs.loss


def divided(trainer, outputs, labels, count):
    return outputs.loss / trainer.args.gradient_accumulation_steps


def share(trainer, outputs, labels, count):
    return summed(outputs, labels) / count * trainer.accelerator.num_processes


def terms(trainer, outputs, labels, count):
    return (divided(trainer, outputs, labels, count) + share(trainer, outputs, labels, count)) / 2


LOSSES = {f.__name__: f for f in (mean, divided, share, terms)}
CHANGES = [("mean", "divided"), ("divided", "mean"), ("mean", "share"), ("share", "mean"), ("terms", "mean")]


@pytest.mark.parametrize(("first", "then"), CHANGES)
@on_layouts("one_rank", "ddp2")
def test_a_loss_that_is_divided_by_other_numbers_later_is_followed_with_a_warning(layout, first, then):
    def loss_of(trainer, outputs, labels, count):
        name = then if trainer.state.global_step >= 1 else first
        return LOSSES[name](trainer, outputs, labels, count)

    data = make_data(CAUSAL)
    want, _ = truth(CAUSAL, data)
    with warnings_of("hf_gradutils.trainer") as said:
        trainer, tap = train(
            CAUSAL,
            4,
            layout=layout,
            trainer_class=placed(own_loss(loss_of), "around"),
            arguments=STILL | {"max_steps": 3},
        )
    assert [relative_error(step, want) < TOLERANCE for step in tap.steps] == [True] * 3
    said = [message for message in said if "than before" in message]
    assert len(said) == (1 if trainer.is_world_process_zero() else 0)
    assert all(message.startswith("after 1 optimizer steps") for message in said)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_stays_as_it_is_says_nothing(loss, caplog):
    trainer_class = placed(own_loss(LOSSES[loss]), "around")
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, trainer_class=trainer_class, arguments=STILL | {"max_steps": 12})
    assert "than before" not in caplog.text
    assert all(relative_error(step, want) < TOLERANCE for step in tap.steps)


def divides_later(base):
    class Later(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            if self.state.global_step >= 1:
                loss = loss / 4
            self.accelerator.backward(loss)
            return loss.detach()

    return Later


def divides_at_first(base):
    class AtFirst(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = model(**self._prepare_inputs(inputs)).loss
            if self.state.global_step < 1:
                loss = loss * 0.25
            self.accelerator.backward(loss)
            return loss.detach()

    return AtFirst


@pytest.mark.parametrize("user", [0, 1])
@on_layouts("one_rank", "ddp2")
def test_a_step_that_divides_later_is_followed_with_a_warning(layout, user):
    make = (divides_later, divides_at_first)[user]
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    with warnings_of("hf_gradutils.trainer") as said:
        trainer, tap = train(
            CAUSAL, 4, layout=layout, trainer_class=placed(make, "around"), arguments=STILL | {"max_steps": 3}
        )
    assert [relative_error(step, want) < TOLERANCE for step in tap.steps] == [True] * 3
    said = [message for message in said if "than before" in message]
    assert len(said) == (1 if trainer.is_world_process_zero() else 0)


def warms_up(base):
    class WarmsUp(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            auxiliary = loss.detach()  # no gradient, so that the truth is the same
            loss = (loss + self.state.global_step * auxiliary) / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    return WarmsUp


@on_layouts("one_rank", "ddp2")
def test_a_step_that_cannot_tell_later_does_as_before(layout):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    options = STILL | {"max_steps": 3}
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(warms_up, "around"), arguments=options)
    assert [relative_error(step, want) < TOLERANCE for step in tap.steps] == [True] * 3


def adds_on_one_rank(base):
    class Adds(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            if self.accelerator.process_index == self.accelerator.num_processes - 1:
                loss = loss + 3.5 * self.accelerator.process_index
            self.accelerator.backward(loss / 4)
            return loss.detach()

    return Adds


@on_layouts("ddp2")
def test_ranks_agree_on_what_a_step_divides_by(layout):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    options = STILL | {"max_steps": 2}
    _, tap = train(CAUSAL, 4, layout=layout, trainer_class=placed(adds_on_one_rank, "around"), arguments=options)
    assert [relative_error(step, want) < TOLERANCE for step in tap.steps] == [True] * 2


def tells_later(base):
    class TellsLater(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = model(**self._prepare_inputs(inputs)).loss
            loss = loss / 4 if self.state.global_step >= 1 else loss + 0.5
            self.accelerator.backward(loss)
            return loss.detach()

    return TellsLater


def test_a_step_that_tells_later_only_is_followed_with_a_warning(caplog):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 4, trainer_class=placed(tells_later, "around"), arguments=STILL | {"max_steps": 3})
    assert [relative_error(step, want) < TOLERANCE for step in tap.steps] == [True] * 3
    assert caplog.text.count("nothing tells if training_step divides") == 1
    assert caplog.text.count("training_step divides its loss by another number") == 1


def divides_and_clips(base):
    class Clips(warms_up(base)):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(model.parameters(), 1e3)
            return loss

    return Clips


def test_the_loss_of_a_step_that_divides_and_clips_is_logged_undivided():
    _, want = truth(CAUSAL, make_data(CAUSAL))
    trainer, _ = train(CAUSAL, 4, trainer_class=placed(divides_and_clips, "around"))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, rel=1e-5)


def test_a_second_training_asks_a_loss_as_it_is():
    """The contract of the first one, whose terms differ, must not be in force while the second is asked."""
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    trainer, tap = train(CAUSAL, 4, trainer_class=placed(own_loss(terms), "around"), arguments=STILL)
    trainer.train()
    assert trainer._unit.contract.is_asked_alone
    assert [relative_error(step, want) < TOLERANCE for step in tap.steps] == [True] * 2


# ---- Another number of micro-batches ----


class Sets(TrainerCallback):
    """Sets the accumulation at the end of optimizer steps: number of the step → the accumulation from there on."""

    def __init__(self, numbers, event="on_step_end"):
        self.numbers = numbers
        setattr(self, event, self.set)

    def set(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = self.numbers.get(state.global_step, args.gradient_accumulation_steps)


def rows_of_steps(num_rows, accumulations, layout):
    """Which rows each optimizer step is over, of a loader that does not shuffle."""
    starts, rows = 0, []
    for accumulation in accumulations:
        size = accumulation * (1 if layout == "one_rank" else 2)
        rows.append([(starts + i) % num_rows for i in range(size)])
        starts += size
    return rows


class InOrder:
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def plain(base):
    return base


def own_step(base):
    class Own(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    return Own


KINDS = {
    "plain": plain,
    "own step": own_step,
    "own step divides": divides_later,
    **{name: own_loss(LOSSES[name]) for name in ("divided", "share", "terms")},
}
SETS = {
    "less": (4, {1: 2}, [4, 2, 2, 2]),
    "more": (2, {2: 4}, [2, 2, 4, 4]),
    "more, off": (2, {1: 4}, [2, 2, 4]),
    "to one": (4, {1: 1}, [4, 1, 1]),
    "from one": (1, {1: 2}, [1, 1, 2, 2]),
}


@pytest.mark.wide
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own step divides"])
@on_layouts("one_rank", "ddp2")
def test_another_accumulation_is_followed(layout, kind, sets):
    first, numbers, then = SETS[sets]
    data = make_data(CAUSAL, 64)
    trainer_class = type("Ordered", (InOrder, placed(KINDS[kind], "around")), {})
    options = STILL | {"max_steps": len(then), "per_device_train_batch_size": 1}
    _, tap = train(
        CAUSAL, first, layout=layout, trainer_class=trainer_class, data=data, arguments=options, callback=Sets(numbers)
    )
    rows = rows_of_steps(64, then, layout)
    assert len(tap.steps) == len(then)
    for step, own in zip(tap.steps, rows, strict=True):
        want, _ = truth(CAUSAL, [data[i] for i in own])
        assert relative_error(step, want) < TOLERANCE


@on_layouts("one_rank", "ddp2")
def test_the_end_of_an_epoch_is_followed_too(layout):
    num_ranks = 1 if layout == "one_rank" else 2
    data = make_data(CAUSAL, 7 * num_ranks)  # of 7 micro-batches: 4, 2 and 1
    trainer_class = type("Ordered", (InOrder, placed(plain, "around")), {})
    options = STILL | {"max_steps": 2, "per_device_train_batch_size": 1}
    _, tap = train(
        CAUSAL, 4, layout=layout, trainer_class=trainer_class, data=data, arguments=options, callback=Sets({1: 2})
    )
    for step, own in zip(tap.steps, rows_of_steps(len(data), [4, 2], layout), strict=True):
        assert relative_error(step, truth(CAUSAL, [data[i] for i in own])[0]) < TOLERANCE


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_it_is_followed_on_a_stream():
    data = make_data(CAUSAL, 32)
    options = STILL | {"max_steps": 3, "per_device_train_batch_size": 1}
    _, tap = train(CAUSAL, 4, data=Stream(data), arguments=options, callback=Sets({1: 2}))
    for step, own in zip(tap.steps, rows_of_steps(32, [4, 2, 2], "one_rank"), strict=True):
        assert relative_error(step, truth(CAUSAL, [data[i] for i in own])[0]) < TOLERANCE


def test_it_is_followed_after_a_resume(tmp_path):
    data, trainer_class = make_data(CAUSAL, 64), type("Ordered", (InOrder, placed(plain, "around")), {})
    options = STILL | {"per_device_train_batch_size": 1, "output_dir": str(tmp_path)}
    saving = options | {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    train(CAUSAL, 2, data=data, trainer_class=trainer_class, arguments=saving)
    _, tap = train(
        CAUSAL,
        2,
        data=data,
        trainer_class=trainer_class,
        arguments=options | {"max_steps": 6},
        callback=Sets({4: 4}),
        resume=str(tmp_path / "checkpoint-3"),
    )
    rows = rows_of_steps(64, [2, 2, 2, 2, 4, 4], "one_rank")[3:]
    assert len(tap.steps) == 3
    for step, own in zip(tap.steps, rows, strict=True):
        assert relative_error(step, truth(CAUSAL, [data[i] for i in own])[0]) < TOLERANCE


@on_layouts("ddp2")
def test_it_is_followed_where_a_rank_pads(layout):
    rank = torch.distributed.get_rank()
    data = make_data(CAUSAL, 11)
    own = [data[:5], data[5:]][rank]

    class OwnLoader(placed(plain, "around")):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(own, batch_size=1, collate_fn=self.data_collator)

    options = STILL | {"max_steps": 3}
    _, tap = train(
        CAUSAL, 2, layout=layout, trainer_class=OwnLoader, data=data, arguments=options, callback=Sets({1: 4})
    )
    rows = [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9, 10]]
    assert len(tap.steps) == 3
    for step, wanted in zip(tap.steps, rows, strict=True):
        assert relative_error(step, truth(CAUSAL, [data[i] for i in wanted])[0]) < TOLERANCE


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end"])
@pytest.mark.parametrize("numbers", [{0: 4}, {1: 3}])
@on_layouts("one_rank", "ddp2")
def test_a_change_inside_a_window_stops(layout, event, numbers):
    data, options = make_data(CAUSAL, 64), STILL | {"max_steps": 3, "per_device_train_batch_size": 1}
    with pytest.raises(InvalidArgumentError, match="gradient_accumulation_steps was changed"):
        train(CAUSAL, 2, layout=layout, data=data, arguments=options, callback=Sets(numbers, event))


def test_windows_know_of_a_change():
    data, options = make_data(CAUSAL, 64), STILL | {"max_steps": 3, "per_device_train_batch_size": 1}
    trainer, _ = train(CAUSAL, 1, data=data, arguments=options, callback=Sets({1: 2}))
    assert not trainer.accelerator.windows.have_one_micro_batch


def test_the_stock_trainer_follows_a_change_that_fits():
    """Control: the gradient of its second step is that of the two micro-batches that it has drawn."""
    data = make_data(CAUSAL, 64)
    trainer_class = type("Ordered", (InOrder, Trainer), {})
    options = STILL | {"max_steps": 2, "per_device_train_batch_size": 1}
    _, tap = train(CAUSAL, 4, trainer_class=trainer_class, data=data, arguments=options, callback=Sets({1: 2}))
    for step, own in zip(tap.steps, rows_of_steps(64, [4, 2], "one_rank"), strict=True):
        assert relative_error(step, truth(CAUSAL, [data[i] for i in own])[0]) < TOLERANCE


class _EndsTheEpochEarly(TrainerCallback):
    """Ends the first epoch inside a window."""

    has_ended = False

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop, self.has_ended = not self.has_ended, True


@pytest.mark.parametrize("counts", ["first", "streamed"])
def test_an_epoch_that_ends_inside_a_window_goes_on_or_says_that_it_cannot(counts):
    arguments = STILL | {"max_steps": 3, "per_device_train_batch_size": 2}  # two epochs

    def run():
        return train(
            CAUSAL,
            4,
            grad_plugin=GradUtilsPlugin(counts=counts),
            arguments=arguments,
            callback=_EndsTheEpochEarly(),
        )

    if counts == "first":
        with pytest.raises(InvalidArgumentError, match="an epoch ended inside a window"):
            run()
    else:
        assert len(run()[1].steps) == 2
