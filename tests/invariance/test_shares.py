"""Losses that are shares of a window's: what is right passes, planted faults are found, and stock fails with a fix."""

import contextlib
import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from hf_gradutils import (
    GradUtilsPlugin,
    GradUtilsTrainer,
    check_invariance,
    check_loop_invariance,
    check_window_invariance,
)
from hf_gradutils.targets import contrastive_heads, several_means
from hf_gradutils.trainer import _first_pass, _special_shares
from hf_gradutils.window import TwoPasses, _two_passes
from tests.harness.layouts import on_layouts
from tests.harness.shared_heads import LOSS_OF_PAIRS, contrast, embed_pairs
from tests.harness.trainer_cases import fsdp_on_cpu
from tests.invariance import share_cases as cases
from tests.invariance.checks import LAYOUT, PARTS

PASSES = 4
"""The row of losses in two passes."""


def _check(trainer, **options):
    return check_invariance(trainer, **{"num_samples": 8} | options)


def _is_compared(report):
    return all(row.not_compared == "" for row in report.comparisons)


# ---- What is right passes ----


@on_layouts("one_rank", "ddp2")
def test_shares_pass(layout):
    for name, make in cases.RIGHT.items():
        if layout == "ddp2" and name in ("siglip", "bert"):  # sharded below; as terms
            continue
        report = _check(make())
        assert report.passed, f"{name}: {report}"
        assert _is_compared(report), f"{name}: {report}"
        assert all(row.gradient_error < 2e-6 for row in report.comparisons[PARTS : LAYOUT + 1]), str(report)
        assert len(report.comparisons) == (5 if name in ("clip", "siglip", "whole batch") else 4)
    for name, (make_model, make_rows, loss) in cases.LOOPS.items():
        accelerator, model = cases.make_loop(make_model)
        report = check_loop_invariance(accelerator, model, make_rows(), cases.collate, loss, num_samples=8)
        assert report.passed, f"{name}: {report}"
        assert _is_compared(report), f"{name}: {report}"
        assert accelerator.gradient_accumulation_steps == 2
        assert all(p.grad is None for p in model.parameters())


@on_layouts("fsdp2x2")
def test_a_contrastive_head_that_is_sharded_passes(layout):
    layers = ["SiglipEncoderLayer"]
    arguments = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
    with fsdp_on_cpu():
        trainer = cases.make_trainer("siglip", arguments=arguments)
        report = _check(trainer)
        assert trainer.accelerator.is_fsdp2
    assert report.passed, str(report)
    assert _is_compared(report), str(report)


FROZEN = {
    "one tower": lambda name: name.startswith("vision"),
    "both towers": lambda name: name.startswith(("vision", "text")),
    "temperature": lambda name: name == "logit_scale",
    "all but the temperature": lambda name: name != "logit_scale",
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_raise_no_alarm(name):
    model = cases.make_clip()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[name](parameter_name))
    report = _check(cases.make_trainer("clip", model=model))
    assert report.passed, str(report)
    assert _is_compared(report), str(report)


@pytest.mark.parametrize("arguments", [{"bf16": True}, None])
def test_half_precision_raises_no_alarm(arguments):
    model = cases.make_clip() if arguments else cases.make_clip().bfloat16()
    report = _check(cases.make_trainer("clip", model=model, arguments=arguments))
    assert report.passed, str(report)
    assert report.tolerance == 5e-2


def test_large_similarities_raise_no_alarm():
    model = cases.make_clip()
    nn.init.constant_(model.logit_scale, 9.0)  # float32 is off by 1e-5 and more for any split
    report = _check(cases.make_trainer("clip", model=model), tolerance=1e-7)
    assert report.passed, str(report)
    assert 1e-7 < report.tolerance < 1e-2


# ---- Planted faults of the package ----


def _changed(monkeypatch, table, name, **fields):
    monkeypatch.setitem(table, name, dataclasses.replace(table[name], **fields))


def _detached_temperature(monkeypatch):
    heads = contrastive_heads._TABLE
    shared = heads["CLIPModel"].shared
    _changed(monkeypatch, heads, "CLIPModel", shared=lambda head: tuple(p.detach() for p in shared(head)))


def _bias_forgotten(monkeypatch):
    heads = contrastive_heads._TABLE
    loss = heads["SiglipModel"].loss
    _changed(
        monkeypatch,
        heads,
        "SiglipModel",
        loss=lambda rows, shared: loss(rows, (shared[0], torch.zeros_like(shared[1]))),
    )


def _rows_of_this_rank(monkeypatch):
    monkeypatch.setattr(_two_passes, "gather_tensors", lambda domain, tensors, **_: [tensors])
    monkeypatch.setattr(TwoPasses, "_position", lambda self: 0)


