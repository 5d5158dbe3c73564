"""Several models, losses and optimizers under one GradUtilsAccelerator, and one loss scale for all of them."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from tests.harness.gradients import norm_of, relative_error, whole_gradients
from tests.harness.half_cases import with_scaler
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.trainer_cases import reset_accelerate

TOLERANCE = 1e-5


def regression(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def points(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, generator=generator) for count in counts]


def mean_square(model, x):
    return model(x).square().mean(1).mean()


def true_gradients(models, loss_of, parts):
    """The gradient of the mean over all rows, per model; the models are in float64 afterwards."""
    for model in models:
        model.double()
    sum(loss_of(*models, part.double()) * len(part) for part in parts).div(sum(map(len, parts))).backward()
    return [{name: p.grad for name, p in model.named_parameters()} for model in models]


def prepare(*models, num_steps=1):
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=GradUtilsPlugin(num_steps=num_steps))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    return accelerator, prepared[: len(models)], prepared[len(models) :]


def assert_took_a_step(model, before, gradients):
    for p, was, gradient in zip(model.parameters(), before, gradients.values(), strict=True):
        torch.testing.assert_close(p.double(), was.double() - 0.1 * gradient, rtol=1e-5, atol=1e-6)


@on_layouts("one_rank", "ddp2")
def test_two_models_with_a_loss_each_have_a_window_each(layout):
    counts = [(1, 6), (5, 2), (3, 3), (4, 1)]  # rows of (the first loss, the second), in each micro-batch
    num_ranks = LAYOUTS[layout].num_ranks
    rank = dist.get_rank() if num_ranks > 1 else 0
    first, second = (points(seed, [c[seed] for c in counts]) for seed in (0, 1))
    want = [true_gradients([regression(seed)], mean_square, parts)[0] for seed, parts in enumerate((first, second))]
    accelerator, (a, b), (step_a, step_b) = prepare(regression(0), regression(1), num_steps=len(counts) // num_ranks)
    for x, y in list(zip(first, second, strict=True))[rank::num_ranks]:
        with accelerator.accumulate(a, b):
            accelerator.backward(mean_square(a, x), num_targets=len(x), model=a)
            step_a.step()
            accelerator.backward(mean_square(b, y), num_targets=len(y), model=b)
            if accelerator.sync_gradients:
                total = accelerator.clip_grad_norm_(b.parameters(), math.inf)
            step_b.step()
    for model, gradients in zip((a, b), want, strict=True):
        assert relative_error(whole_gradients(model), gradients) < TOLERANCE
    assert float(total) == pytest.approx(norm_of(want[1]), rel=TOLERANCE)


def test_a_loss_that_trains_two_models_with_an_optimizer_each():
    parts = points(3, [1, 5, 2])

    def both(a, b, x):
        return b(torch.nn.functional.pad(a(x), (0, 1))).square().mean(1).mean()

    want = true_gradients([regression(0), regression(1)], both, parts)
    accelerator, (a, b), steps = prepare(regression(0), regression(1), num_steps=3)
    before = [[p.detach().clone() for p in model.parameters()] for model in (a, b)]
    for part in parts:
        with accelerator.accumulate(a, b):
            accelerator.backward(both(a, b, part), num_targets=len(part))
            for optimizer in steps:
                optimizer.step()
    for model, old, gradients in zip((a, b), before, want, strict=True):
        assert relative_error(whole_gradients(model), gradients) < TOLERANCE
        assert_took_a_step(model, old, gradients)


def test_two_losses_of_one_window_are_refused():
    accelerator, (a, b), (step_a, _) = prepare(regression(0), regression(1))
    (x,) = points(0, [4])
    with accelerator.accumulate(a, b):
        accelerator.backward(mean_square(a, x), num_targets=4)
        step_a.step()
        with pytest.raises(InvalidArgumentError, match="say which"):
            accelerator.backward(mean_square(b, x), num_targets=4)
    with pytest.raises(InvalidArgumentError, match="which of the 2 prepared models"):
        accelerator.backward(mean_square(a, x), num_targets=4)


def test_parameters_of_no_model_are_refused():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_steps=2)
    model, scale = regression(0), nn.Parameter(torch.ones(()))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([*model.parameters(), scale], lr=0.1))
    (x,) = points(0, [4])
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(mean_square(model, x) * scale, num_targets=4)
    with pytest.raises(InvalidArgumentError, match="also steps on 1 parameters of no model"):
        optimizer.step()
    assert scale.item() == 1


def test_without_the_number_of_targets_it_says_what_to_pass():
    accelerator, (model,), _ = prepare(regression(0))
    (x,) = points(0, [4])
    with pytest.raises(TargetCountError, match=r"num_targets=\(labels != -100\)"):
        accelerator.backward(mean_square(model, x))
    for bad in (torch.ones(4), -1, "four", True):
        with pytest.raises(InvalidArgumentError, match="num_targets must be one number"):
            accelerator.backward(mean_square(model, x), num_targets=bad)


def test_a_closure_is_refused():
    _, _, (optimizer,) = prepare(regression(0))
    with pytest.raises(InvalidArgumentError, match="takes no closure"):
        optimizer.step(lambda: None)


# ---- fp16 ----


def test_optimizers_that_share_a_scaler_step_on_gradients_of_one_scale():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_steps=2)
    with_scaler(accelerator)
    accelerator.scaler.set_growth_interval(1)  # it changes at every update
    models = [regression(0), regression(1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    a, b, step_a, step_b = accelerator.prepare(*models, *optimizers)
    for parts in (points(5, [1, 6]), points(6, [3, 2])):
        want = [true_gradients([copy_of(model)], mean_square, parts)[0] for model in (a, b)]
        for part in parts:
            with accelerator.accumulate(a, b):
                accelerator.backward(mean_square(a, part) + mean_square(b, part), num_targets=len(part))
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients()  # allowed, as in accelerate
                    accelerator.clip_grad_norm_([*a.parameters(), *b.parameters()], math.inf)
                    for model, gradients in zip((a, b), want, strict=True):
                        assert relative_error(whole_gradients(model), gradients) < TOLERANCE
                before = [[p.detach().clone() for p in model.parameters()] for model in (a, b)]
                step_a.step()
                step_b.step()
                step_a.zero_grad()
                step_b.zero_grad()
        for model, old, gradients in zip((a, b), before, want, strict=True):
            assert_took_a_step(model, old, gradients)
    assert accelerator.scaler.get_scale() == 2048.0, "it grew once, between the windows"


def copy_of(model):
    copy = regression(0)
    copy.load_state_dict(model.state_dict())
    return copy


def test_an_overflow_skips_the_step_and_the_scheduler_holds():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    with_scaler(accelerator, init_scale=2.0**127)
    model = regression(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    before = [p.detach().clone() for p in model.parameters()]
    (x,) = points(0, [4])
    accelerator.backward(1e6 * mean_square(model, x), num_targets=4)
    optimizer.step()
    scheduler.step()
    assert accelerator.optimizer_step_was_skipped
    assert scheduler.get_last_lr() == [0.1]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    accelerator.backward(mean_square(model, x), num_targets=4)
    assert accelerator.scaler.get_scale() < 2.0**127, "lowered for the next window"
