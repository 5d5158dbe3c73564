"""Loops that drop, keep or share gradients: as torch alone with the whole batch, or an error before a step."""

import copy
import functools

import pytest
import torch
from torch import nn

from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from tests.harness.layouts import on_layouts
from tests.harness.user_loops import Clamped, Constant, Sign, alone, are_close, nets, play, sgd, square

SEVERAL = pytest.mark.parametrize(("layout", "accumulation"), [("one_rank", 2), ("ddp2", 1), ("ddp2", 2)])
SINGLE_AND_SEVERAL = pytest.mark.parametrize(
    ("layout", "accumulation"), [("one_rank", 1), ("one_rank", 2), ("ddp2", 1), ("ddp2", 2)]
)


# ---- Gradients dropped between two losses of a micro-batch ----

DROP = {
    "to none": lambda model, optimizer: model.zero_grad(set_to_none=True),
    "to zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by the optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "kept": lambda model, optimizer: None,
}


def sam(backward, drop, model, x, y):
    backward(square(model, x, y))
    parameters = list(model.parameters())
    old = [p.detach().clone() for p in parameters]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    with torch.no_grad():
        for p in parameters:
            p += 0.2 * p.grad / norm
        drop()
    backward(square(model, x, y))
    with torch.no_grad():
        for p, was in zip(parameters, old, strict=True):
            p.copy_(was)


def attack(backward, drop, model, x, y):
    for _ in range(2):
        x = x.detach().requires_grad_()
        backward(square(model, x, y))
        x = x + 0.1 * x.grad.sign()
        drop()
    backward(square(model, x.detach(), y))


def project(backward, drop, model, x, y):
    """Two tasks, whose gradients are taken apart and put together by hand."""
    backward(square(model, x, y))
    first = [p.grad.clone() for p in model.parameters()]
    drop()
    backward(square(model, -x, 2.0))
    for p, g in zip(model.parameters(), first, strict=True):
        p.grad += g - (g * p.grad).sum().clamp(max=0) / p.grad.square().sum() * p.grad


def dropping(accelerator, batches, models, user, drop):
    model, optimizer = nn.Sequential(*models[:2]), sgd(*models[:2])
    model, optimizer = accelerator.prepare(model, optimizer)
    for window in range(2):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                backward = functools.partial(accelerator.backward, num_targets=len(x))
                user(backward, functools.partial(DROP[drop], model, optimizer), model, x, y)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.wide
@pytest.mark.parametrize("user", [sam, attack, project])
@pytest.mark.parametrize("counts", ["auto", "streamed", "first"])
@on_layouts("one_rank", "ddp2")
def test_gradients_that_are_dropped_count_for_nothing(layout, counts, user):
    kept, _ = alone(dropping, user, "kept")
    for drop in ("to none", "to zeros", "by the optimizer"):
        want, truth = alone(dropping, user, drop)
        assert not are_close(want, kept), "control"
        if user is project and not (counts == "first" or (counts == "auto" and layout == "one_rank")):
            with pytest.raises(TargetCountError, match=r"by hand.*counts='first'"):
                play(dropping, layout, 1, user, drop, counts=counts)
            continue
        got, accelerator = play(dropping, layout, 1, user, drop, counts=counts)
        assert are_close(got, want)
        assert accelerator.report.num_targets == 12
        assert float(accelerator.report.loss) == pytest.approx(truth.loss, rel=1e-9), "of the last one"


# ---- Parameters of no model in the window ----


def with_a_stranger(accelerator, batches, models, kind, order):
    model, stranger, _ = models
    optimizers = [sgd(model, stranger)] if kind == "one optimizer" else [sgd(model), sgd(stranger)]
    model, optimizers[0] = accelerator.prepare(model, optimizers[0])
    if kind in ("prepared model", "as advised"):
        stranger = accelerator.prepare(stranger)
    if kind not in ("not prepared", "one optimizer"):
        optimizers[1] = accelerator.prepare(optimizers[1])
    trained = (model, stranger) if kind == "as advised" else (model,)
    for window in range(2):
        for x, y, _ in batches(window):
            with accelerator.accumulate(*trained):
                accelerator.backward((stranger(torch.tanh(model(x))) - y).square().mean(), num_targets=len(x))
                for optimizer in optimizers[::order]:
                    optimizer.step()
                for optimizer in optimizers:
                    optimizer.zero_grad()


KINDS = ["prepared", "prepared model", "not prepared", "one optimizer"]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", [*KINDS, "as advised"])
def test_parameters_of_no_model_are_trained_in_one_micro_batch_on_one_process(kind, order):
    assert are_close(play(with_a_stranger, "one_rank", 1, kind, order)[0], alone(with_a_stranger, kind, order)[0])


@pytest.mark.parametrize("order", [1, -1])
@SEVERAL
@on_layouts()
def test_elsewhere_nothing_steps_on_them(layout, accumulation, order):
    for kind in KINDS:
        models = nets()
        before = copy.deepcopy(models[1])
        error = InvalidArgumentError if kind == "one optimizer" else TargetCountError
        with pytest.raises(error, match=r"no model .*accelerator\.accumulate\(model, that_module\)"):
            play(with_a_stranger, layout, accumulation, kind, order, models=models)
        assert are_close([models[1]], [before]), kind


