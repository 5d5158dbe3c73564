"""Planted faults: each is found, and what its advice says, taken literally, repairs it. What is right passes."""

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, GradUtilsTrainerMixin
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, truth
from tests.invariance import planted
from tests.invariance.checks import HEAD, of, report_of, trains_exactly

UNCHECKED = GradUtilsPlugin(check_loss_unit=False)


STOCK, OURS, OURS_IN_FRONT = "stock", "ours", "ours in front"


def _class(kind, mixins):
    """The mixins with the stock Trainer, as a subclass of ours, or with ours in front of a subclass of the stock."""
    if kind == OURS_IN_FRONT:
        return of(GradUtilsTrainerMixin, *mixins, Trainer)
    return of(*mixins, GradUtilsTrainer if kind == OURS else Trainer)


def _of_kind(trainer_class):
    return {"grad_plugin": UNCHECKED} if issubclass(trainer_class, GradUtilsTrainerMixin) else {}


def _passes(report):
    assert all(row.not_compared == "" for row in report.comparisons), str(report)
    return report.passed


# ---- The check says what the training does ----

CASES = {
    "counted": ((planted.CountedLoss,), 1),
    "ranks of the arguments": ((planted.RanksOfTheArguments,), 1),
    "ranks of torch": ((planted.RanksOfTorch,), 1),
    "ranks of the state": ((planted.RanksOfTheState,), 1),
    "ranks forgotten": ((planted.RanksForgotten,), 1),
    "gathers": ((planted.Gathers,), 1),
    "own mean": ((planted.OwnMean,), 1),
    "own step": ((planted.OwnStep, planted.CountedLoss), 1),
    "own step of the model's loss": ((planted.OwnStep,), 1),
    "two steps": ((planted.TwoSteps,), 2),
    "second backward": ((planted.SecondBackward, planted.CountedLoss), 2),
    "added": ((planted.Added, planted.CountedLoss), 2),
    "plain backward": ((planted.PlainBackward, planted.CountedLoss), 1),
    "plain second backward": ((planted.PlainSecondBackward, planted.CountedLoss), 2),
    "divides by accumulation": ((planted.DividesByAccumulation, planted.CountedLoss), 1),
    "divides its mean by accumulation": ((planted.DividesByAccumulation, planted.OwnMean), 1),
    "looks at batches": ((planted.LooksAtBatches,), 1),
}


@pytest.mark.wide
@pytest.mark.parametrize("name", CASES)
@on_layouts("one_rank", "ddp2")
def test_the_check_passes_if_and_only_if_the_training_is_exact(layout, name):
    mixins, factor = CASES[name]
    gradients, _ = truth(HEAD, make_data(HEAD))
    want = {parameter: gradient * factor for parameter, gradient in gradients.items()}
    verdicts = {}
    for kind in (STOCK, OURS, OURS_IN_FRONT):
        trainer_class = _class(kind, mixins)
        is_exact = trains_exactly(trainer_class, want, layout, **_of_kind(trainer_class))
        report = report_of(trainer_class, layout=layout, **_of_kind(trainer_class))
        assert report.passed == is_exact, f"{kind} exact: {is_exact}\n{report}"
        verdicts[kind] = is_exact
    right_with_stock = {"counted", "gathers", "own step", "two steps", "added", "looks at batches"}
    if layout == "one_rank":  # DDP reduces in the first backward after a forward only
        right_with_stock.add("second backward")
    if name in right_with_stock or name.startswith("ranks of"):
        assert verdicts[STOCK]


@on_layouts("one_rank", "ddp2")
def test_loss_functions_and_label_smoothing_pass_whatever_stock_counts(layout):
    for head in (HEAD, "gpt2 causal"):  # of which stock counts too many
        for options in (
            {"compute_loss_func": planted.counted_loss},
            {"arguments": {"label_smoothing_factor": 0.1}},
        ):
            report = report_of(GradUtilsTrainer, head, layout, **options)
            assert _passes(report), str(report)


# ---- Advice ----


def _ours(*mixins, model=None, **settings):
    plugin = GradUtilsPlugin(**{"check_loss_unit": False} | settings)
    return {"trainer_class": _class(OURS_IN_FRONT, mixins), "grad_plugin": plugin, "model": model}


def _stock(*mixins, model=None):
    return {"trainer_class": of(*mixins, Trainer), "model": model}


def _positions(batch):
    return batch["labels"].numel() * torch.ones(())


def _clip(parameter):
    nn.utils.clip_grad_norm_(parameter, 1e-3)


def _hooked(hook):
    model = make_model(HEAD)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return model


