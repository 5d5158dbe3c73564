"""Settings of a window's end: norms of groups and of other types, and scaling that a fused optimizer does."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import train
from tests.window.nonfinite_cases import FUSED, HEAD, Spoiled, train_folded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nonfinite": "zero"}, r"on_nonfinite must be one of \('raise', 'skip', 'ignore'\), got 'zero'"),
        ({"max_skipped_steps": -1}, "max_skipped_steps must be a whole number"),
        ({"grad_norm_groups": ["a"]}, "grad_norm_groups must be 'layer' or map group names to name patterns"),
        ({"norm_type": 0}, "norm_type must be > 0"),
        ({"ownership": {"*": "split"}}, "must be 'sharded', 'replicated' or a process group"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        GradUtilsPlugin(**arguments)


# ---- Norms ----


@on_layouts("one_rank", "fsdp2x2")
def test_the_norms_of_layers_are_logged_and_combine_to_the_total(layout):
    plugin = GradUtilsPlugin(grad_norm_groups="layer")
    trainer, tap = train(HEAD, 2, layout=layout, grad_plugin=plugin)
    entry = trainer.state.log_history[0]
    norms = {name.removeprefix("grad_norm/"): value for name, value in entry.items() if name.startswith("grad_norm/")}
    assert list(norms) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    assert math.hypot(*norms.values()) == pytest.approx(entry["grad_norm"], rel=1e-6)
    for group, value in norms.items():
        parts = [g.flatten() for name, g in tap.steps[0].items() if name.startswith(f"{group}.")]
        assert value == pytest.approx(torch.cat(parts).norm().item(), rel=1e-6), group


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf])
def test_other_norms_are_logged_and_clipped_to(p):
    _, plain = train(HEAD, 2)
    want = torch.linalg.vector_norm(torch.cat([g.flatten() for g in plain.steps[0].values()]), p).item()
    plugin = GradUtilsPlugin(norm_type=p)
    trainer, tap = train(HEAD, 2, grad_plugin=plugin, arguments={"max_grad_norm": want / 2})
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(want, rel=1e-6)
    assert relative_error(tap.steps[0], {n: g / 2 for n, g in plain.steps[0].items()}) < 1e-5


# ---- Folding ----


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_fused_optimizer_that_scales_takes_the_same_steps(layout):
    results = [train_folded(layout, fold, {"max_grad_norm": 0.3})[0] for fold in (True, False)]
    assert max(float((a - b).abs().max()) for a, b in zip(*map(dict.values, results), strict=True)) < 1e-6


def test_a_bad_step_is_left_out_where_the_optimizer_scales_too():
    with pytest.raises(NonfiniteGradientError, match="step 2"):
        train_folded("one_rank", True, {}, trainer_class=Spoiled)
    weights, trainer = train_folded("one_rank", True, {}, trainer_class=Spoiled, settings={"on_nonfinite": "skip"})
    assert all(w.isfinite().all() for w in weights.values())
    assert trainer.state.log_history[-2]["skipped_steps"] == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch", "rmsprop", "adafactor"])
def test_folding_into_an_optimizer_that_cannot_is_refused_with_the_reason(optimizer):
    with pytest.raises(InvalidArgumentError, match=r"but .* is not .*fused.*; leave out fold_into_optimizer"):
        train_folded("one_rank", True, {"optim": optimizer})


def test_an_optimizer_that_is_not_fused_any_more_is_refused():
    class LosesItsKernel(TrainerCallback):
        """As loading a checkpoint of an optimizer that was not fused does."""

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["fused"] = False

    with pytest.raises(InvalidArgumentError, match="AdamW is not fused in every parameter group"):
        train_folded("one_rank", True, {}, callback=LosesItsKernel())


def test_folding_under_a_callback_that_looks_at_gradients_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"GradientTap.on_pre_optimizer_step would see"):
        train(HEAD, 2, grad_plugin=GradUtilsPlugin(fold_into_optimizer=True), arguments=FUSED)
