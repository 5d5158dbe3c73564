"""Loops with bad steps, complex parameters, compressing hooks, layers that come late, and evaluations in between."""

import itertools
import math

import numpy
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.distributed.tensor import DTensor

from hf_gradutils import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from tests.harness.accelerator_cases import HEAD, make
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, reset_accelerate
from tests.harness.user_loops import alone, are_close, nets, ours, play, sgd, square

EVERYWHERE = pytest.mark.parametrize(
    ("layout", "accumulation"), [("one_rank", 1), ("one_rank", 2), ("ddp2", 1), ("ddp2", 2)]
)


# ---- A loop that leaves out bad steps itself ----


def guarded(accelerator, batches, models, fused, left_out, on_all_ranks):
    model = nn.Sequential(*models[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) if fused else sgd(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    is_bad_rank = on_all_ranks or not dist.is_initialized() or dist.get_rank() == 0
    lost = []
    for window in range(5):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                factor = math.inf if window == 1 and is_bad_rank else 1
                accelerator.backward(square(model, x, y) * factor, num_targets=len(x))
                if accelerator.sync_gradients:
                    try:
                        norm = accelerator.clip_grad_norm_(model.parameters(), 10.0)
                        if norm.isfinite() and window not in left_out:
                            optimizer.step()
                        else:
                            lost.append(window)
                    except NonfiniteGradientError:
                        lost.append(window)
                    optimizer.zero_grad()
    accelerator.lost = lost


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "ignore"])
@EVERYWHERE
@on_layouts()
def test_the_step_after_one_that_the_loop_left_out_is_taken(layout, accumulation, on_nonfinite):
    for fused, on_all_ranks in ((False, True), (False, False), (True, True), (True, False)):
        # A fused optimizer's verdict stays on the device until the next window ends, and is raised there.
        left_out = [1, 2] if on_nonfinite == "raise" and fused else [1]
        want, truth = alone(guarded, fused, left_out, True)
        assert truth.lost == left_out
        got, accelerator = play(guarded, layout, accumulation, fused, [], on_all_ranks, on_nonfinite=on_nonfinite)
        assert accelerator.lost == left_out
        assert are_close(got, want)


# ---- Complex parameters ----


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.shift = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        return torch.fft.ifft(torch.fft.fft(x) * self.weight).real + self.shift


def complex_nets(kind):
    every = {"mixed": [Fourier()], "two": [Fourier(), Fourier()], "before real": [Fourier(), nets()[1]]}
    return every[kind]


def trains(accelerator, batches, models, max_norm):
    model, optimizer = accelerator.prepare(nn.Sequential(*models), sgd(*models))
    for window in range(2):
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                accelerator.backward(square(model, x, y), num_targets=len(x))
                if accelerator.sync_gradients and max_norm:
                    accelerator.norm = float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
                optimizer.step()
                optimizer.zero_grad()


@EVERYWHERE
@on_layouts()
def test_complex_parameters_are_exact(layout, accumulation):
    for kind, max_norm in itertools.product(("mixed", "two", "before real"), (None, 0.1, 100.0)):
        unclipped, _ = alone(trains, None, models=complex_nets(kind))
        want, truth = alone(trains, max_norm, models=complex_nets(kind))
        assert are_close(want, unclipped) == (max_norm != 0.1), "control"
        for counts in ("auto", "streamed"):
            got, accelerator = play(trains, layout, accumulation, max_norm, models=complex_nets(kind), counts=counts)
            assert are_close(got, want)
            assert not max_norm or accelerator.norm == pytest.approx(truth.norm, rel=1e-9)


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_complex_parameters_have_a_2_norm_only(norm_type):
    models = complex_nets("mixed")
    before = [p.detach().clone() for p in models[0].parameters()]
    with pytest.raises(InvalidArgumentError, match="only norm_type=2"):
        play(trains, "one_rank", 1, 1.0, models=models, norm_type=norm_type)
    assert all(torch.equal(p, was) for p, was in zip(models[0].parameters(), before, strict=True))


# ---- Compressed communication ----


