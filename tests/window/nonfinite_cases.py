"""Trainings in which some gradients are not finite, also where the optimizer scales; for CPU and GPU."""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import NonfiniteGradientError
from tests.harness.layouts import LAYOUTS
from tests.harness.trainer_cases import train

HEAD = "llama causal"
WHERE = "model.layers.1.mlp.up_proj.weight"
FUSED = {"optim": "adamw_torch_fused"}
"""Skips on the device."""
PLAIN = {"optim": "adamw_torch"}
"""Cannot: the host reads a flag."""
BASE = {"max_grad_norm": 1.0, "max_steps": 4, "lr_scheduler_type": "linear", "learning_rate": 0.01, "weight_decay": 0.1}


def spoil(model, value):
    """Change one element of one gradient, on the last rank only."""
    if dist.is_initialized() and dist.get_rank() != dist.get_world_size() - 1:
        return
    gradient = dict(model.named_parameters())[WHERE].grad
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local.view(-1)[0] = value


class Spoils:
    """Makes the gradients of some windows bad, as if a kernel had gone wrong."""

    bad_windows = (2,)
    value = math.nan
    num_windows = 0

    def _clip_grad_norm(self, model):
        self.num_windows += 1
        if self.num_windows in self.bad_windows:
            spoil(self.model, self.value)
        return super()._clip_grad_norm(model)


class Spoiled(Spoils, GradUtilsTrainer):
    pass


class SpoiledByInf(Spoiled):
    value = math.inf


class States(TrainerCallback):
    """Weights, moments of the optimizer and the scheduler's epoch after every step."""

    def __init__(self):
        self.weights, self.moments, self.epochs = [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.weights.append({n: whole(p) for n, p in model.named_parameters()})
        self.moments.append(moments_of(optimizer))
        self.epochs.append(lr_scheduler.last_epoch)


def whole(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().double()


def moments_of(optimizer):
    states = optimizer.state_dict()["state"].values()
    return [float(value.sum()) for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def train_spoiled(layout, trainer_class, arguments, **kwargs):
    """The Trainer, its states and the error, if there was one."""
    states, trainer, error = States(), None, None

    class Seen(trainer_class):
        def __init__(self, *args, **kwargs):
            nonlocal trainer
            trainer = self
            super().__init__(*args, **kwargs)
            self.add_callback(states)

    try:
        train(HEAD, 2, layout=layout, trainer_class=Seen, arguments=BASE | arguments, **kwargs)
    except NonfiniteGradientError as caught:
        error = caught
    return trainer, states, error


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def check_a_bad_step_raises(layout, arguments):
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
        now = {n: whole(p) for n, p in trainer.model.named_parameters()}
        assert same(now, states.weights[0])
        assert moments_of(trainer.optimizer) == states.moments[0]
        assert trainer.lr_scheduler.last_epoch == 1
        assert trainer.state.global_step == 1
        assert [g["lr"] for g in trainer.optimizer.param_groups] == trainer.lr_scheduler.get_last_lr()


def check_a_bad_step_is_left_out(layout, arguments):
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


def train_folded(layout, fold, arguments, settings=None, **kwargs):
    """The weights and the Trainer; without anything that looks at gradients before the step."""
    plugin = GradUtilsPlugin(fold_into_optimizer=fold, **settings or {})
    arguments = BASE | FUSED | arguments
    trainer, _ = train(HEAD, 2, layout=layout, arguments=arguments, grad_plugin=plugin, taps=False, **kwargs)
    assert not hasattr(trainer.optimizer.optimizer, "grad_scale")
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")
    return {n: whole(p) for n, p in trainer.model.named_parameters()}, trainer
