"""Clipping through GradUtilsAccelerator: any parameters, by norm or value, and in a fused optimizer's own pass."""

import math

import pytest
import torch
from torch import nn

from hf_gradutils import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.accelerator_cases import FUSED, HEAD, TOLERANCE, run_loop
from tests.harness.counting import collectives, events_of
from tests.harness.gradients import norm_of, relative_error, whole_gradients
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, truth


@on_layouts("one_rank", "ddp2", "fsdp2x2", "tp2")
def test_any_parameters_can_be_clipped(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    stranger = nn.Linear(3, 2)
    stranger.weight.grad = torch.full((2, 3), 2.0)
    some = {name: g for name, g in want.items() if "mlp" in name}
    rest = {name: g for name, g in want.items() if "mlp" not in name}
    assert some
    assert rest
    checked = []

    def clip(loop):
        if not loop.accelerator.sync_gradients:
            return
        accelerator = loop.accelerator
        named = dict(loop.model.named_parameters())
        limit = norm_of(some) / 2
        got = accelerator.clip_grad_norm_((p for n, p in named.items() if "mlp" in n), limit)
        assert float(got) == pytest.approx(norm_of(some), rel=TOLERANCE)
        clipped = {n: g * 0.5 for n, g in some.items()} | rest
        assert relative_error(whole_gradients(loop.model), clipped) < TOLERANCE
        assert float(accelerator.report.grad_norm) == pytest.approx(norm_of(want), rel=TOLERANCE)
        backwards = accelerator.clip_grad_norm_(reversed(list(named.values())), math.inf)
        assert float(backwards) == pytest.approx(norm_of(clipped), rel=TOLERANCE)
        one = next(n for n in named if "mlp" in n)
        largest = float(clipped[one.removeprefix("module.")].abs().max())
        assert float(accelerator.clip_grad_norm_(named[one], math.inf, norm_type=math.inf)) == pytest.approx(
            largest, rel=TOLERANCE
        )
        assert float(accelerator.clip_grad_norm_(stranger.parameters(), 1.0)) == pytest.approx(24**0.5)
        assert float(stranger.weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)
        checked.append(True)

    run_loop(HEAD, layout, 4, after_backward=clip)
    assert checked == [True]


@on_layouts("ddp2", "fsdp2x2")
def test_clipping_some_parameters_plans_once(layout):
    gathers = []

    def clip(loop):
        def end():
            named = loop.model.named_parameters()
            loop.accelerator.clip_grad_norm_([p for n, p in named if "mlp" in n], 1.0)
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

        gathers.append(sum(collectives(events_of(end)).values()))

    run_loop(HEAD, layout, 1, batch_size=2, after_backward=clip)
    assert set(gathers[1:]) == {3}, "one for the window, one for each that is clipped apart"
    assert gathers[0] > 3, "control: plans are made in the first step"


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_values_can_be_clipped_wherever_they_are(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    limit = float(torch.cat([g.abs().flatten() for g in want.values()]).quantile(0.9))
    plugin = GradUtilsPlugin(num_steps=4, fold_into_optimizer=True)

    def clip(loop):
        if loop.accelerator.sync_gradients:
            loop.accelerator.clip_grad_value_(loop.model.parameters(), limit)

    loop = run_loop(HEAD, layout, 4, plugin=plugin, optimizer=FUSED, after_backward=clip)
    assert relative_error(loop.gradients[0], {n: g.clamp(-limit, limit) for n, g in want.items()}) < TOLERANCE


def test_clipping_before_the_end_of_a_window_is_refused():
    def clip(loop):
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

    with pytest.raises(InvalidArgumentError, match=r"if accelerator\.sync_gradients"):
        run_loop(HEAD, "one_rank", 4, after_backward=clip)


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_fused_optimizer_that_scales_takes_the_same_steps(layout):
    weights = []
    for folds in (False, True):
        plugin = GradUtilsPlugin(num_steps=2, fold_into_optimizer=folds)
        loop = run_loop(HEAD, layout, 2, batch_size=2, plugin=plugin, optimizer=FUSED, max_norm=0.5)
        weights.append({n: p.detach().double() for n, p in loop.model.named_parameters()})
        weights[-1] = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights[-1].items()}
        assert len(loop.norms) > 1
    assert relative_error(weights[1], weights[0]) < 1e-4  # AdamW turns the last bits into steps


def test_clipping_twice_is_refused_where_the_optimizer_still_scales():
    plugin = GradUtilsPlugin(num_steps=1, fold_into_optimizer=True)

    def clip_again(loop):
        if loop.losses:  # the first step was clipped once
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

    with pytest.raises(InvalidArgumentError, match="clipped once per window with fold_into_optimizer=True"):
        run_loop(
            HEAD, "one_rank", 1, batch_size=4, plugin=plugin, optimizer=FUSED, max_norm=1.0, after_backward=clip_again
        )
