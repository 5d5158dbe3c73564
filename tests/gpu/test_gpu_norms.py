"""Norms on the GPU against float64, over all kinds of gradients, and how many kernels a window's end takes."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_gradutils import clip_gradients
from hf_gradutils.gradients.power_sums import power_sums, root
from hf_gradutils.window import AccumulationWindow
from tests.gpu.cuda_cases import DEVICE, on_ranks
from tests.harness.counting import events_of, top_level
from tests.harness.gradients import norm_of, relative_error
from tests.harness.tiny_net import data_rank, make_batch, make_mesh, make_net, summed_loss, true_mean_gradient

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def random(num_elements, dtype=torch.float32, seed=2):
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(gradients):
    model = nn.ParameterList(nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient
    return model


# ---- How exact ----


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_norm_of_a_hundred_million_elements_against_float64(dtype):
    on_ranks(large, 1, DEVICE, dtype, 100_000_000 if DEVICE == "cuda" else 1_000_000)


def large(device, dtype, num_elements):
    part = random(1_000_000, dtype)
    repeats = num_elements // len(part)
    want = math.sqrt(part.double().square().sum().item() * repeats)
    model = with_gradients([part.to(device).repeat(repeats)])
    assert model[0].grad.numel() == num_elements
    for p, true in ((2.0, want), (math.inf, part.abs().max().item())):
        assert clip_gradients(model, math.inf, norm_type=p).item() == pytest.approx(true, rel=BOUNDS[dtype])


def test_values_whose_squares_do_not_fit_and_empty_tensors_among_several_dtypes():
    on_ranks(extremes, 1, DEVICE)


def extremes(device):
    tensors = [
        torch.full((1000,), 1e25),
        torch.full((10,), 1e-25),
        torch.full((3_000_000,), 300.0, dtype=torch.float16),
        torch.full((100,), 1e25, dtype=torch.bfloat16),
        torch.full((100,), 1e-25, dtype=torch.bfloat16),
        torch.zeros(0),
        random(5000, torch.float64),
        random(5000).view(50, 100).t(),
        torch.tensor(2.0),
    ]
    there = [tensor.to(device) for tensor in tensors]
    assert {tensor.device.type for tensor in there} == {device}
    for p in (1.0, 2.0, 3.0, math.inf):
        for foreach in (True, False):
            got = root(power_sums(there, p, foreach=foreach), p)
            assert got.device.type == device
            want = [torch.linalg.vector_norm(t.double(), p).item() if t.numel() else 0.0 for t in tensors]
            assert got.tolist() == pytest.approx(want, rel=1e-6), (p, foreach)
    assert not torch.linalg.vector_norm(there[0]).isfinite(), "control: overflows in float32"
    assert torch.linalg.vector_norm(there[1]) == 0, "control: underflows in float32"
    model = with_gradients(there)
    model[8].grad = None
    want = math.sqrt(sum(float(t.double().square().sum()) for t in tensors[:8]))
    assert clip_gradients(model, math.inf).item() == pytest.approx(want, rel=1e-6)


# ---- Ranks that hold little, and gradients on the CPU ----


def test_ranks_without_gradients_take_part():
    on_ranks(empty_ranks, 2, DEVICE)


def empty_ranks(device):
    mesh = make_mesh("fsdp2x2", device)
    model = nn.Linear(5, 1, bias=False).to(device)  # one row for two ranks
    nn.init.ones_(model.weight)
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 5, device=device)).sum().backward()
    assert isinstance(model.weight.grad, DTensor)
    assert model.weight.grad.to_local().numel() == (5 if dist.get_rank() == 0 else 0)
    assert model.weight.grad.device.type == device
    for p in (2.0, math.inf):
        norm = clip_gradients(model, math.inf, norm_type=p)
        assert norm.item() == pytest.approx(2 * 5 ** (1 / p), rel=1e-6)

    experts = nn.ParameterList([nn.Parameter(torch.ones(3, device=device))])
    if dist.get_rank() == 0:
        experts[0].grad = torch.full((3,), 2.0, device=device)
    norm = clip_gradients(experts, 1.0, ownership={"*": "sharded"})
    assert norm.item() == pytest.approx(2 * 3**0.5, rel=1e-6)
    assert norm.device.type == device
    if dist.get_rank() == 0:
        assert experts[0].grad.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("backend", ["gloo", f"{DEVICE}:gloo"])
def test_gradients_that_are_offloaded_to_the_cpu_are_exact(backend):
    on_ranks(offloaded, 2, DEVICE, backend, init=False)


def offloaded(device, backend):
    """The mesh and the window on the device, the parameters and gradients on the CPU.

    A backend for CUDA alone, as NCCL is one, does not carry the CPU's numbers: they travel to the device and back.
    """
    dist.init_process_group(backend)
    want = true_mean_gradient()
    mesh = make_mesh("fsdp2x2", device)
    model = make_net().float()
    for part in (model.inp, model.out, model):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=device == "cuda"))
    index, size = data_rank(mesh)
    x, y, mask = (part[index::size].to(device) for part in make_batch())
    window = AccumulationWindow(torch.device(device))
    for p in (2.0, math.inf):
        for limit in (math.inf, norm_of(want, p) / 3):
            model.zero_grad()
            for rows in torch.arange(len(x), device=device).chunk(4):
                n = mask[rows].sum()
                window.weigh(summed_loss(model, x[rows], y[rows], mask[rows]) / n.clamp(min=1), n).backward()
            keep_busy(device)
            report = window.close(model, limit, norm_type=p)
            assert {q.grad.device.type for q in model.parameters()} == {"cpu"}
            scale = min(1.0, limit / (norm_of(want, p) + 1e-6))
            clipped = {name: g * scale for name, g in want.items()}
            assert report.grad_norm.item() == pytest.approx(norm_of(want, p), rel=1e-5)
            assert report.num_targets.item() == make_batch()[2].sum().item()
            assert relative_error(gradients_of(model, device), clipped) < 1e-5, (p, limit)
            keep_busy(device)
            clip_gradients(model, norm_of(clipped, p) / 2, norm_type=p)
            halved = {name: g / 2 for name, g in clipped.items()}
            assert relative_error(gradients_of(model, device), halved) < 1e-5, (p, limit)


def keep_busy(device):
    """Work for some tens of milliseconds: what the host reads without waiting has not come yet."""
    if device == "cuda":
        torch.cuda._sleep(50_000_000)


def gradients_of(model, device):
    """Whole; gathered on the mesh's device, since there may be no backend for the CPU."""
    result = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        there = DTensor.from_local(
            gradient.to_local().to(device),
            gradient.device_mesh,
            gradient.placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )
        result[name] = there.full_tensor().to("cpu", torch.float64)
    return result


