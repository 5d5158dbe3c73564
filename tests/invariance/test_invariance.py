"""check_invariance: right layouts pass, planted faults are found and named, and nothing has changed afterwards."""

import functools
import math
import random

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback

from hf_gradutils import (
    GradUtilsAccelerator,
    GradUtilsPlugin,
    GradUtilsTrainer,
    check_invariance,
    check_loop_invariance,
    check_window_invariance,
    get_sync_ctx,
    reduce_loss,
    rescale_gradients,
)
from hf_gradutils.errors import InvalidArgumentError, InvarianceError
from hf_gradutils.invariance import InvarianceReport
from hf_gradutils.invariance._report import Comparison
from tests.harness.heads import HEADS
from tests.harness.layouts import run
from tests.harness.trainer_cases import make_data, make_model, reset_accelerate, train

COPIES, PARTS, LAYOUT, TARGETS = range(4)
HEAD = "llama causal"


def checking(trainer_class, **options):
    """A Trainer that checks itself before it trains, as a user would."""

    class Checking(trainer_class):
        report = None

        def train(self, *args, **kwargs):
            if self.report is None:
                self.report = "under way"
                self.report = check_invariance(self, **{"num_samples": 8} | options)
            return super().train(*args, **kwargs)

    return Checking


def report_of(trainer_class, head=HEAD, layout="one_rank", **options):
    trainer, _ = train(head, 4, layout=layout, trainer_class=checking(trainer_class), **options)
    return trainer.report


# ---- What is right passes ----

RIGHT = {
    "one_rank": [HEAD, "bert classes", "qwen3 moe aux", "plain shifting module"],
    "ddp2": [HEAD, "t5 seq2seq"],
    "fsdp2x2": [HEAD],
    "hsdp2x2": ["bert classes"],
    "native_fsdp2x2": [HEAD],
    "tp2": ["qwen3 causal"],
    "tp2_fsdp2x2": ["qwen3 causal"],
}


@pytest.mark.parametrize("layout", RIGHT)
def test_ours_passes_in_every_layout(layout):
    run(_passes, layout)


def _passes(layout):
    for head in RIGHT[layout]:
        report = report_of(GradUtilsTrainer, head, layout)
        assert report.passed, str(report)
        assert [row.not_compared for row in report.comparisons] == [""] * 4, str(report)
        assert all(row.gradient_error < 2e-6 for row in report.comparisons[PARTS : LAYOUT + 1])


# ---- Planted faults ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_the_stock_trainer_is_shown_to_scale_wrongly(layout):
    run(_stock_scaling, layout)


def _stock_scaling(layout):
    report = report_of(Trainer, "bert classes", layout)
    num_parts, num_ranks = (8, 1) if layout == "one_rank" else (4, 2)
    assert not report.passed
    assert report.comparisons[COPIES].passed
    parts, whole = report.comparisons[PARTS], report.comparisons[LAYOUT]
    assert f"the gradient is {num_parts} times what it should be" in parts.problem
    assert f"the gradient is {num_parts * num_ranks} times what it should be" in whole.problem
    assert "use hf_gradutils.GradUtilsTrainer" in whole.problem
    assert whole.grad_norm[1] == pytest.approx(num_parts * num_ranks * whole.grad_norm[0], rel=1e-4)
    assert whole.worst


def _mean_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets)


def test_a_swallowed_count_is_found():
    assert "the gradient is off by" in report_of(Trainer, compute_loss_func=_mean_loss).comparisons[PARTS].problem
    assert report_of(GradUtilsTrainer, compute_loss_func=_mean_loss).passed


def test_a_wrong_shift_is_found():
    plugin = GradUtilsPlugin(loss_unit="tokens", check_loss_unit=False)
    report = report_of(GradUtilsTrainer, grad_plugin=plugin)
    assert not report.comparisons[PARTS].passed
    assert "the loss is no mean over the" in report.comparisons[TARGETS].problem
    assert "set GradUtilsPlugin(loss_unit=" in report.comparisons[TARGETS].problem


def test_a_unit_that_the_first_batch_refuses_is_a_row():
    run(_refused_unit, "ddp2")


def _refused_unit(layout):
    kept = []

    class Stops(GradUtilsTrainer):
        def train(self, *args, **kwargs):
            if kept:
                return super().train(*args, **kwargs)
            kept.append(None)
            kept.append(check_invariance(self, num_samples=8))
            raise InvarianceError("enough")

    with pytest.raises(InvarianceError, match="enough"):
        train(HEAD, 4, layout=layout, trainer_class=Stops, grad_plugin=GradUtilsPlugin(loss_unit="rows"))
    assert "the loss is not a mean over the targets counted" in kept[1].comparisons[-1].problem