def _rows_of_one_micro_batch(monkeypatch):
    finish = TwoPasses.finish

    def alone(self, shared):
        gradients, values, of_shared = [], [], []
        for rows in self._rows:
            one = TwoPasses(self._loss_of)
            one.add(rows)
            values.append(finish(one, shared))
            gradients += one._gradients
            of_shared.append(one._of_shared)
        self._gradients, self._of_shared, self._value = gradients, of_shared[0], torch.stack(values).mean()
        return self._value

    monkeypatch.setattr(TwoPasses, "finish", alone)


def _counts_swapped(monkeypatch):
    heads = several_means.SEVERAL_MEANS
    counts = heads["BertForPreTraining"].counts
    _changed(monkeypatch, heads, "BertForPreTraining", counts=lambda head, batch: counts(head, batch).flip(0))


def _other_masks(monkeypatch):
    monkeypatch.setattr(_first_pass, "random_states", lambda device: lambda: None)


def _router_loss_of_micro_batches(monkeypatch):
    monkeypatch.setattr(_special_shares.RouterShares, "_share", lambda self, _, seen, outputs: outputs["loss"])


FAULTS = {
    # name: (case, fault, row, what it says)
    "detached temperature": ("clip", _detached_temperature, LAYOUT, "gradients of 1 of"),
    "bias forgotten": ("siglip", _bias_forgotten, 1, "when it is put together"),
    "rows of one micro-batch": ("clip", _rows_of_one_micro_batch, PARTS, "the gradient is"),
    "counts of another term": ("bert", _counts_swapped, PARTS, "it is not the one that hf_gradutils knows"),
    "other masks in the second pass": ("clip", _other_masks, PASSES, "two forwards of the same micro-batch differ"),
    "router loss of micro-batches": ("experts", _router_loss_of_micro_batches, PARTS, "with aux='exact' the router"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_shares_is_found(name, monkeypatch):
    case, plant, row, words = FAULTS[name]
    plant(monkeypatch)
    report = _check(cases.RIGHT[case]())
    assert report.verdict == "FAILED"
    assert words in report.comparisons[row].problem, str(report)


@on_layouts("ddp2")
def test_faults_between_ranks_are_found(layout):
    for plant, name in ((_rows_of_this_rank, "clip"), (_other_masks, "whole batch")):
        with pytest.MonkeyPatch.context() as monkeypatch:
            plant(monkeypatch)
            report = _check(cases.RIGHT[name]())
        row = PASSES if plant is _other_masks else LAYOUT
        assert report.comparisons[row].problem, f"{plant}: {report}"


# ---- Planted faults of users ----


def _swapped(model, batch):
    (masked, num_masked), (following, num_following) = cases.terms_of(model, batch)
    return [(masked, num_following), (following, num_masked)]


class SwappedTerms(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return _swapped(model, inputs)


DETACHED = dataclasses.replace(LOSS_OF_PAIRS, parameters=lambda model: (model.logit_scale.detach(),))


class _DrawsItself(nn.Module):
    """Dropout by numbers that are out of reach."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        hidden = self.inside(*args, **kwargs)
        return hidden * (torch.rand(hidden.shape, generator=_hidden_generator()) > 0.3) if self.training else hidden


@functools.cache
def _hidden_generator():
    return torch.Generator().manual_seed(3)


def test_faults_of_users_are_found():
    report = _check(cases.make_trainer("bert", SwappedTerms))
    assert "the count of a term is not the number" in report.comparisons[PARTS].problem, str(report)

    report = _check(cases.make_trainer("clip", whole_batch_loss=DETACHED))
    assert report.comparisons[PARTS].passed
    assert "return the parameters themselves, not detached" in report.comparisons[LAYOUT].problem, str(report)
    assert [name for name, _ in report.comparisons[LAYOUT].worst] == ["logit_scale"]

    model = cases.make_clip()
    model.text_projection = _DrawsItself(model.text_projection)
    report = _check(cases.make_trainer("clip", model=model))
    assert all(row.passed for row in report.comparisons[:PASSES]), str(report)
    assert "a generator of your own" in report.comparisons[PASSES].problem, str(report)


def test_faults_of_loops_are_found():
    for loss, model_and_rows, words in (
        (_swapped, cases.LOOPS["terms"], "the count of a term is not the number of targets"),
        (DETACHED, cases.LOOPS["whole batch"], "return the parameters themselves, not detached"),
    ):
        make_model, make_rows, _ = model_and_rows
        accelerator, model = cases.make_loop(make_model)
        report = check_loop_invariance(accelerator, model, make_rows(), cases.collate, loss, num_samples=8)
        assert words in report.comparisons[LAYOUT].problem, str(report)
    for name, words in (("terms", "start_window([num_targets, …])"), ("whole batch", "backward_whole_batch(loss, ")):
        make_model, make_rows, loss = cases.LOOPS[name]
        accelerator, model = cases.make_loop(make_model, Accelerator)
        report = check_loop_invariance(accelerator, model, make_rows(), cases.collate, loss, num_samples=8)
        assert report.verdict == "FAILED"
        assert words in report.comparisons[PARTS].problem, str(report)


@on_layouts("ddp2")
def test_a_loop_of_plain_torch_is_checked_against_the_loss_of_the_whole_batch(layout):
    model = nn.parallel.DistributedDataParallel(cases.make_clip(), find_unused_parameters=True)

    def run_window(batches, *, passes_of=TwoPasses):
        model.zero_grad()
        passes = passes_of(LOSS_OF_PAIRS.of_rows)
        with torch.no_grad():
            for batch in batches:
                rows, parameters = LOSS_OF_PAIRS.rows_of(model, batch, model.module)
                passes.add(rows)
        loss = passes.finish(parameters)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else model.no_sync():
                share = passes.share(index, *LOSS_OF_PAIRS.rows_of(model, batch, model.module))
                (share * dist.get_world_size()).backward()  # which DDP averages
        return loss

    arguments = model, cases.pairs(), cases.collate
    report = check_window_invariance(*arguments, run_window, LOSS_OF_PAIRS, num_samples=8)
    assert report.passed, str(report)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _rows_of_this_rank(monkeypatch)
        report = check_window_invariance(*arguments, run_window, LOSS_OF_PAIRS, num_samples=8)
    assert "from the rows of all micro-batches and ranks" in report.comparisons[LAYOUT].problem, str(report)


# ---- The stock Trainer ----


@pytest.mark.parametrize(
    ("head", "reason"), [("clip", "is one of the whole batch"), ("bert", "adds means over different targets")]
)
def test_stock_with_accumulation_fails_and_what_its_advice_says_repairs_it(head, reason):
    report = _check(cases.make_trainer(head, Trainer))
    assert report.verdict == "FAILED"
    for row in report.comparisons[PARTS : LAYOUT + 1]:
        assert reason in row.problem, str(report)
        assert "use hf_gradutils.GradUtilsTrainer" in row.problem
    assert _check(cases.make_trainer(head)).passed

    report = _check(cases.make_trainer(head, Trainer, 1))
    assert report.passed, str(report)
    assert report.comparisons[LAYOUT].gradient_error < 2e-6
    assert reason in report.comparisons[PARTS].not_compared


class OwnContrast(GradUtilsTrainer):
    """A contrastive loss of which nothing is known."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("return_loss")
        return contrast(*embed_pairs(model, inputs), model.logit_scale)


def test_ours_says_what_to_do_with_other_losses():
    unchecked = GradUtilsPlugin(check_loss_unit=False)
    report = _check(cases.make_trainer("clip", grad_plugin=unchecked))
    assert "which check_loss_unit=False takes for a mean; leave that out" in report.comparisons[PARTS].problem, str(
        report
    )

    report = _check(cases.make_trainer("clip", OwnContrast))
    assert "whole_batch_loss=WholeBatchLoss(embed, loss, parameters)" in report.comparisons[-1].problem, str(report)
    report = _check(cases.make_trainer("clip", OwnContrast, grad_plugin=unchecked))
    assert "is a WholeBatchLoss(embed, loss, parameters)" in report.comparisons[PARTS].problem, str(report)
    assert _check(cases.make_trainer("clip", whole_batch_loss=LOSS_OF_PAIRS)).passed

    report = _check(cases.make_trainer("clip", OwnContrast, 1))  # exact as it is
    assert report.passed, str(report)
    assert "with more" in report.comparisons[PARTS].not_compared


# ---- Nothing has changed ----


def _history(make, checks):
    torch.manual_seed(3)
    trainer = make()
    if checks == "before":
        assert check_invariance(trainer, num_samples=8).passed
    elif checks == "itself":
        trainer._checks_invariance = True
    trainer.train()
    entries = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    return entries, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, torch.rand(())


@on_layouts("one_rank", "ddp2")
def test_a_training_is_the_same_after_a_check(layout):
    for name in cases.RIGHT if layout == "one_rank" else ("clip", "terms"):
        checks = (None, "before", "itself") if name == "clip" else (None, "itself")
        (losses, weights, drawn), *others = (_history(cases.RIGHT[name], c) for c in checks)
        for other_losses, other_weights, other_drawn in others:
            assert losses == other_losses, name
            assert torch.equal(drawn, other_drawn), name
            assert all(torch.equal(weight, other_weights[n]) for n, weight in weights.items()), name
