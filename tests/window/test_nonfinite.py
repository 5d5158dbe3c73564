"""A gradient that is not finite anywhere: every rank takes the same decision, and a bad step changes nothing."""

import math

import pytest
import torch
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import Counters, GradUtilsPlugin
from tests.harness.layouts import on_layouts
from tests.window.nonfinite_cases import (
    FUSED,
    PLAIN,
    WHERE,
    Spoiled,
    Spoils,
    check_a_bad_step_is_left_out,
    check_a_bad_step_raises,
    train_spoiled,
    whole,
)


class SpoiledFromTheSecond(Spoiled):
    bad_windows = range(2, 100)


@pytest.mark.parametrize("arguments", [FUSED, PLAIN], ids=["fused", "plain"])
@on_layouts("one_rank", "ddp2", "fsdp2x2", "tp2")
def test_a_bad_step_raises_everywhere_and_changes_nothing(layout, arguments):
    check_a_bad_step_raises(layout, arguments)


@pytest.mark.parametrize("arguments", [FUSED, PLAIN], ids=["fused", "plain"])
@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_bad_step_is_left_out_and_the_next_are_taken(layout, arguments):
    check_a_bad_step_is_left_out(layout, arguments)


def test_the_mean_loss_over_several_steps_is_that_of_the_steps_taken():
    plugin = GradUtilsPlugin(on_nonfinite="skip")
    each, _, _ = train_spoiled("one_rank", Spoiled, PLAIN, grad_plugin=plugin)
    at_once, _, _ = train_spoiled("one_rank", Spoiled, PLAIN | {"logging_steps": 4}, grad_plugin=plugin)
    losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
    assert at_once.state.log_history[0]["loss"] == pytest.approx((losses[0] + losses[2] + losses[3]) / 3, rel=1e-6)


@on_layouts("one_rank", "ddp2")
def test_too_many_in_a_row_raise(layout):
    plugin = GradUtilsPlugin(on_nonfinite="skip", max_skipped_steps=1)
    _, states, error = train_spoiled(layout, SpoiledFromTheSecond, FUSED, grad_plugin=plugin)
    assert "2 steps in a row had no finite gradient (max_skipped_steps=1); the last: step 3" in str(error)
    assert len(states.weights) == 2


def test_ignoring_takes_the_step():
    plugin = GradUtilsPlugin(on_nonfinite="ignore")
    trainer, states, error = train_spoiled("one_rank", Spoiled, FUSED, grad_plugin=plugin)
    assert error is None
    assert states.weights[1][WHERE].isnan().any()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in losses] == [False, False, True, True], "and the log shows what came of it"


def test_control_the_stock_trainer_has_nan_weights_under_a_clean_looking_loss():
    class Stock(Spoils, Trainer):
        pass

    trainer, states, _ = train_spoiled("one_rank", Stock, FUSED)
    assert states.weights[1][WHERE].isnan().any()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))


def test_a_bad_loss_is_named():
    class BadLoss(GradUtilsTrainer):
        num_batches = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.num_batches += torch.is_grad_enabled()
            return loss * (math.inf if self.num_batches == 4 else 1.0) if torch.is_grad_enabled() else loss

    _, _, error = train_spoiled("one_rank", BadLoss, FUSED)
    assert "step 2" in str(error)
    assert "micro-batch 2 of 2 on rank 0: inf" in str(error)
    assert "and 18 more" in str(error)


def test_a_checkpoint_is_not_written_over_a_bad_step(tmp_path):
    arguments = FUSED | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    _, _, error = train_spoiled("one_rank", Spoiled, arguments)
    assert error is not None
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-1"]


@on_layouts("one_rank", "ddp2")
def test_after_a_bad_step_the_same_trainer_trains_on(layout):
    trainer, _, error = train_spoiled(layout, Spoiled, FUSED)
    assert error is not None
    trainer.num_windows = 10  # no more bad ones
    assert trainer.train().global_step == 4
    assert all(whole(p).isfinite().all() for p in trainer.model.parameters())


def test_rates_that_are_tensors_are_put_back_too():
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    counters = Counters(7, scheduler, optimizer)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert counters.restore(scheduler, optimizer) == 7
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)
    assert scheduler.last_epoch == 0