@pytest.mark.parametrize("layout", ["tp2", "tp2_fsdp2x2"])
def test_qk_norm_under_stock_tensor_parallelism_is_found(layout):
    run(_qk_norm, layout)


def _qk_norm(layout):
    row = report_of(Trainer, "qwen3 causal", layout).comparisons[PARTS]
    assert "parameters are wrong, the others are right" in row.problem
    assert "tensor-parallel hook on qk-norm" in row.problem
    assert all("q_norm" in name or "k_norm" in name for name, _ in row.worst)


class Drift(TrainerCallback):
    """What a rank of its own learning rate would do."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.model.norm.weight.add_(0.01)


def test_replicas_that_have_drifted_apart_stop_the_training_at_its_start():
    run(_drifted, "ddp2")


def _drifted(layout):
    checks = functools.partial(GradUtilsTrainer, check_invariance=True)
    made = []

    def make(*args, callbacks, **kwargs):
        made.append(checks(*args, callbacks=[*callbacks, Drift()], **kwargs))
        return made[0]

    with pytest.raises(InvarianceError, match=r"'model.norm.weight' should be the same on ranks 0 and 1") as caught:
        train(HEAD, 4, layout=layout, trainer_class=make)
    assert not caught.value.report.passed
    assert made[0].state.global_step == 0


class Experts(nn.Module):
    """Each rank has an expert of its own, which nobody declares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 4)
        torch.manual_seed(dist.get_rank())
        self.expert = nn.Linear(4, 48)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.expert(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_an_undeclared_expert_shard_is_found():
    run(_expert, "ddp2")


def _expert(layout):
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    model = Experts()  # not wrapped: DDP would make the experts alike
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(optimizer)
    report = check_loop_invariance(accelerator, model, make_data(HEAD), HEADS[HEAD].collate, _expert_loss)
    assert not report.passed
    assert "'expert.weight' should be the same" in report.comparisons[COPIES].problem
    assert "pass ownership={'expert.weight': 'sharded'}" in report.comparisons[COPIES].problem


def _expert_loss(model, batch):
    return model(**batch)["loss"], (batch["labels"] != -100).sum()


# ---- Loops ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_a_loop_is_checked_too(layout):
    run(_loops, layout)


def _loops(layout):
    for kind, is_right in ((GradUtilsAccelerator, True), (Accelerator, False)):
        reset_accelerate()
        accelerator = kind(cpu=True, gradient_accumulation_steps=2)
        model, _ = accelerator.prepare(made := make_model(HEAD), torch.optim.SGD(made.parameters(), lr=0.1))
        report = check_loop_invariance(accelerator, model, make_data(HEAD), HEADS[HEAD].collate, _causal_loss)
        assert report.passed == is_right, str(report)
        assert accelerator.gradient_accumulation_steps == 2
        assert all(p.grad is None for p in model.parameters())
    assert "use hf_gradutils.GradUtilsAccelerator" in report.comparisons[PARTS].problem
    wrong = check_loop_invariance(
        accelerator, model, make_data(HEAD), HEADS[HEAD].collate, lambda m, b: (m(**b).loss, len(b["labels"]))
    )
    assert not wrong.comparisons[TARGETS].passed


def _causal_loss(model, batch):
    return model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_loop_of_plain_torch_is_checked_too(layout):
    run(_plain_loop, layout)


def _plain_loop(layout):
    model = make_model(HEAD)
    if layout == "ddp2":
        model = nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp2x2":
        fully_shard(model)

    def run_window(batches, *, divides=True):
        losses, num_targets = [], torch.zeros(())
        for index, batch in enumerate(batches):
            with get_sync_ctx(model, is_optim_step=index == len(batches) - 1):
                loss, num_here = _causal_loss(model, batch)
                (loss * num_here).backward()
            losses.append(loss.detach() * num_here)
            num_targets += num_here
        if divides:
            rescale_gradients(model, num_targets)
        total, denominator = reduce_loss(losses, num_targets)
        return total / denominator

    arguments = (model, make_data(HEAD), HEADS[HEAD].collate)
    report = check_window_invariance(*arguments, run_window, _causal_loss)
    assert report.passed, str(report)
    assert report.comparisons[LAYOUT].gradient_error < 2e-6
    wrong = check_window_invariance(*arguments, functools.partial(run_window, divides=False), _causal_loss)
    assert "times what it should be" in wrong.comparisons[LAYOUT].problem


# ---- Nothing has changed ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_training_is_the_same_with_and_without_a_check(layout):
    run(_same_training, layout)


def _same_training(layout):
    histories = []
    for kind in (
        GradUtilsTrainer,
        checking(GradUtilsTrainer),
        functools.partial(GradUtilsTrainer, check_invariance=True),
    ):
        random.seed(1)
        model = None
        if layout != "fsdp2x2":
            model = make_model(HEAD)
            model.config.attention_dropout = 0.3  # random states matter
            for module in model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.3
        arguments = {"max_steps": 3, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
        torch.manual_seed(3)
        trainer, tap = train(HEAD, 2, layout=layout, trainer_class=kind, model=model, arguments=arguments)
        assert len(tap.steps) == 3
        histories.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
        histories[-1].append(random.random())
    assert histories[0] == histories[1] == histories[2]


def test_everything_is_as_it_was():
    seen = {}

    class Looks(checking(GradUtilsTrainer)):
        def train(self, *args, **kwargs):
            if self.report is None:
                before = _state(self)
                self.report = "under way"
                self.report = check_invariance(self, num_samples=8)
                seen["before"], seen["after"] = before, _state(self)
            return GradUtilsTrainer.train(self, *args, **kwargs)

    train(HEAD, 4, layout="one_rank", trainer_class=Looks)
    assert seen["before"] == seen["after"]


def _state(trainer):
    return {
        "weights": [p.detach().sum().item() for p in trainer.model.parameters()],
        "gradients": [p.grad for p in trainer.model.parameters()],
        "modes": [m.training for m in trainer.model.modules()],
        "trains": "train" in vars(trainer.model),
        "random": (torch.get_rng_state().sum().item(), random.getstate()),
        "optimizer": (trainer.optimizer, trainer.lr_scheduler),
        "callbacks": [type(c) for c in trainer.callback_handler.callbacks],
        "step": trainer.state.global_step,
        "in train": trainer.is_in_train,
        "steps": trainer.args.gradient_accumulation_steps,
        "windows": (trainer.accelerator.report, list(trainer.accelerator._models)),
    }


# ---- Errors and words ----


def test_what_cannot_be_checked_says_why():
    with pytest.raises(InvalidArgumentError, match="check_loop_invariance"):
        check_invariance(object())
    with pytest.raises(InvalidArgumentError, match="99 samples are needed"):
        train(HEAD, 4, layout="one_rank", trainer_class=checking(GradUtilsTrainer, num_samples=99))
    with pytest.raises(InvalidArgumentError, match="tolerance must be > 0"):
        train(HEAD, 4, layout="one_rank", trainer_class=checking(GradUtilsTrainer, tolerance=0))


def test_a_sharded_model_that_cannot_be_built_anew_is_not_compared_with_one_process():
    run(_cannot_be_built, "fsdp2x2")


def _cannot_be_built(layout):
    report = report_of(GradUtilsTrainer, "plain shifting module", layout)
    assert report.passed
    assert "pass make_model=" in report.comparisons[-1].not_compared
    trainer, _ = train(
        "plain shifting module",
        4,
        layout=layout,
        trainer_class=checking(GradUtilsTrainer, make_model=lambda: make_model("plain shifting module")),
    )
    assert trainer.report.passed
    assert trainer.report.comparisons[LAYOUT].gradient_error < 2e-6


def test_the_report_is_a_table():
    rows = (
        Comparison(name="a", loss=(1.0, 1.0), grad_norm=(2.0, 2.0), gradient_error=1e-7),
        Comparison(name="b", loss=(1.0, 4.0), gradient_error=3.0, problem="too large; halve it", worst=(("w", 3.0),)),
        Comparison(name="c", not_compared="no way to"),
    )
    report = InvarianceReport(rows, 1e-5, "2 samples")
    lines = str(report).splitlines()
    assert not report.passed
    assert lines[0] == "Invariance: 2 samples, tolerance 1e-05"
    assert lines[2].split() == ["a", "1", "1", "2", "2", "off", "by", "1.0e-07", "ok"]
    assert lines[3].endswith("WRONG")
    assert "WRONG: b: too large; halve it" in lines
    assert "  most wrong: w (3.0e+00)" in lines
    assert "not compared: c: no way to" in lines
    assert lines[-1] == "FAILED"
    assert math.isnan(rows[2].gradient_error)