REPAIRS = {
    # fault: (layout, as it is, what the advice says, after that)
    "ranks forgotten, stock": (
        "ddp2",
        lambda: _stock(planted.RanksForgotten),
        "multiply the loss by self.accelerator.num_processes in compute_loss, where it is divided",
        lambda: _stock(planted.CountedLoss),
    ),
    "own mean, stock": (
        "ddp2",
        lambda: _stock(planted.OwnMean),
        "use hf_gradutils.GradUtilsTrainer, or GradUtilsTrainerMixin in front of it",
        lambda: _ours(planted.OwnMean),
    ),
    "plain backward, ours": (
        "one_rank",
        lambda: _ours(planted.PlainBackward, planted.OwnMean),
        "accelerator.backward(loss)",
        lambda: _ours(planted.OwnStep, planted.OwnMean),
    ),
    "plain backward on two ranks, ours": (
        "ddp2",
        lambda: _ours(planted.PlainBackward, planted.OwnMean),
        "accelerator.backward(loss)",
        lambda: _ours(planted.OwnStep, planted.OwnMean),
    ),
    "plain second backward, ours": (
        "one_rank",
        lambda: _ours(planted.PlainSecondBackward, planted.OwnMean),
        "add the losses of a micro-batch up and call self.accelerator.backward(loss) once",
        lambda: _ours(planted.Added, planted.OwnMean),
    ),
    "plain backward, stock": (
        "one_rank",
        lambda: _stock(planted.PlainBackward, planted.OwnMean),
        "or GradUtilsTrainerMixin in front of it; training_step calls backward on the loss itself, which nothing can "
        "weight; call self.accelerator.backward(loss) there",
        lambda: _ours(planted.OwnStep, planted.OwnMean),
    ),
    "a unit of one's own": (
        "one_rank",
        lambda: _ours(loss_unit="rows"),
        "leave out GradUtilsPlugin(loss_unit='rows')",
        lambda: _ours(),
    ),
    "a count of one's own": (
        "one_rank",
        lambda: _ours(count_targets=_positions),
        "leave out GradUtilsPlugin(count_targets=…)",
        lambda: _ours(),
    ),
    "an odd mean": (
        "one_rank",
        lambda: _ours(planted.MeanOfOddClasses),
        "set GradUtilsPlugin(loss_unit=… or count_targets=…) to what the loss is a mean over",
        lambda: _ours(planted.MeanOfOddClasses, count_targets=planted.count_odd_classes),
    ),
    "clipping hooks": (
        "one_rank",
        lambda: _ours(model=_hooked(_clip)),
        "change those of the whole window, in a callback's on_pre_optimizer_step",
        lambda: _ours(),  # where the callback is not seen
    ),
    "a detached loss": (
        "one_rank",
        lambda: _stock(planted.Detached),
        "The loss is detached",
        lambda: _stock(),
    ),
    "no trained parameter": (
        "one_rank",
        lambda: _ours(model=planted.only_unused(make_model(HEAD))),
        "no parameter that requires a gradient takes part in it",
        lambda: _ours(),
    ),
}
REPAIRED_NOW = {
    # What the package may make exact itself, and what its advice says as long as it does not.
    "times ranks": (
        "ddp2",
        lambda: _ours(planted.MeanTimesRanks),
        "let compute_loss return the micro-batch's own mean",
        lambda: _ours(planted.OwnMean),
    ),
    "a factor of ranks": (
        "ddp2",
        lambda: _ours(planted.CountedLoss),
        "let compute_loss return the micro-batch's own mean",
        lambda: _ours(planted.OwnMean),
    ),
    "two backwards": (
        "one_rank",
        lambda: _ours(planted.SecondBackward, planted.OwnMean),
        "and call backward once",
        lambda: _ours(planted.Added, planted.OwnMean),
    ),
    "two steps": (
        "one_rank",
        lambda: _ours(planted.TwoSteps),
        "and call backward once",
        lambda: _ours(planted.Added),
    ),
    "divided by the accumulation": (
        "one_rank",
        lambda: _ours(planted.DividesByAccumulation, planted.OwnMean),
        "and training_step pass that to accelerator.backward",
        lambda: _ours(planted.OwnStep, planted.OwnMean),
    ),
}


def _by_layout(cases):
    return pytest.mark.parametrize(("layout", "name"), [(case[0], name) for name, case in cases.items()])


def _check_repair(layout, fault, advice, repaired):
    report = report_of(**fault(), layout=layout)
    assert report.verdict == "FAILED"
    assert advice in " ".join(str(report).split()), str(report)
    report = report_of(**repaired(), layout=layout)
    assert _passes(report), str(report)


@_by_layout(REPAIRS)
@on_layouts()
def test_following_the_advice_repairs_a_fault(layout, name):
    _check_repair(*REPAIRS[name])


@_by_layout(REPAIRED_NOW)
@on_layouts()
def test_following_the_advice_repairs_what_is_not_exact_by_itself(layout, name):
    layout, fault, *_ = REPAIRED_NOW[name]
    if not report_of(**fault(), layout=layout).passed:
        _check_repair(*REPAIRED_NOW[name])