@SEVERAL
@on_layouts()
def test_as_the_error_advises_they_are_exact(layout, accumulation):
    want, _ = alone(with_a_stranger, "as advised", 1)
    assert are_close(play(with_a_stranger, layout, accumulation, "as advised", 1)[0], want)


# ---- Backwards of the user's own that are not linear ----


def not_linear(accelerator, batches, models, function):
    model, optimizer = accelerator.prepare(nn.Sequential(*models[:2]), sgd(*models[:2]))
    for window in range(2):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                loss = (function.apply(model(x)) - y).square().mean()
                accelerator.backward(loss, num_targets=len(x))
                accelerator.clip_grad_norm_(model.parameters(), 100.0)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("function", [Constant, Clamped, Sign])
def test_a_backward_that_is_not_linear_gets_the_gradient_of_the_mean(function):
    want, _ = alone(not_linear, function)
    for counts in ("auto", "first"):
        assert are_close(play(not_linear, "one_rank", 1, function, counts=counts)[0], want)
    assert not are_close(play(not_linear, "one_rank", 1, function, counts="streamed")[0], want), "control"


# ---- Two models that share a part ----


def sharing(accelerator, batches, models, how):
    encoder, head_a, head_b = models
    a, b = nn.Sequential(encoder, head_a), nn.Sequential(encoder, head_b)
    optimizer = sgd(a, b)
    a, b, optimizer = accelerator.prepare(a, b, optimizer)
    for window in range(4):
        parts = batches(window)
        if how == "each, started":
            accelerator.start_window(sum(len(x) for x, _, _ in parts), model=a)
            accelerator.start_window(sum(len(z) for _, _, z in parts), model=b)
        for x, y, z in parts:
            with accelerator.accumulate(a, b):
                if how == "summed":
                    accelerator.backward(square(a, x, y) + square(b, x), num_targets=len(x), model=[a, b])
                if how.startswith("each") or (how == "by turns" and window % 2 == 0):
                    accelerator.backward(square(a, x, y), num_targets=len(x), model=a)
                if how.startswith("each") or (how == "by turns" and window % 2 == 1):
                    accelerator.backward(square(b, z), num_targets=len(z), model=b)
                optimizer.step()
                optimizer.zero_grad()


@SEVERAL
@on_layouts()
def test_losses_of_models_that_share_a_part_are_refused_with_advice(layout, accumulation):
    models = nets()
    with pytest.raises(InvalidArgumentError, match=r"model=\[a, b\].*counts='first'"):
        play(sharing, layout, accumulation, "each", models=models)
    assert are_close(models, nets())


@SINGLE_AND_SEVERAL
@on_layouts()
def test_as_advised_or_by_turns_models_that_share_a_part_are_exact(layout, accumulation):
    how = "each" if accumulation == 1 else "each, started"
    assert are_close(play(sharing, layout, accumulation, how, counts="first")[0], alone(sharing, "each")[0])
    for how in ("summed", "by turns"):
        assert are_close(play(sharing, layout, accumulation, how)[0], alone(sharing, how)[0]), how
    if (layout, accumulation) == ("one_rank", 1):
        assert are_close(play(sharing, layout, 1, "each")[0], alone(sharing, "each")[0])


# ---- An optimizer that steps every other window ----


def two_cadences(accelerator, batches, models, starts, ending):
    model, optimizers = nn.Sequential(*models[:2]), [sgd(models[0]), sgd(models[1])]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    for window in range(4):
        parts = batches(window)
        if starts:
            accelerator.start_window(sum(len(x) for x, _, _ in parts))
        for x, y, _ in parts:
            with accelerator.accumulate(model):
                accelerator.backward(square(model, x, y), num_targets=len(x))
                for optimizer in optimizers if window % 2 else optimizers[:1]:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=ending != "zeros")
                if ending == "all dropped" and accelerator.sync_gradients:
                    model.zero_grad(set_to_none=False)


@SINGLE_AND_SEVERAL
@on_layouts()
def test_gradients_kept_over_a_window_add_up_where_they_are_final(layout, accumulation):
    for ending in ("none", "zeros"):
        want, _ = alone(two_cadences, False, ending)
        assert not are_close(want, alone(two_cadences, False, "all dropped")[0]), "control"
        assert are_close(play(two_cadences, layout, accumulation, accumulation > 1, ending, counts="first")[0], want)
        if (layout, accumulation) == ("one_rank", 1):
            assert are_close(play(two_cadences, layout, 1, False, ending)[0], want)


@SEVERAL
@on_layouts()
def test_sums_kept_over_a_window_are_refused_and_zeros_are_not(layout, accumulation):
    for ending in ("none", "zeros"):
        with pytest.raises(TargetCountError, match=r"gradients of an earlier step are there still.*call zero_grad"):
            play(two_cadences, layout, accumulation, False, ending)
    want, _ = alone(two_cadences, False, "all dropped")
    assert are_close(play(two_cadences, layout, accumulation, False, "all dropped")[0], want)