@pytest.mark.parametrize("num_targets", [30_000, 200_000])
@on_layouts("ddp2")
def test_a_compressing_hook_gets_means_not_sums(layout, num_targets):
    """In fp16; gloo has no hook for bf16, in which sums would do no harm."""
    generator = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(num_targets, 4, generator=generator)
    truth = nets()[1]
    square(truth, x.double()).backward()
    want = {name: p.grad for name, p in truth.named_parameters()}
    assert max(g.abs().max() for g in want.values()) * num_targets > torch.finfo(torch.float16).max, "control"
    for cls in ("ours", "stock"):
        handlers = [DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)]
        reset_accelerate()
        accelerator = ours(handlers=handlers) if cls == "ours" else Accelerator(cpu=True, kwargs_handlers=handlers)
        model = nets()[1].float()
        model, optimizer = accelerator.prepare(model, sgd(model))
        sizes = [num_targets // 3, num_targets - num_targets // 3] if cls == "ours" else num_targets // 2
        part = x.split(sizes)[dist.get_rank()]
        before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        accelerator.backward(square(model, part), **({"num_targets": len(part)} if cls == "ours" else {}))
        optimizer.step()
        got = {name: (before[name] - p.detach()).double() / 0.1 for name, p in model.module.named_parameters()}
        assert relative_error(got, want) < 1e-3, cls


# ---- Counts ----

COUNTS = {
    "int64": numpy.int64,
    "int32": numpy.int32,
    "float32": numpy.float32,
    "0 dimensions": numpy.array,
    "tensor": torch.tensor,
}


def counted(accelerator, batches, models, count):
    model, optimizer = accelerator.prepare(nn.Sequential(*models[:2]), sgd(*models[:2]))
    for window in range(2):
        for x, y, _ in batches(window):
            with accelerator.accumulate():
                accelerator.backward(square(model, x, y), num_targets=COUNTS[count](len(x)))
                optimizer.step()
                optimizer.zero_grad()


@EVERYWHERE
@on_layouts()
def test_counts_of_numpy_and_accumulate_without_models(layout, accumulation):
    want, _ = alone(counted, "int64")
    for count in COUNTS:
        got, accelerator = play(counted, layout, accumulation, count)
        assert are_close(got, want), count
        assert accelerator.report.num_targets == 12


@pytest.mark.parametrize("count", [numpy.int64(-1), numpy.array([1, 2]), numpy.array("four"), numpy.bool_(True)])
def test_what_is_no_count_is_refused_from_numpy_too(count):
    accelerator = ours()
    model = accelerator.prepare(nets()[1])
    with pytest.raises(InvalidArgumentError, match="num_targets must be one number"):
        accelerator.backward(square(model, torch.ones(2, 4).double()), num_targets=count)


# ---- Layers that come late ----


def surgery(accelerator, batches, models, kind):
    inside = model = nn.Sequential(*models[:2])
    if kind in ("unfrozen", "prepared again"):
        models[0].requires_grad_(False)
    optimizer = sgd(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    for window in range(4):
        if window == 1 and kind == "frozen for a while":
            models[0].requires_grad_(False)
        if window == 2:
            models[0].requires_grad_(True)
            if kind == "added":
                inside.append(nn.Linear(1, 1).double().requires_grad_())
                nn.init.constant_(inside[2].weight, 0.5)
                nn.init.zeros_(inside[2].bias)
                optimizer.add_param_group({"params": list(inside[2].parameters())})
            if kind == "replaced":
                models[1].weight = nn.Parameter(2 * models[1].weight.detach())
                optimizer.param_groups[0]["params"][2] = models[1].weight
            if kind == "prepared again":
                model = accelerator.prepare(accelerator.unwrap_model(model))
        for x, y, _ in batches(window):
            with accelerator.accumulate(model):
                accelerator.backward(square(model, x, y), num_targets=len(x))
                optimizer.step()
                optimizer.zero_grad()
    models[:2] = list(inside)


FIRST = {"unfrozen": r"2 parameters.* module\.0\.weight", "added": r"2 .* module\.2\.weight"}
FIRST["replaced"] = r"1 parameters.* module\.1\.weight"


@EVERYWHERE
@on_layouts()
def test_layers_that_ddp_does_not_average_are_refused(layout, accumulation):
    options = {"handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]}
    for kind in (*FIRST, "frozen for a while", "prepared again"):
        if layout == "ddp2" and kind in FIRST:
            with pytest.raises(InvalidArgumentError, match=FIRST[kind]):
                play(surgery, layout, accumulation, kind, **options)
        else:
            want, _ = alone(surgery, kind)
            assert are_close(play(surgery, layout, accumulation, kind, **options)[0], want), kind


# ---- An evaluation between backward and step ----


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize(("layout", "accumulation"), [("fsdp2x2", 1), ("fsdp2x2", 2), ("ddp2", 2), ("one_rank", 2)])
@on_layouts()
def test_an_evaluation_before_the_step_changes_nothing(layout, accumulation, max_norm):
    rows, truth = make_data(HEAD), make_model(HEAD).double()
    optimizer, batch = sgd(truth), HEADS[HEAD].collate(rows)
    for _ in range(3):
        truth(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(truth.parameters(), max_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    size = len(rows) // (accumulation * (1 if layout == "one_rank" else 2))
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=accumulation), rows=rows, batch_size=size)

    def evaluate(batch):
        loop.model.eval()
        with torch.no_grad():
            assert loop.model(**batch)["loss"].isfinite()
        loop.model.train()

    for _ in range(3):
        for batch in loader:
            with loop.accelerator.accumulate(loop.model):
                loop.backward(batch)
                evaluate(batch)
                if loop.accelerator.sync_gradients:
                    if max_norm:
                        loop.accelerator.clip_grad_norm_(loop.model.parameters(), max_norm)
                        evaluate(batch)
                    loop.optimizer.step()
                    loop.optimizer.zero_grad()
    moved = difference(truth, make_model(HEAD))
    assert relative_error(difference(loop.model, make_model(HEAD)), moved) < 1e-4


def difference(model, start):
    whole = {
        name.removeprefix("module."): p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
    }
    return {name: whole[name].detach().double() - p.detach().double() for name, p in start.named_parameters()}
