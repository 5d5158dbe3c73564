"""A gradient that is not finite anywhere: every rank takes the same decision, and a bad step changes nothing."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import Counters, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from tests.harness.gradients import relative_error
from tests.harness.layouts import LAYOUTS, run
from tests.harness.trainer_cases import train

HEAD = "llama causal"
WHERE = "model.layers.1.mlp.up_proj.weight"


def spoil(model, value):
    """One element of one gradient, on the last rank only."""
    if dist.is_initialized() and dist.get_rank() != dist.get_world_size() - 1:
        return
    gradient = dict(model.named_parameters())[WHERE].grad
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local.view(-1)[0] = value


class Spoiled(GradUtilsTrainer):
    """The gradients of some windows are bad, as if a kernel had gone wrong."""

    bad_windows = (2,)
    value = math.nan
    num_windows = 0

    def _clip_grad_norm(self, model):
        self.num_windows += 1
        if self.num_windows in self.bad_windows:
            spoil(self.model, self.value)
        return super()._clip_grad_norm(model)


class SpoiledByInf(Spoiled):
    value = math.inf


class SpoiledFromTheSecond(Spoiled):
    bad_windows = range(2, 100)


class States(TrainerCallback):
    """What there is after every step."""

    def __init__(self):
        self.weights = []
        self.moments = []
        self.epochs = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.weights.append({n: _whole(p) for n, p in model.named_parameters()})
        self.moments.append(_moments(optimizer))
        self.epochs.append(lr_scheduler.last_epoch)


def _whole(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().double()


def _moments(optimizer):
    states = optimizer.state_dict()["state"].values()
    return [float(value.sum()) for state in states for value in state.values() if isinstance(value, torch.Tensor)]


FUSED = {"optim": "adamw_torch_fused"}
"""Skips on the device."""
PLAIN = {"optim": "adamw_torch"}
"""Cannot: the host reads a flag."""
COMMON = {
    "max_grad_norm": 1.0,
    "max_steps": 4,
    "lr_scheduler_type": "linear",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
}


def train_spoiled(layout, trainer_class, arguments, **kwargs):
    states = States()
    trainer = None

    class Seen(trainer_class):
        def __init__(self, *args, **kwargs):
            nonlocal trainer
            trainer = self
            super().__init__(*args, **kwargs)
            self.add_callback(states)

    error = None
    try:
        train(HEAD, 2, layout=layout, trainer_class=Seen, arguments=COMMON | arguments, **kwargs)
    except NonfiniteGradientError as caught:
        error = caught
    return trainer, states, error


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2", "tp2"])
@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_a_bad_step_raises_everywhere_and_changes_nothing(optimizer, layout):
    run(_raises, layout, FUSED if optimizer == "fused" else PLAIN)


def _raises(layout, arguments):
    for spoiled in (Spoiled, SpoiledByInf):
        trainer, states, error = train_spoiled(layout, spoiled, arguments | {"logging_steps": 100})
        last = LAYOUTS[layout].num_ranks - 1
        assert error is not None
        assert error.step == 2
        assert error.parameters == {last: [WHERE]}
        assert f"step 2: the gradient is inf or NaN in rank {last}: {WHERE} (losses: all finite" in str(error)
        assert "on_nonfinite='skip'" in str(error)
        assert len(error.losses) == last + 1
        assert all(len(losses) == 2 for losses in error.losses.values())
        now = {n: _whole(p) for n, p in trainer.model.named_parameters()}
        assert same(now, states.weights[0])
        assert _moments(trainer.optimizer) == states.moments[0]
        assert trainer.lr_scheduler.last_epoch == 1
        assert trainer.state.global_step == 1
        assert [g["lr"] for g in trainer.optimizer.param_groups] == trainer.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_a_bad_step_is_left_out_and_the_next_are_taken(optimizer, layout):
    run(_skips, layout, FUSED if optimizer == "fused" else PLAIN)


def _skips(layout, arguments):
    plugin = GradUtilsPlugin(on_nonfinite="skip")
    trainer, states, error = train_spoiled(layout, Spoiled, arguments, grad_plugin=plugin)
    assert error is None
    assert same(states.weights[1], states.weights[0])
    assert states.moments[1] == states.moments[0]
    assert not same(states.weights[2], states.weights[1])
    assert states.epochs == [1, 1, 2, 3], "the scheduler holds"
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 1, 1]
    assert [math.isfinite(entry["loss"]) for entry in entries] == [True, False, True, True]
    assert math.isnan(entries[1]["grad_norm"])
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_the_mean_loss_over_several_steps_is_that_of_the_steps_taken():
    plugin = GradUtilsPlugin(on_nonfinite="skip")
    each, _, _ = train_spoiled("one_rank", Spoiled, PLAIN, grad_plugin=plugin)
    whole, _, _ = train_spoiled("one_rank", Spoiled, PLAIN | {"logging_steps": 4}, grad_plugin=plugin)
    losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
    assert whole.state.log_history[0]["loss"] == pytest.approx((losses[0] + losses[2] + losses[3]) / 3, rel=1e-6)


@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_too_many_in_a_row_raise(layout):
    run(_too_many, layout)


def _too_many(layout):
    plugin = GradUtilsPlugin(on_nonfinite="skip", max_skipped_steps=1)
    _, states, error = train_spoiled(layout, SpoiledFromTheSecond, FUSED, grad_plugin=plugin)
    assert "2 steps in a row had no finite gradient (max_skipped_steps=1); the last: step 3" in str(error)
    assert len(states.weights) == 2


def test_ignoring_takes_the_step():
    trainer, states, error = train_spoiled(
        "one_rank", Spoiled, FUSED, grad_plugin=GradUtilsPlugin(on_nonfinite="ignore")
    )
    assert error is None
    assert states.weights[1][WHERE].isnan().any()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in losses] == [False, False, True, True], "and the log shows what came of it"


def test_control_the_stock_trainer_has_nan_weights_under_a_clean_looking_loss():
    class Stock(Trainer):
        num_windows = 0

        def _clip_grad_norm(self, model):
            self.num_windows += 1
            if self.num_windows == 2:
                spoil(self.model, math.nan)
            return super()._clip_grad_norm(model)

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


@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_after_a_bad_step_the_same_trainer_trains_on(layout):
    run(_trains_on, layout)


def _trains_on(layout):
    trainer, _, error = train_spoiled(layout, Spoiled, FUSED)
    assert error is not None
    trainer.num_windows = 10  # no more bad ones
    assert trainer.train().global_step == 4
    assert all(_whole(p).isfinite().all() for p in trainer.model.parameters())


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


# ---- Norms of groups ----


@pytest.mark.parametrize("layout", ["one_rank", "fsdp2x2"])
def test_the_norms_of_layers_are_logged_and_combine_to_the_total(layout):
    run(_groups, layout)


def _groups(layout):
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


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_fused_optimizer_that_scales_takes_the_same_steps(layout):
    run(_folds, layout)


def _folds(layout):
    results = [train_folded(layout, fold, {"max_grad_norm": 0.3})[0] for fold in (True, False)]
    assert max(float((a - b).abs().max()) for a, b in zip(*map(dict.values, results), strict=True)) < 1e-6


def train_folded(layout, fold, arguments, **kwargs):
    """Without anything that looks at gradients before the step."""
    built = []

    class Untapped(kwargs.pop("trainer_class", GradUtilsTrainer)):
        def __init__(self, *args, callbacks=None, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    kwargs["grad_plugin"] = GradUtilsPlugin(fold_into_optimizer=fold, **kwargs.pop("settings", {}))
    train(HEAD, 2, layout=layout, trainer_class=Untapped, arguments=COMMON | FUSED | arguments, **kwargs)
    (trainer,) = built
    assert not hasattr(trainer.optimizer.optimizer, "grad_scale")
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")
    return {n: _whole(p) for n, p in trainer.model.named_parameters()}, trainer


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


class LosesItsKernel(TrainerCallback):
    """As loading a checkpoint of an optimizer that was not fused does."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["fused"] = False


def test_an_optimizer_that_is_not_fused_any_more_is_refused():
    class Losing(GradUtilsTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(LosesItsKernel())

    with pytest.raises(InvalidArgumentError, match="AdamW is not fused in every parameter group"):
        train_folded("one_rank", True, {}, trainer_class=Losing)


def test_folding_under_a_callback_that_looks_at_gradients_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"GradientTap.on_pre_optimizer_step would see"):
        train(HEAD, 2, grad_plugin=GradUtilsPlugin(fold_into_optimizer=True), arguments=FUSED)


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
