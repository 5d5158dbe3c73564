"""The GPU's code paths without a GPU: fake CUDA tensors carry device, dtype and shape, and refuse to be read.

A read that would make the host wait (``item()``, ``bool()``) raises ``DataDependentOutputException``. ``tests/gpu`` is
the same on a real one.
"""

import math
import operator

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradutils import _collectives as reduction
from hf_gradutils import clip_gradients, rescale_gradients
from hf_gradutils._precision import is_exact_in_itself
from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer, StepOrder
from hf_gradutils.gradients import power_sums as norms
from hf_gradutils.gradients.of_model import gradients_of
from hf_gradutils.gradients.power_sums import power_sums
from hf_gradutils.gradients.scaling import scale_
from hf_gradutils.upstream.torch import _unused_flag
from hf_gradutils.window import AccumulationWindow
from tests.harness.trainer_cases import reset_accelerate

CUDA = torch.device("cuda:0")
DTYPES = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "fp64": (torch.float64,),
    "mixed": (torch.float32, torch.bfloat16),
}
IN_FP32 = "_amp_foreach_non_finite_check_and_unscale_"
SCALING = {
    "fp32": {"_foreach_mul_": 1},
    "bf16": {"_foreach_mul_": 1, IN_FP32: 0},  # which CUDA does not have for bfloat16
    "fp16": {IN_FP32: 1},
    "fp64": {"_foreach_mul_": 1},
    "mixed": {"_foreach_mul_": 2, IN_FP32: 0},
}
"""One call per dtype; half precision in float32."""


@pytest.fixture(autouse=True)
def _fake_mode():
    """One mode per test: tensors of two do not mix, so nothing that the package caches may outlive it."""
    caches = (_unused_flag, norms._lengths)
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode():
        yield
    for cache in caches:
        cache.cache_clear()


class Seen(TorchDispatchMode):
    """Names of the operations, and the copies between devices."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.copies = []
        """(from, to, whether the host goes on meanwhile)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten":
            self.names.append(name)
        if name in ("_to_copy", "copy_"):
            source = args[0 if name == "_to_copy" else 1]
            is_async = (kwargs or {}).get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if source.device.type != result.device.type:
                self.copies.append((source.device.type, result.device.type, is_async))
        return result

    def num(self, *names):
        return sum(name in names for name in self.names)

    def stays_on_the_device(self):
        # A tensor made of Python's numbers is lifted; to put it on a device takes a copy that waits.
        return not self.copies and "lift_fresh" not in self.names


def fake_model(dtypes, devices=(CUDA,), num_parameters=300):
    model = nn.ParameterList()
    for i in range(num_parameters):
        device, dtype = devices[i % len(devices)], dtypes[i % len(dtypes)]
        model.append(nn.Parameter(torch.empty(10, device=device, dtype=dtype)))
        model[i].grad = torch.empty_like(model[i])
    return model


def weigh(window, dtype=torch.float32):
    loss = torch.empty((), device=CUDA, dtype=dtype)
    return window.weigh(loss, torch.empty((), device=CUDA, dtype=torch.int64))


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("name", DTYPES)
def test_a_window_ends_on_the_device_in_a_few_multi_tensor_calls(name, p):
    dtypes = DTYPES[name]
    model = fake_model(dtypes)
    window = AccumulationWindow(CUDA)
    with Seen() as first:
        weighed = weigh(window, dtypes[0])
        clip_gradients(model, 1.0, norm_type=p)  # makes the plan, and what is kept on the device
    assert first.copies
    assert set(first.copies) == {("cpu", "cuda", True)}, "what goes there once does not wait either"
    with Seen() as seen:
        report = window.close(model, 1.0, norm_type=p)
        window.weigh(weighed.detach(), torch.empty((), device=CUDA, dtype=torch.int64))
    assert seen.stays_on_the_device()
    assert seen.num("_foreach_norm") == len(DTYPES[name])
    assert {scaling: seen.num(scaling) for scaling in SCALING[name]} == SCALING[name]
    assert len(seen.names) < 50, "no parameter is looked at alone"
    numbers = (report.grad_norm, report.multiplier, report.loss, report.num_targets, report.is_finite, weighed)
    assert {number.device for number in numbers} == {CUDA}
    assert weighed.dtype == (torch.float64 if name == "fp64" else torch.float32)


@pytest.mark.parametrize("name", DTYPES)
def test_the_utilities_stay_on_the_device(name):
    model = fake_model(DTYPES[name])
    count = torch.empty((), device=CUDA, dtype=torch.int64)
    clip_gradients(model, 1.0)
    with Seen() as seen:
        norm = clip_gradients(model, 1.0)
        rescale_gradients(model, count)
    assert seen.stays_on_the_device()
    assert seen.num("_foreach_norm") == len(DTYPES[name])
    assert {scaling: seen.num(scaling) for scaling in SCALING[name]} == {k: 2 * v for k, v in SCALING[name].items()}
    assert norm.device == CUDA


