"""fp16's loss scale over gradients of any layouts: unscaled side by side; an overflow skips the step everywhere."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_gradutils import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.dtensor import local_tensor
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.half_cases import with_scaler
from tests.harness.layouts import on_layouts
from tests.harness.tiny_net import (
    data_rank,
    make_batch,
    make_net,
    parallelize,
    summed_loss,
    sync_plain_gradients,
    true_mean_gradient,
)
from tests.harness.trainer_cases import reset_accelerate

MIXED = ("plain_beside_fsdp2x2", "two_meshes2x2", "tp2_fsdp2x2", "fsdp2x2", "tp2")


def backward_once(layout, mesh):
    """The model, its accelerator and its optimizer, with gradients under a loss scale of 1024."""
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    with_scaler(accelerator)
    model = parallelize(make_net(torch.float32), layout, mesh)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    index, size = data_rank(mesh)
    x, y, mask = (part.tensor_split(size)[index] for part in make_batch())
    num_targets = mask.sum()
    loss = summed_loss(model, x.float(), y.float(), mask) / num_targets
    accelerator.backward(loss, num_targets=num_targets, model=model)
    sync_plain_gradients(model, layout, mesh)
    return model, accelerator, optimizer


@on_layouts(*MIXED)
def test_gradients_of_any_layouts_are_unscaled_side_by_side(layout, mesh):
    model, accelerator, optimizer = backward_once(layout, mesh)
    accelerator.windows.of_loss(model).sums._num_replicas = 2 if layout in ("tp2", "tp2_fsdp2x2") else 1
    accelerator.clip_grad_norm_(model.parameters(), math.inf)
    assert relative_error(whole_gradients(model), true_mean_gradient()) < 1e-5
    optimizer.step()
    assert not accelerator.optimizer_step_was_skipped


@on_layouts(*MIXED)
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout, mesh):
    model, accelerator, optimizer = backward_once(layout, mesh)
    if dist.get_rank() == 1:
        local_tensor(model.down.weight.grad)[0, 0] = math.inf
    before = [local_tensor(p.detach()).clone() for p in model.parameters()]
    optimizer.step()
    after = [local_tensor(p.detach()) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert accelerator.optimizer_step_was_skipped
    optimizer.zero_grad()
    accelerator.windows.loss_scale.update()
    assert accelerator.scaler.get_scale() == 512.0


@on_layouts("plain_beside_fsdp2x2")
def test_control_torchs_scaler_takes_no_plain_gradient_beside_a_sharded_one(layout, mesh):
    _, accelerator, optimizer = backward_once(layout, mesh)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        accelerator.scaler.unscale_(optimizer.optimizer)


def test_a_backward_after_its_optimizers_gradients_were_unscaled_is_refused():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    with_scaler(accelerator)
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second, optimizer = accelerator.prepare(a, b, torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1))
    x = torch.ones(1, 2)
    accelerator.backward(second(x).sum(), num_targets=1, model=second)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.backward(first(x).sum(), num_targets=1, model=first)
    accelerator.clip_grad_norm_(first.parameters(), 1.0)
    with pytest.raises(InvalidArgumentError, match="gradients of this step had been unscaled"):
        accelerator.backward(second(x).sum(), num_targets=1, model=second)


def test_a_parameter_of_no_model_is_refused_under_a_scaler_too():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_steps=2)
    with_scaler(accelerator)
    model, stranger = nn.Linear(3, 1), nn.Parameter(torch.ones(()))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([*model.parameters(), stranger], lr=0.1))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward((model(torch.ones(2, 3)) * stranger).mean(), num_targets=2)
    with pytest.raises(InvalidArgumentError, match="the first of shape"):
        optimizer.step()
    assert stranger.item() == 1
