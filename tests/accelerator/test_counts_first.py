"""Several losses in a micro-batch, gradients that are read in the backward, and gradients made without us."""

import logging
import math
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from tests.harness.accelerator_cases import HEAD, TOLERANCE, make
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.trainer_cases import make_data, reset_accelerate, truth

SPREAD = ["one_rank", "ddp2", "fsdp2x2"]


def loop_of(layout, accumulation, **settings):
    rows = make_data(HEAD)
    size = len(rows) // (accumulation * LAYOUTS[layout].num_data_ranks)
    return make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=accumulation, **settings), rows=rows, batch_size=size)


def num_targets_of(loader):
    return sum(int(HEADS[HEAD].targets(batch)) for batch in loader)


@on_layouts()
@pytest.mark.parametrize(
    ("layout", "retains"),
    [*((layout, False) for layout in SPREAD), ("one_rank", True), ("fsdp2x2", True)],
)
@pytest.mark.parametrize("counts", ["streamed", "first"])
def test_losses_of_one_micro_batch_add_up(layout, retains, counts):
    loop, loader = loop_of(layout, 4, counts=counts)
    accelerator, model = loop.accelerator, loop.model
    if counts == "first":
        accelerator.start_window(num_targets_of(loader))
    for batch in loader:
        with accelerator.accumulate(model):
            num_targets = int(HEADS[HEAD].targets(batch))
            loss = model(**batch)["loss"]
            accelerator.backward(loss, num_targets=num_targets, retain_graph=retains)
            again = loss if retains else model(**batch)["loss"]
            accelerator.backward(again, num_targets=torch.tensor(num_targets))
            loop.optimizer.step()
    want, loss = truth(HEAD, make_data(HEAD))
    assert relative_error(whole_gradients(model), {name: 2 * g for name, g in want.items()}) < TOLERANCE
    assert float(accelerator.report.loss) == pytest.approx(2 * loss, rel=TOLERANCE)


def test_losses_over_different_targets_in_one_micro_batch_are_refused():
    loop, loader = loop_of("one_rank", 2)
    batch = next(iter(loader))
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(loop.model(**batch)["loss"], num_targets=7)
        with pytest.raises(InvalidArgumentError, match="over 7 and 3 targets"):
            loop.accelerator.backward(loop.model(**batch)["loss"], num_targets=3)


@on_layouts("ddp2")
def test_a_second_loss_that_ddp_would_not_average_is_refused(layout):
    loop, loader = loop_of(layout, 1)
    loss = loop.model(**next(iter(loader)))["loss"]
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(loss, num_targets=4, retain_graph=True)
        with pytest.raises(InvalidArgumentError, match="add the terms"):
            loop.accelerator.backward(loss, num_targets=4)


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("clips", [False, True])
def test_a_plain_backward_stops_before_the_first_step(layout, clips):
    loop, loader = loop_of(layout, 1)
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.model(**next(iter(loader)))["loss"].backward()
    if clips:
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)
    with pytest.raises(TargetCountError, match=r"accelerator\.backward"):
        loop.optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(loop.model.parameters(), before, strict=True))


def hooked(loop):
    seen = []
    weight = loop.accelerator.unwrap_model(loop.model).lm_head.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.detach().double()))
    return seen


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_hooks_see_the_true_gradients(layout, accumulation):
    loop, loader = loop_of(layout, accumulation)
    accelerator, seen = loop.accelerator, hooked(loop)
    if accumulation > 1:
        accelerator.start_window(num_targets_of(loader))
    for batch in loader:
        with accelerator.accumulate(loop.model):
            loop.backward(batch)
            loop.optimizer.step()
    want, loss = truth(HEAD, make_data(HEAD))
    assert relative_error(whole_gradients(loop.model), want) < TOLERANCE
    assert float(accelerator.report.loss) == pytest.approx(loss, rel=TOLERANCE)
    got = seen[-1].clone()
    if layout == "ddp2":  # before DDP averages
        dist.all_reduce(got)
        got /= 2
    assert relative_error({"w": got}, {"w": want["lm_head.weight"]}) < TOLERANCE


@pytest.mark.parametrize(
    ("accumulation", "counts", "match"),
    [(4, "first", "start_window"), (1, "streamed", "counts='auto'")],
)
def test_hooks_that_would_see_sums_are_refused(accumulation, counts, match):
    loop, loader = loop_of("one_rank", accumulation, counts=counts)
    hooked(loop)
    with loop.accelerator.accumulate(loop.model), pytest.raises(InvalidArgumentError, match=match):
        loop.backward(next(iter(loader)))


def test_hooks_that_see_sums_are_said(monkeypatch):
    said = []
    logger = logging.getLogger("hf_gradutils.accelerator")
    monkeypatch.setattr(logger, "warning", lambda text, *args: said.append(text % args))
    loop, loader = loop_of("one_rank", 4)
    hooked(loop)
    for batch in loader:
        with loop.accelerator.accumulate(loop.model):
            loop.backward(batch)
            loop.optimizer.step()
    assert len(said) == 1
    assert "sees sums over targets until a window ends" in said[0]
    assert relative_error(whole_gradients(loop.model), truth(HEAD, make_data(HEAD))[0]) < TOLERANCE


@on_layouts("ddp2")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_hook_on_one_rank_changes_nothing_that_ranks_do_together(layout, accumulation):
    loop, loader = loop_of(layout, accumulation)
    if dist.get_rank() == 0:
        hooked(loop)
    for batch in loader:
        with loop.accelerator.accumulate(loop.model):
            loop.backward(batch)
            loop.optimizer.step()
    assert relative_error(whole_gradients(loop.model), truth(HEAD, make_data(HEAD))[0]) < TOLERANCE


def test_a_window_starts_before_its_first_backward():
    loop, loader = loop_of("one_rank", 2)
    with loop.accelerator.accumulate(loop.model):
        loop.backward(next(iter(loader)))
    with pytest.raises(InvalidArgumentError, match="before"):
        loop.accelerator.start_window(3)


class Lomo(torch.optim.Optimizer):
    """Steps in the backward, as LOMO does: `fused_backward` in place of `backward` and `step`."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def fused_backward(self, loss, lr):
        loss.backward()
        for p in self.param_groups[0]["params"]:
            p.data -= lr * p.grad
            p.grad = None

    def step(self, closure=None):
        pass


def test_an_optimizer_that_steps_in_the_backward_steps_on_the_mean(monkeypatch):
    module = types.ModuleType("lomo_optim")
    module.Lomo = module.AdaLomo = Lomo
    monkeypatch.setitem(sys.modules, "lomo_optim", module)
    for place in ("accelerate.accelerator", "accelerate.optimizer"):
        monkeypatch.setattr(f"{place}.is_lomo_available", lambda: True)
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(5, 3)
    before, truth_net = net.weight.detach().clone(), nn.Linear(3, 2).double()
    truth_net.load_state_dict(net.state_dict())
    truth_net(x.double()).square().mean().backward()
    net, optimizer = accelerator.prepare(net, Lomo(net.parameters()))
    with accelerator.accumulate(net):
        accelerator.backward(net(x).square().mean(), num_targets=5, learning_rate=0.1)
        assert math.isfinite(accelerator.clip_grad_norm_(net.parameters(), 1.0))
        optimizer.step()
    torch.testing.assert_close(
        (before - net.weight.detach()).double() / 0.1, truth_net.weight.grad, rtol=1e-5, atol=1e-6
    )
