"""A gradient that is not finite on one of the ranks: a bad step, left out by host or device, changes nothing."""

import pytest
import torch

from hf_gradutils import GradUtilsPlugin
from tests.gpu.cuda_cases import arguments_for, assert_on, run
from tests.window import nonfinite_cases as on_cpu
from tests.window.nonfinite_cases import FUSED, PLAIN, Spoiled, train_spoiled

OPTIMIZERS = {"fused adamw": FUSED, "adamw": PLAIN, "sgd": {"optim": "sgd"}}
"""The first leaves the step out on the device; for the others the host reads a flag."""

LAYOUTS = ["one_rank", "ddp2", "fsdp2x2"]


def assert_used(device):
    assert device == "cpu" or torch.cuda.max_memory_allocated() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_raises_everywhere_and_changes_nothing(optimizer, layout):
    run(raises, layout, optimizer)


def raises(layout, device, optimizer):
    on_cpu.check_a_bad_step_raises(layout, OPTIMIZERS[optimizer] | arguments_for(device, layout))
    assert_used(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", ["fused adamw", "adamw"])
def test_a_bad_step_is_left_out_and_the_next_are_taken(optimizer, layout):
    run(skips, layout, optimizer)


def skips(layout, device, optimizer):
    on_cpu.check_a_bad_step_is_left_out(layout, OPTIMIZERS[optimizer] | arguments_for(device, layout))
    assert_used(device)


@pytest.mark.parametrize("layout", ["one_rank", "fsdp2x2"])  # under DDP the ranks would go apart
def test_ignoring_takes_the_step(layout):
    run(ignores, layout)


def ignores(layout, device):
    plugin = GradUtilsPlugin(on_nonfinite="ignore")
    trainer, states, error = train_spoiled(layout, Spoiled, FUSED | arguments_for(device, layout), grad_plugin=plugin)
    assert error is None
    assert_on(trainer.model_wrapped, device)
    assert states.weights[1][on_cpu.WHERE].isnan().any()
    assert not states.weights[0][on_cpu.WHERE].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_is_left_out_where_the_optimizer_scales_too(layout):
    run(folded_skips, layout)


def folded_skips(layout, device):
    plugin = {"on_nonfinite": "skip"}
    arguments = arguments_for(device, layout)
    weights, trainer = on_cpu.train_folded(layout, True, arguments, trainer_class=Spoiled, settings=plugin)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert trainer.state.log_history[-2]["skipped_steps"] == 1