# ---- How many kernels ----


@pytest.mark.parametrize("dtypes", [["float32"], ["bfloat16"], ["float32", "bfloat16"]], ids=" and ".join)
def test_the_kernels_of_a_windows_end_do_not_grow_by_one_per_parameter(dtypes):
    [(few, many)] = on_ranks(work_of_two_sizes, 1, DEVICE, dtypes)
    num_alone = {num: num // len(dtypes) if "bfloat16" in dtypes else 0 for num in (300, 3000)}
    """Launches of the scaling, which torch can do for one bfloat16 tensor at a time."""
    assert few["calls"] == many["calls"]
    if DEVICE == "cpu":
        return
    if not many["kernels of the control"]:
        pytest.skip("the profiler sees no kernels here")
    assert many["kernels of the control"] >= 3000, "one per tensor"
    assert 0 < few["kernels"] <= num_alone[300] + 4 * math.ceil(300 / 100) + 40
    assert many["kernels"] <= num_alone[3000] + 4 * math.ceil(3000 / 100) + 40, "each takes a hundred tensors and more"


def work_of_two_sizes(device, dtypes):
    return [work(device, [getattr(torch, name) for name in dtypes], num) for num in (300, 3000)]


def work(device, dtypes, num_parameters):
    model = with_gradients(
        [torch.randn(10, device=device, dtype=dtypes[i % len(dtypes)]) for i in range(num_parameters)]
    )
    window = AccumulationWindow(torch.device(device))
    clip_gradients(model, 1e9)
    closing = functools.partial(window.close, model, 1.0)
    for run in (closing, closing):
        window.weigh(torch.ones((), device=device), torch.tensor(4, device=device))
        events = events_of(run)
    gradients = [parameter.grad for parameter in model]
    control = events_of(lambda: [gradient.mul_(1.0) for gradient in gradients])
    return {
        "calls": len(top_level(events)),
        "kernels": num_kernels(events),
        "kernels of the control": num_kernels(control),
    }


def num_kernels(events):
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")) for event in events
    )
