"""check_invariance: right layouts pass, planted faults are found and named, and nothing has changed afterwards."""

import functools
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, check_invariance
from hf_gradutils.errors import InvalidArgumentError, InvarianceError
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train
from tests.invariance.checks import COPIES, HEAD, LAYOUT, PARTS, checking, report_of

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


@on_layouts(*RIGHT)
def test_ours_passes_in_every_layout(layout):
    for head in RIGHT[layout]:
        report = report_of(GradUtilsTrainer, head, layout)
        assert report.passed, str(report)
        assert [row.not_compared for row in report.comparisons] == [""] * 4, str(report)
        assert all(row.gradient_error < 2e-6 for row in report.comparisons[PARTS:])


# ---- Planted faults ----


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_the_stock_trainer_is_shown_to_scale_wrongly(layout):
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
    for row in report.comparisons[PARTS:]:
        assert "leave out GradUtilsPlugin(loss_unit='tokens'), or set it to what" in row.problem
    assert report_of(GradUtilsTrainer, grad_plugin=GradUtilsPlugin(check_loss_unit=False)).passed


@on_layouts("ddp2")
def test_a_unit_that_the_first_batch_refuses_is_a_row(layout):
    report = report_of(GradUtilsTrainer, layout=layout, grad_plugin=GradUtilsPlugin(loss_unit="rows"))
    assert "the loss is not a mean over the targets counted" in report.comparisons[-1].problem


@on_layouts("tp2", "tp2_fsdp2x2")
def test_qk_norm_under_stock_tensor_parallelism_is_found(layout):
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


@on_layouts("ddp2")
def test_replicas_that_have_drifted_apart_stop_the_training_at_its_start(layout):
    checks = functools.partial(GradUtilsTrainer, check_invariance=True)
    made = []

    def make(*args, callbacks, **kwargs):
        made.append(checks(*args, callbacks=[*callbacks, Drift()], **kwargs))
        return made[0]

    with pytest.raises(InvarianceError, match=r"'model.norm.weight' should be the same on ranks 0 and 1") as caught:
        train(HEAD, 4, layout=layout, trainer_class=make)
    assert not caught.value.report.passed
    assert made[0].state.global_step == 0


# ---- Nothing has changed ----


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_training_is_the_same_with_and_without_a_check(layout):
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


# ---- Errors ----


def test_what_cannot_be_checked_says_why():
    with pytest.raises(InvalidArgumentError, match="check_loop_invariance"):
        check_invariance(object())
    with pytest.raises(InvalidArgumentError, match="2 samples are needed for 1 data ranks, but the dataset has 1"):
        report_of(GradUtilsTrainer, data=make_data(HEAD, 1))
    with pytest.raises(InvalidArgumentError, match="tolerance must be > 0"):
        train(HEAD, 4, layout="one_rank", trainer_class=checking(GradUtilsTrainer, tolerance=0))


@on_layouts("fsdp2x2")
def test_a_sharded_model_that_cannot_be_built_anew_is_not_compared_with_one_process(layout):
    head = "plain shifting module"
    report = report_of(GradUtilsTrainer, head, layout)
    assert report.passed
    assert "pass make_model=" in report.comparisons[-1].not_compared
    rebuilt = checking(GradUtilsTrainer, make_model=lambda: make_model(head))
    trainer, _ = train(head, 4, layout=layout, trainer_class=rebuilt)
    assert trainer.report.passed
    assert trainer.report.comparisons[LAYOUT].gradient_error < 2e-6
