"""Loops that touch gradients between the backward and the step: as torch alone with the whole batch, or an error."""

import pytest
import torch
from torch import nn

from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from tests.harness.layouts import on_layouts
from tests.harness.user_loops import Alone, alone, are_close, nets, play, rows_of, sgd, square

EVERYWHERE = pytest.mark.parametrize(
    ("layout", "accumulation"), [("one_rank", 1), ("one_rank", 2), ("ddp2", 1), ("ddp2", 2)]
)


# ---- An optimizer of a part of the model ----


def trains_a_part(accelerator, batches, models, kind):
    body, head, _ = models
    model = nn.Sequential(body, nn.Tanh(), head)
    if kind == "frozen after a backward":
        square(model, torch.ones(2, 4, dtype=torch.float64)).backward()
        body.requires_grad_(False)
        head.zero_grad()
    model, optimizer = accelerator.prepare(model, sgd(head))
    for window in range(3):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                accelerator.backward(square(model, x, y), num_targets=len(x))
                optimizer.step()
                optimizer.zero_grad()


@EVERYWHERE
@on_layouts()
def test_gradients_that_no_optimizer_drops_do_not_matter(layout, accumulation):
    before = nets()
    for kind in ("not frozen", "frozen after a backward"):
        models, _ = play(trains_a_part, layout, accumulation, kind)
        assert are_close(models, alone(trains_a_part, kind)[0]), kind
        assert are_close(models[:1], before[:1])
        assert not are_close(models, before), "control"


# ---- Gradients that are touched before the step ----


def drop_the_last(model):
    for p in model[-1].parameters():
        p.grad = None


def clone(model):
    for p in model.parameters():
        p.grad = p.grad.clone()


def without_nan(model):
    for p in model.parameters():
        p.grad.nan_to_num_(posinf=1e5, neginf=-1e5)


def drop_small_elements(model):
    for p in model.parameters():
        p.grad[p.grad.abs() < 0.2 * p.grad.abs().max()] = 0


def drop_the_smallest_row(model):
    """Of more rows than one can remember, so that those dropped are not among the largest."""
    gradient = model[0].weight.grad
    gradient[gradient.abs().sum(1).argmin()] = 0


def scale_one(model):
    model[0].weight.grad *= 0.1


def centre_one(model):
    model[0].weight.grad -= model[0].weight.grad.mean(1, keepdim=True)


def leave(model):
    pass


def touching(accelerator, batches, models, touch):
    model, optimizer = accelerator.prepare(nn.Sequential(*models), sgd(*models))
    for window in range(3):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                accelerator.backward(square(model, x, y), num_targets=len(x))
                if accelerator.sync_gradients:
                    touch(accelerator.unwrap_model(model))
                optimizer.step()
                optimizer.zero_grad()


def wide():
    torch.manual_seed(3)
    return [nn.Linear(4, 100).double(), nn.Tanh(), nn.Linear(100, 1).double()]


@EVERYWHERE
@on_layouts()
def test_gradients_that_are_dropped_in_part_or_stay_are_exact(layout, accumulation):
    untouched, _ = alone(touching, leave, models=wide())
    for touch in (clone, without_nan, drop_the_last, drop_small_elements, drop_the_smallest_row):
        got, _ = play(touching, layout, accumulation, touch, models=wide())
        assert are_close(got, alone(touching, touch, models=wide())[0]), touch
        assert are_close(got, untouched) == (touch in (clone, without_nan)), "control"


@pytest.mark.parametrize("touch", [scale_one, centre_one])
@on_layouts("one_rank", "ddp2")
def test_one_gradient_that_is_changed_by_hand_is_refused_where_it_is_a_sum(layout, touch):
    models = wide()
    with pytest.raises(TargetCountError, match="gradients have changed"):
        play(touching, layout, 2, touch, models=models)
    assert are_close(models, wide())
    if layout == "one_rank":
        assert are_close(play(touching, layout, 1, touch, models=wide())[0], alone(touching, touch, models=wide())[0])


