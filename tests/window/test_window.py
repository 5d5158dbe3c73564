"""The end of a window: one plan, one reduction, one pass. Counted, not timed."""

import functools
import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_gradutils import clip_gradients
from hf_gradutils.window import AccumulationWindow
from tests.harness.counting import Traffic, top_level_calls
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.layouts import LAYOUTS, NET_LAYOUTS, on_layouts
from tests.harness.tiny_net import (
    data_rank,
    make_batch,
    make_net,
    parallelize,
    summed_loss,
    sync_plain_gradients,
    true_mean_gradient,
)


def parameters_of(num_parameters, dtype=torch.float32):
    model = nn.ParameterList([nn.Parameter(torch.randn(10, dtype=dtype)) for _ in range(num_parameters)])
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    return model


def accumulated(layout, mesh, model=None):
    """A model with the gradients of four micro-batches, and the window that weighed them."""
    model = parallelize(make_net(), layout, mesh) if model is None else model
    index, size = data_rank(mesh)
    window = AccumulationWindow(torch.device("cpu"), num_replicas=(dist.get_world_size() if mesh else 1) // size)
    x, y, mask = (t[index::size] for t in make_batch())
    for rows in torch.arange(len(x)).chunk(4):
        n = mask[rows].sum()
        window.weigh(summed_loss(model, x[rows], y[rows], mask[rows]) / n.clamp(min=1), n).backward()
    sync_plain_gradients(model, layout, mesh)
    return model, window


# ---- What comes out ----


@on_layouts(*NET_LAYOUTS)
def test_one_all_reduce_makes_the_exact_mean_gradient_and_all_norms(layout, mesh):
    want = true_mean_gradient()
    groups = {"ends": "*inp.*", "norm": "*norm.*"}
    model, window = accumulated(layout, mesh)
    window.close(model, norm_groups=groups)  # with the plan's object gather, once
    model.zero_grad()
    model, window = accumulated(layout, mesh, model)
    with profile() as profiler:
        report = window.close(model, norm_groups=groups)
    collectives = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
    assert collectives == (["gloo:all_reduce"] if LAYOUTS[layout].num_ranks > 1 else [])
    assert relative_error(whole_gradients(model), want) < 1e-12
    norms = {name: value.item() for name, value in report.group_norms.items()}
    by_group = {"ends": ("inp",), "norm": ("norm",), "rest": ("up", "down", "out")}
    for name, modules in by_group.items():
        parts = [g.flatten() for n, g in want.items() if n.split(".")[0] in modules]
        assert norms[name] == pytest.approx(torch.cat(parts).norm().item(), rel=1e-12), name
    assert math.hypot(*norms.values()) == pytest.approx(report.grad_norm.item(), rel=1e-12)
    assert report.is_finite


@on_layouts("ddp2", "fsdp2x2", "tp2_fsdp2x2")
def test_the_largest_element_takes_one_all_gather(layout, mesh):
    want = true_mean_gradient()
    model, window = accumulated(layout, mesh)
    clip_gradients(model, math.inf, norm_type=math.inf)
    with profile() as profiler:
        report = window.close(model, norm_type=math.inf)
    assert [event.name for event in profiler.events() if event.name.startswith("gloo:")] == ["gloo:all_gather"]
    assert report.grad_norm.item() == pytest.approx(max(g.abs().max().item() for g in want.values()), rel=1e-12)


def test_a_window_that_leaves_scaling_to_the_optimizer_changes_no_gradient():
    model, window = accumulated("one_rank", None)
    before = whole_gradients(model)
    report = window.close(model, 0.1, scales=False)
    after = whole_gradients(model)
    assert relative_error(after, before) == 0
    scaled = {name: g * report.multiplier for name, g in after.items()}
    norm = torch.cat([g.flatten() for g in scaled.values()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-4)


# ---- What it costs ----


def test_at_most_twenty_calls_however_many_parameters():
    counts = []
    for num_parameters in (30, 300, 3000):
        model = parameters_of(num_parameters)
        window = AccumulationWindow(torch.device("cpu"))
        clip_gradients(model, 1e9)
        window.weigh(torch.ones(()), torch.tensor(4))
        closing = functools.partial(window.close, model, 1.0)
        clipping = functools.partial(clip_gradients, model, 1.0)
        counts.append((len(top_level_calls(closing)), len(top_level_calls(clipping))))
    assert counts[0][0] <= 20
    assert counts[0][1] <= 20
    assert counts[0] == counts[1] == counts[2]


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2", "tp2", "tp2_fsdp2x2", "plain_beside_fsdp2x2", "two_meshes2x2")
def test_at_most_twenty_calls_in_every_layout(layout, mesh):
    model, window = accumulated(layout, mesh)
    clip_gradients(model, 1e9)
    calls = top_level_calls(lambda: window.close(model, 1.0))
    assert len(calls) <= 20, calls


@pytest.mark.parametrize("num_elements", [10, 200_000])  # the larger are read in chunks
@pytest.mark.parametrize(("scales", "want"), [(True, (2.0, 1.0)), (False, (1.0, 0.0))])
def test_gradients_are_read_once_for_the_norm_and_read_and_written_once_to_scale(scales, want, num_elements):
    model = nn.ParameterList([nn.Parameter(torch.randn(num_elements)) for _ in range(5)])
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    window = AccumulationWindow(torch.device("cpu"))
    clip_gradients(model, 1e9)
    window.weigh(torch.ones(()), torch.tensor(4))
    with Traffic(model) as traffic:
        window.close(model, 1.0, scales=scales)
    assert (traffic.read, traffic.written) == pytest.approx(want)


def test_the_python_time_of_a_windows_end_does_not_grow_with_the_ranks(monkeypatch):
    calls = [_python_calls(num_ranks, monkeypatch) for num_ranks in (2, 1024)]
    assert calls[0] == calls[1]


def _python_calls(num_ranks, monkeypatch):
    """Python and C calls of one window's end on rank 0 of so many simulated ranks."""

    def gather_copies(records, own, group):
        records[:] = [own] * num_ranks

    monkeypatch.setattr(dist, "all_gather_object", gather_copies)
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        model = parameters_of(30)
        window = AccumulationWindow(torch.device("cpu"))
        window.close(model, 1.0)
        window.weigh(torch.ones(()), torch.tensor(4))
        num_calls = 0

        def count(frame, event, argument):
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            window.close(model, 1.0)
        finally:
            sys.setprofile(None)
        return num_calls
    finally:
        dist.destroy_process_group()


def test_a_windows_end_asks_the_device_nothing():
    model = parameters_of(30)
    window = AccumulationWindow(torch.device("cpu"))
    window.weigh(torch.ones(()), torch.tensor(4))
    with profile() as profiler:
        window.close(model, 1.0)
        window.weigh(torch.ones(()), torch.tensor(4))
    assert not [event for event in profiler.events() if event.name == "aten::_local_scalar_dense"]


# ---- How exact the norm is ----


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)], ids=str
)
@pytest.mark.parametrize("num_elements", [3_000, 100_000_000])
def test_the_norm_against_float64(num_elements, dtype, bound):
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(min(num_elements, 1_000_000), generator=generator).to(dtype)
    parameter = nn.Parameter(torch.zeros(0, dtype=dtype))
    parameter.data = small.repeat(num_elements // len(small))
    parameter.grad = parameter.data
    want = math.sqrt(small.double().square().sum().item() * (num_elements // len(small)))
    assert clip_gradients(nn.ParameterList([parameter]), math.inf).item() == pytest.approx(want, rel=bound)