@pytest.mark.parametrize("name", DTYPES)
def test_norms_are_taken_and_tensors_scaled_without_a_look_at_their_values(name):
    gradients = [parameter.grad for parameter in fake_model(DTYPES[name])]
    with Seen() as seen:
        powers = power_sums(gradients, 2.0)
        scale_(gradients, powers.sum())
    assert (powers.device, powers.dtype, powers.shape) == (CUDA, torch.float64, (len(gradients),))
    assert seen.stays_on_the_device()
    assert "split" not in seen.names, "tensors are cut up on CPU only"


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_what_the_host_reads_of_offloaded_gradients_has_been_waited_for(first):
    other = {"cpu": CUDA, "cuda": torch.device("cpu")}[first]
    model = fake_model(DTYPES["fp32"], devices=(torch.device(first, 0 if first == "cuda" else None), other))
    window = AccumulationWindow(CUDA)
    weigh(window)
    with Seen() as seen:
        window.close(model, 1.0)
    to_host = [copy for copy in seen.copies if copy[1] == "cpu"]
    assert to_host
    assert set(to_host) == {("cuda", "cpu", False)}


def test_control_a_read_is_caught():
    model = fake_model(DTYPES["fp32"])
    window = AccumulationWindow(CUDA)
    weigh(window)
    report = window.close(model, 1.0)
    for read in (report.grad_norm.item, lambda: bool(report.is_finite), report.loss.tolist):
        with pytest.raises(DataDependentOutputException):
            read()


def test_control_a_copy_is_seen():
    with Seen() as seen:
        torch.empty((), device=CUDA).cpu()
        torch.empty(3).to(CUDA, non_blocking=True)
        torch.empty(3).copy_(torch.empty(3, device=CUDA), non_blocking=True)
    assert seen.copies == [("cuda", "cpu", False), ("cpu", "cuda", True), ("cuda", "cpu", True)]
    with Seen() as seen:
        torch.tensor([1.0], device=CUDA)
    assert not seen.stays_on_the_device()


class Recorder(torch.optim.SGD):
    """Records where the flag and the scale are that it is given."""

    def step(self, closure=None):
        self.devices = {name: getattr(self, name).device.type for name in ("found_inf", "grad_scale")}


class Window:
    def before_step(self, optimizer):
        pass


def test_an_optimizer_of_offloaded_parameters_gets_what_has_arrived(monkeypatch):
    reset_accelerate()
    with unset_fake_temporarily():
        optimizer = Accelerator(cpu=True).prepare_optimizer(Recorder([nn.Parameter(torch.zeros(1))]))
    window = Window()
    ours = GradUtilsOptimizer.adopt(optimizer, window.before_step)
    ours.order = StepOrder(skip_flag=torch.zeros((), device=CUDA), divisor=torch.ones((), device=CUDA))
    with Seen() as seen:
        ours.step()
    assert ours.optimizer.devices == {"found_inf": "cpu", "grad_scale": "cpu"}
    assert seen.copies == [("cuda", "cpu", False)] * 2


@pytest.mark.parametrize(
    ("backends", "have", "travel_on"),
    [
        ("cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu", "cuda"),  # where the vectors of the other ranks are
        ("cpu:gloo,cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda", "cuda"),
        ("cpu:gloo", "cpu", "cpu"),
        ("cpu:gloo", "cuda", "cpu"),
    ],
)
def test_ranks_reduce_over_one_backend_whatever_they_hold(monkeypatch, backends, have, travel_on):
    monkeypatch.setattr(reduction.dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert reduction._device_for(None, torch.device(have)).type == travel_on


# ---- TF32 ----


@pytest.fixture
def precision():
    """A function that sets the precision of an operation, such as ``cuda.matmul``, until the test is over."""
    before = {}

    def set_to(name, value):
        operation = operator.attrgetter(name)(torch.backends)
        before.setdefault(name, (operation, operation.fp32_precision))
        operation.fp32_precision = value

    yield set_to
    for operation, value in before.values():
        operation.fp32_precision = value


@pytest.mark.parametrize(
    ("settings", "of_linear", "of_convolution"),
    [
        ({}, True, False),  # torch's default: convolutions in TF32
        ({"cudnn.conv": "ieee"}, True, True),
        ({"cuda.matmul": "tf32", "cudnn.conv": "ieee"}, False, False),
    ],
)
def test_a_model_is_exact_on_cuda_if_nothing_it_computes_is_rounded_to_tf32(
    precision, settings, of_linear, of_convolution
):
    for name, value in settings.items():
        precision(name, value)
    linear = nn.Linear(2, 2)
    assert is_exact_in_itself(linear, CUDA) is of_linear
    assert is_exact_in_itself(nn.Sequential(nn.Conv1d(2, 2, 1), linear), CUDA) is of_convolution
    assert is_exact_in_itself(nn.Conv1d(2, 2, 1), torch.device("cpu")), "none of these is for the CPU"


def test_tf32_as_transformers_switches_it_on_is_seen_and_does_not_raise(monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # TrainingArguments(tf32=True) does this
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        torch.get_float32_matmul_precision()
    assert not is_exact_in_itself(nn.Linear(2, 2), CUDA)


def test_a_device_without_an_index_costs_nothing_anew_at_every_step():
    model, window = fake_model([torch.float32]), AccumulationWindow(torch.device("cuda"))
    slots = []
    for _ in range(2):
        weigh(window)
        window.close(model, 1.0)
        slots.append(gradients_of(model)._slots)
    assert slots[0] is slots[1]