def rests(accelerator, batches, models):
    """One of two models is not trained in the first window."""
    encoder, decoder, _ = models
    optimizers = [sgd(encoder), sgd(decoder)]
    encoder, decoder, *optimizers = accelerator.prepare(encoder, decoder, *optimizers)
    for window in range(3):
        for x, y, _ in batches(window):
            with accelerator.accumulate(encoder, decoder):
                loss = (decoder(torch.tanh(encoder(x))) - y).square().mean()
                accelerator.backward(loss, num_targets=len(x))
                if accelerator.sync_gradients and window == 0:
                    optimizers[0].zero_grad()
                for optimizer in optimizers[window == 0 :]:
                    optimizer.step()
                for optimizer in optimizers:
                    optimizer.zero_grad()


@EVERYWHERE
@on_layouts()
def test_a_model_whose_gradients_are_dropped_rests(layout, accumulation):
    assert are_close(play(rests, layout, accumulation)[0], alone(rests)[0])


# ---- An update by hand ----


def by_hand(accelerator, batches, models):
    model = accelerator.prepare(nn.Sequential(*models[:2]))
    for window in range(2):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                accelerator.backward(square(model, x, y), num_targets=len(x))
                with torch.no_grad():
                    for p in model.parameters() if accelerator.sync_gradients else ():
                        p -= 0.1 * p.grad
                        p.grad = None


@EVERYWHERE
@on_layouts()
def test_an_update_by_hand_is_exact_where_gradients_are_final_and_else_refused(layout, accumulation):
    if (layout, accumulation) == ("one_rank", 1):
        assert are_close(play(by_hand, layout, 1)[0], alone(by_hand)[0])
        return
    with pytest.raises(TargetCountError, match="as an update by hand does"):
        play(by_hand, layout, accumulation)


# ---- Two losses of a micro-batch ----


def real_and_fake(accelerator, batches, models, inside):
    model, optimizer = accelerator.prepare(nn.Sequential(*models[:2]), sgd(*models[:2]))
    for window in range(2):
        for x, _, _ in batches(window):
            with accelerator.accumulate(model) if inside else torch.enable_grad():
                accelerator.backward(square(model, x, 1.0), num_targets=len(x))
                accelerator.backward(square(model, -x, 0.0), num_targets=len(x))
                optimizer.step()
                optimizer.zero_grad()


@EVERYWHERE
@on_layouts()
def test_two_losses_of_a_micro_batch_add_up(layout, accumulation):
    assert are_close(play(real_and_fake, layout, accumulation, True)[0], alone(real_and_fake, True)[0])
    if accumulation == 1:
        with pytest.raises(InvalidArgumentError, match="another loss of the same batch"):
            play(real_and_fake, layout, 1, False)


# ---- Backwards of the user's own with a gradient of 1 ----


class Shift(torch.autograd.Function):
    """Adds an offset, whose gradient in a mean is 1."""

    @staticmethod
    def forward(ctx, x, offset):
        return x + offset

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.sum().reshape(1)


class AddsALoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offset):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones_like(gradient[0])


class Shifted(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(3)
        self.function, self.layer = function, nn.Linear(4, 1, bias=False).double()
        self.offset = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return self.function.apply(self.layer(x), self.offset)


def averages(accelerator, batches, models):
    """As a critic does: the loss is a mean of what the model returns. All parts have as many rows."""
    model, optimizer = accelerator.prepare(models[0], sgd(models[0]))
    for window in range(2):
        parts = [rows_of(window)[0][:8]]  # so that the gradients add up to 1 without an error of rounding
        if not isinstance(accelerator, Alone):
            ranks = accelerator.num_processes
            parts = parts[0].chunk(ranks * accelerator.gradient_accumulation_steps)[accelerator.process_index :: ranks]
        for x in parts:
            with accelerator.accumulate(model):
                output = model(x)
                loss = output.mean() if models[0].function is Shift else output.square().mean()
                accelerator.backward(loss, num_targets=len(x))
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(("layout", "accumulation"), [("one_rank", 2), ("ddp2", 1), ("ddp2", 2)])
@on_layouts()
def test_a_gradient_of_1_is_no_loss_of_its_own_where_it_is_the_sum_of_what_comes(layout, accumulation):
    want, _ = alone(averages, models=[Shifted(Shift)])
    assert are_close(play(averages, layout, accumulation, models=[Shifted(Shift)])[0], want)
    with pytest.raises(InvalidArgumentError, match="adds a loss with a gradient of 1"):
        play(averages, layout, accumulation, models=[Shifted(AddsALoss)])
