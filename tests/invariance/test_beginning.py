"""Callbacks of the user's begin the training of a check too, and nothing of that is left afterwards."""

import copy

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from hf_gradutils import GradUtilsTrainer, check_invariance
from hf_gradutils.errors import InvarianceError
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_model, train
from tests.invariance import planted
from tests.invariance.checks import HEAD, of, report_of
from tests.trainer.test_exact import _trainer


def calling(callback, base=Trainer):
    """A Trainer with one more callback."""

    class Made(base):
        def __init__(self, *args, callbacks=(), **kwargs):
            super().__init__(*args, callbacks=[*callbacks, callback], **kwargs)

    return Made


class Unfreezes(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(True)


class Counts(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.num_steps = 0

    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a check takes no step")


class Accumulates(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = 4
        return control


class Raises(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if not dist.is_initialized() or dist.get_rank() == 1:
            raise KeyError("no run")


@on_layouts("one_rank", "ddp2")
def test_what_a_callback_sets_up_is_there_in_the_check(layout):
    for base in (Trainer, GradUtilsTrainer):
        frozen = make_model(HEAD).requires_grad_(False)
        frozen.lm_head.weight.requires_grad = True
        report = report_of(calling(Unfreezes(), base), layout=layout, model=frozen)
        assert report.verdict == ("passed" if layout == "one_rank" else "FAILED")  # DDP leaves out what was frozen
        assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["lm_head.weight"]

        counts = Counts()

        class CountsSteps(base):
            def training_step(self, *args, **kwargs):
                counts.num_steps += 1  # noqa: B023
                return super().training_step(*args, **kwargs)

        report = report_of(calling(counts, CountsSteps), layout=layout)
        assert report.passed, str(report)
        assert not vars(counts)


def test_an_accumulation_that_a_callback_sets_is_checked():
    once = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    assert report_of(of(planted.OwnMean, Trainer), arguments=once).passed  # control: nothing is split
    report = report_of(calling(Accumulates(), of(planted.OwnMean, Trainer)), arguments=once)
    assert report.num_micro_batches == 4
    assert report.verdict == "FAILED"


@on_layouts("one_rank", "ddp2")
def test_an_error_of_a_callback_is_one_of_the_check_on_all_ranks(layout):
    with pytest.raises(InvarianceError, match=r"on_train_begin of Raises, .*has raised KeyError: 'no run'"):
        report_of(calling(Raises()), layout=layout)
    assert report_of(Trainer, layout=layout).passed  # control: the ranks are still in step


class ChangesAll(TrainerCallback):
    """Changes what it can reach."""

    def __init__(self):
        self.calls, self.handles = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.calls.append("begin")
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        model.lm_head.weight.requires_grad = False
        model.model.count = 3
        args.logging_steps = 7
        state.max_steps = 5
        control.should_training_stop = True
        self.handles.append(model.register_forward_pre_hook(lambda *_: None))
        self.begun = True


def test_a_callback_leaves_no_trace():
    callback, seen = ChangesAll(), []

    class Looks(calling(callback)):
        def traces(self):
            inside = {name: value for name, value in vars(self.model.model).items() if name == "count"}
            hooks = [len(module._forward_pre_hooks) for module in self.model.modules()]
            weights = [p.detach().clone() for p in self.model.parameters()]
            plain = (inside, hooks, [p.requires_grad for p in self.model.parameters()], self.args.logging_steps)
            return copy.deepcopy((plain, vars(self.state), vars(self.control), vars(callback))), weights

        def train(self, *args, **kwargs):
            if seen:
                return super().train(*args, **kwargs)
            seen.append(self.traces())
            assert check_invariance(self, num_samples=8).passed
            seen.append(self.traces())
            return None

    train(HEAD, 4, layout="one_rank", trainer_class=Looks)
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


class Tracks(TensorBoardCallback):
    def __init__(self):  # without what it is made of
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        raise AssertionError("a check opens no run")


def test_trackers_do_not_begin():
    assert report_of(calling(Tracks())).passed


class Doubles(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.norms = [p.detach().norm().item() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)


class Halves(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 0.5)
            parameter.register_post_accumulate_grad_hook(lambda p: None)
        for group in optimizer.param_groups:
            group["weight_decay"] += 0.1


def test_hooks_on_parameters_and_settings_of_an_optimizer_are_put_back(tmp_path):
    trainer = _trainer(calling(Halves()), tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, weight_decay=0.01)
    before = [dict(group, params=None) for group in trainer.optimizer.param_groups]
    check_invariance(trainer)
    for parameter in trainer.model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
    assert [dict(group, params=None) for group in trainer.optimizer.param_groups] == before


def test_noise_of_embeddings_ends_with_the_check(tmp_path):
    trainer = _trainer(Trainer, tmp_path)
    trainer.neftune_noise_alpha = 5.0
    check_invariance(trainer)
    assert not any(module._forward_hooks for module in trainer.model.modules())


class Draws:
    """A collator with a generator of its own."""

    def __init__(self, collate):
        self.collate, self.generator, self.calls = collate, torch.Generator().manual_seed(3), 0

    def __call__(self, rows):
        torch.rand(3, generator=self.generator)
        self.calls += 1
        return self.collate(rows)


def test_a_collator_and_its_generator_are_as_before(tmp_path):
    trainer = _trainer(Trainer, tmp_path)
    trainer.data_collator = Draws(trainer.data_collator)
    state = trainer.data_collator.generator.get_state()
    check_invariance(trainer)
    assert trainer.data_collator.calls == 0
    assert torch.equal(trainer.data_collator.generator.get_state(), state)


@on_layouts("ddp2")
def test_a_callback_of_one_rank_alone_does_not_hang(layout):
    base = calling(Counts()) if dist.get_rank() == 0 else Trainer
    assert report_of(base, layout=layout).verdict in ("passed", "FAILED")


@on_layouts("fsdp2x2")
def test_weights_of_a_sharded_model_are_put_back(layout):
    doubles, norms = Doubles(), []

    class Begins(calling(doubles)):
        def train(self, *args, **kwargs):
            if norms:
                return super().train(*args, **kwargs)
            norms.append([])
            report = check_invariance(self, num_samples=8)
            norms.append([p.detach().full_tensor().norm().item() for p in self.model.parameters()])
            norms.append(report)
            return None

    train(HEAD, 4, layout=layout, trainer_class=Begins)
    assert norms[2].passed, str(norms[2])
    doubles.on_train_begin(None, None, None, model=make_model(HEAD))
    assert norms[1] == pytest.approx(doubles.norms)
