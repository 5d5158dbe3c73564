"""What user code does besides: types of batches, hooks, random numbers, traces; and losses that train nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, check_invariance
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance import CheckBeforeTraining
from hf_gradutils.invariance._trainer_subject import TrainerSubject
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train
from tests.invariance import planted
from tests.invariance.checks import HEAD, LAYOUT, PARTS, of, report_of

UNCHECKED = GradUtilsPlugin(check_loss_unit=False)


def _of_kind(trainer_class):
    return {"grad_plugin": UNCHECKED} if issubclass(trainer_class, GradUtilsTrainer) else {}


def _passes(report):
    assert all(row.not_compared == "" for row in report.comparisons), str(report)
    return report.passed


# ---- Types of batches ----


@pytest.mark.parametrize("collate", [planted.as_tuple, planted.as_encoding, planted.as_object])
def test_batches_of_any_type_are_checked(collate):
    right = report_of(of(planted.UnpacksBatches, Trainer), data_collator=collate)
    assert _passes(right), str(right)
    assert right.comparisons[LAYOUT].gradient_error < 2e-6


@on_layouts("ddp2")
def test_a_batch_that_one_process_cannot_run_is_not_compared_with_it(layout):
    report = report_of(of(planted.FewRows, Trainer), layout=layout)
    assert report.verdict == "NOT COMPARED", "nothing has compared the ranks"
    ours = report_of(of(planted.FewRows, GradUtilsTrainer), layout=layout)
    assert ours.passed
    assert "but for" in ours.answer
    assert "this layout against one process, which is not compared" in ours.answer
    assert "RuntimeError: more than 4 rows" in report.comparisons[LAYOUT].not_compared


def test_an_optimizer_that_steps_inside_backward_is_refused():
    for optim in ("adalomo", "galore_adamw_layerwise"):
        trainer = SimpleNamespace(args=SimpleNamespace(optim=optim))
        with pytest.raises(InvalidArgumentError, match=f"optim={optim} steps inside backward"):
            TrainerSubject(trainer)


# ---- Nothing is trained ----


@pytest.mark.parametrize("base", [Trainer, GradUtilsTrainer])
def test_two_sides_that_do_not_train_fail(base):
    cases = [
        (of(planted.Detached, base), {}),
        (of(planted.DetachedInside, base), {}),
        (base, {"data": [row | {"labels": torch.full_like(row["labels"], -100)} for row in make_data(HEAD)]}),
        (base, {"model": planted.only_unused(make_model(HEAD))}),
        (base, {"model": make_model(HEAD).requires_grad_(False)}),
    ]
    for kind, options in cases:
        report = report_of(kind, **_of_kind(base) | options)
        assert not report.passed
        assert str(report).endswith("FAILED")
        assert "nothing is trained" in str(report), str(report)


# ---- Random numbers ----


@pytest.mark.parametrize("base", [Trainer, GradUtilsTrainer])
def test_a_loss_that_differs_between_equal_calls_is_not_compared(base):
    for kind in (planted.RandomTimesteps, planted.WarmsUp):
        report = report_of(of(kind, base), **_of_kind(base))
        assert not report.passed
        assert not any(row.problem for row in report.comparisons), str(report)
        assert "differs between two equal runs" in report.comparisons[PARTS].not_compared
        assert math.isnan(report.comparisons[PARTS].gradient_error)
        assert str(report).endswith("NOT COMPARED")


@pytest.mark.parametrize("base", [Trainer, GradUtilsTrainer])
def test_equal_seeds_make_a_random_weight_comparable(base):
    report = report_of(of(planted.RandomWeight, base), **_of_kind(base))
    assert _passes(report), str(report)


# ---- Hooks ----


class _Halves:
    seen = 0

    def __call__(self, gradient):
        self.seen += 1
        return gradient / 2


@pytest.mark.parametrize("base", [Trainer, GradUtilsTrainer])
def test_hooks_belong_to_the_training(base):
    model = make_model(HEAD)
    model.lm_head.weight.register_hook(_Halves())
    report = report_of(base, model=model)
    assert _passes(report), str(report)

    def clip(parameter):
        nn.utils.clip_grad_norm_(parameter, 1e-3)

    model = make_model(HEAD)
    weights = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(clip)
    assert not report_of(base, model=model).passed

    def step(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad)
        parameter.grad = None

    model = make_model(HEAD)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    report = report_of(base, model=model)
    assert not report.passed
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


# ---- Traces ----


@pytest.mark.parametrize("base", [Trainer, GradUtilsTrainer])
def test_a_check_leaves_no_trace_of_user_code(base):
    traces = []

    class Looks(of(planted.LeavesTraces, base)):
        def train(self, *args, **kwargs):
            if not traces:
                traces.append(self.traces())
                assert check_invariance(self, num_samples=8).passed
                traces.append(self.traces())
                return None
            return super().train(*args, **kwargs)

    train(HEAD, 4, trainer_class=Looks, **_of_kind(base))
    assert traces[0] == traces[1]


class _Listens(TrainerCallback):
    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


@pytest.mark.parametrize("base", [Trainer, GradUtilsTrainer])
def test_a_check_inside_training_leaves_no_trace_either(base):
    histories = []

    def run(checks):
        listener = _Listens()

        class Made(of(planted.LeavesTraces, base)):
            def __init__(self, *args, callbacks, **kwargs):
                super().__init__(*args, callbacks=[*callbacks, listener], **kwargs)
                if checks:
                    self.add_callback(CheckBeforeTraining(self))

        trainer, tap = train(HEAD, 4, trainer_class=Made, **_of_kind(base))
        histories.append((trainer.traces()[:5], [list(e) for e in listener.entries], tap.steps[0]))

    run(checks=False)
    run(checks=True)
    assert histories[0][:2] == histories[1][:2]
    for name, gradient in histories[0][2].items():
        assert torch.equal(gradient, histories[1][2][name])
