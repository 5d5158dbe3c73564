"""Parameters in bfloat16: many micro-batches accumulate in float32, and optimizers get bfloat16."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from benchmarks.exactness.accumulation import gradient_error, truth_of_rounded_weights
from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.accelerator._half_precision import HalfParameters, accumulates_in_float32
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.sync import communicates
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.layouts import on_layouts
from tests.harness.tiny_net import make_batch, make_net, parallelize, summed_loss
from tests.harness.trainer_cases import make_data, make_model, reset_accelerate, train


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_many_micro_batches_lose_nothing_where_they_accumulate_in_float32(layout):
    narrow, wide = (gradient_error("vit images", layout, 64, 1, is_wide).error for is_wide in (False, True))
    assert wide < 0.8 * narrow
    assert wide < 0.01


@on_layouts("tp2")
def test_nor_do_they_under_tensor_parallelism(layout, mesh):
    x, y, mask = make_batch(64)
    errors = []
    for is_wide in (False, True):
        model = parallelize(make_net(torch.bfloat16), layout, mesh)
        half = HalfParameters.of(model)
        assert len(half.others) == 10
        for row in range(64):
            if is_wide:
                half.begin(communicates("defer", is_last=row == 63), is_last=row == 63)
            part = slice(row, row + 1)
            summed_loss(model, x[part], y[part], mask[part]).backward()
        half.round()
        assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
        truth = make_net(torch.bfloat16).double()
        summed_loss(truth, x, y, mask).backward()
        errors.append(relative_error(whole_gradients(model), {name: p.grad for name, p in truth.named_parameters()}))
    narrow, wide = errors
    assert wide < 0.7 * narrow
    assert wide < 0.01


def test_it_is_so_from_32_micro_batches_on_unless_something_else_is_said():
    assert [accumulates_in_float32("auto", n) for n in (1, 31, 32)] == [False, False, True]
    assert accumulates_in_float32(True, 1)
    assert not accumulates_in_float32(False, 1000)
    with pytest.raises(InvalidArgumentError, match="accumulate_in_float32 must be True, False or 'auto', got 'always'"):
        GradUtilsPlugin(accumulate_in_float32="always")


class Dtypes(TrainerCallback):
    """Asserts the dtype of gradients at each step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


@pytest.mark.parametrize("sync", ["defer", "every"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_optimizers_get_gradients_of_the_parameters_dtype_window_after_window(layout, sync, fused):
    head = "bert classes"
    trainer, tap = train(
        head,
        4,
        layout=layout,
        model=make_model(head).bfloat16(),
        grad_plugin=GradUtilsPlugin(accumulate_in_float32=True, sync=sync, fold_into_optimizer=fused),
        callback=None if fused else Dtypes(),
        arguments={"optim": "adamw_torch_fused" if fused else "adamw_torch", "max_steps": 3, "learning_rate": 1e-3},
        taps=not fused,
    )
    assert {p.grad_dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    if not fused:
        want = truth_of_rounded_weights(head, make_data(head))
        assert relative_error(tap.steps[0], want) < 0.03


def test_gradients_that_are_kept_as_zeros_become_wide_again():
    layer = nn.Linear(3, 3).bfloat16()
    half = HalfParameters.of(layer)
    for _ in range(2):
        for is_last in (False, True):
            half.begin(communicates("defer", is_last=is_last), is_last=is_last)
            layer(torch.ones(1, 3).bfloat16()).sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        half.round()
        assert layer.weight.grad.dtype == torch.bfloat16
        assert torch.equal(layer.weight.grad, torch.full((3, 3), 2.0).bfloat16())
        layer.zero_grad(set_to_none=False)


def test_a_window_of_one_micro_batch_is_left_alone():
    layer = nn.Linear(3, 3).bfloat16()
    half = HalfParameters.of(layer)
    half.begin(communicates("defer", is_last=True), is_last=True)
    layer(torch.ones(1, 3).bfloat16()).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


class Interrupted(GradUtilsTrainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        assert {p.grad_dtype for p in self.model.parameters()} == {torch.float32}
        raise KeyboardInterrupt


def test_a_training_that_was_interrupted_leaves_parameters_to_the_next_one():
    head = "bert classes"
    model = make_model(head).bfloat16()
    plugin = GradUtilsPlugin(accumulate_in_float32=True)
    with pytest.raises(KeyboardInterrupt):
        train(head, 4, model=model, trainer_class=Interrupted, grad_plugin=plugin)
    assert {p.grad_dtype for p in model.parameters()} == {torch.bfloat16}
    model.zero_grad()
    train(head, 1, model=model, trainer_class=Trainer, arguments={"optim": "adamw_torch"})


def test_a_window_that_was_given_up_leaves_parameters_as_they_were():
    reset_accelerate()
    plugin = GradUtilsPlugin(num_steps=4, accumulate_in_float32=True)
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=plugin)
    layer = nn.Linear(3, 3).bfloat16()
    model = accelerator.prepare(layer)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 3).bfloat16()).sum(), num_targets=1)
    assert layer.weight.grad.dtype == torch.float32
    accelerator.discard_window(model)
    assert layer.weight.grad is None
    assert layer.weight.grad_dtype == torch.bfloat16


def test_parameters_in_float32_are_no_matter_of_it():
    half = HalfParameters.of(nn.Linear(3, 3))
    assert not half.averaged + half.sharded + half.others


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.utils.data.DataLoader([1, 2]),
        lambda model: nn.Linear(3, 1),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    ],
    ids=["loader", "model", "optimizer"],
)
def test_what_is_prepared_in_the_middle_of_a_window_does_not_round_its_gradients(make):
    reset_accelerate()
    plugin = GradUtilsPlugin(num_steps=2, accumulate_in_float32=True)
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = accelerator.prepare(nn.Linear(3, 1).bfloat16())
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 3, dtype=torch.bfloat16)).mean(), num_targets=2)
    accelerator.prepare(make(model))
    assert model.weight.grad.dtype == torch.float32
