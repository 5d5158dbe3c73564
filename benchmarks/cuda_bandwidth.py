"""Bytes over bandwidth on a GPU: the norm and the clip against what a copy reaches in the same run.

    fold           1 read                            the optimizer multiplies
    close          1 read, then 1 read and 1 write   ours, and torch's clip, which does not divide by the targets
    three passes   1 read and 1 write more           divide by the targets, then torch's clip

Device times are of CUDA events around a call, host times of the call itself, which waits for nothing.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.window import AccumulationWindow

NUM_ELEMENTS = 2**30
LARGEST = 2**26
"""Elements of one parameter among the large ones."""
SMALL = 128
"""Elements of each of many small parameters."""
NUM_SMALL = (300, 3000)
NUM_REPEATS = 20
MAX_NORM = 1.0

NO_GPU = "No GPU here: nothing was measured on one."


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats."""

    device_s: float
    host_s: float


def report() -> list[str]:
    """Lines of Markdown; one that says so where there is no GPU."""
    if not torch.cuda.is_available():
        return [NO_GPU]
    device = torch.device("cuda", torch.cuda.current_device())
    free_bytes, _ = torch.cuda.mem_get_info(device)
    lines = [f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, medians of {NUM_REPEATS} repeats.", ""]
    for dtype in (torch.float32, torch.bfloat16):
        num_elements = fitting(free_bytes, dtype)
        lines += [f"### {num_elements / 1e9:.2f}B elements, {str(dtype).removeprefix('torch.')}", ""]
        lines += [*large(device, dtype, num_elements), ""]
        torch.cuda.empty_cache()
    lines += [f"### Small parameters, {SMALL} elements each, float32", ""]
    return [*lines, *small(device)]


def fitting(free_bytes: int, dtype: torch.dtype) -> int:
    """Elements of which parameters and gradients, or two buffers to copy between, fit into 80 % of the memory."""
    most = int(free_bytes * 0.8) // (2 * dtype.itemsize)
    return min(NUM_ELEMENTS, most // LARGEST * LARGEST or most)


# ---- Large tensors ----


def large(device: torch.device, dtype: torch.dtype, num_elements: int) -> list[str]:
    """A table of the calls: milliseconds, bytes moved and the part of the copy's bandwidth."""
    num_bytes = num_elements * dtype.itemsize
    copy = _copy_time(device, dtype, num_elements)
    bandwidth = 2 * num_bytes / copy.device_s
    shapes = [min(LARGEST, num_elements - start) for start in range(0, num_elements, LARGEST)]
    model = make_model(shapes, device, dtype)
    rows: list[Sequence[str]] = [("", "gradient bytes moved", "device", "of the copy's bandwidth")]
    rows.append(("copy", "1 read, 1 write", _ms(copy), f"{bandwidth / 1e12:.2f} TB/s"))
    for name, prepare, num_passes, text in CALLS:
        timing = time_call(prepare(model), device, before=lambda: fill(model))
        rows.append((name, text, _ms(timing), f"{num_passes * num_bytes / timing.device_s / bandwidth:.0%}"))
    return _table(rows)


def _copy_time(device: torch.device, dtype: torch.dtype, num_elements: int) -> Timing:
    source = torch.ones(num_elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return time_call(lambda: target.copy_(source), device)


def make_model(shapes: Iterable[int], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Parameters with gradients."""
    model = nn.ParameterList(nn.Parameter(torch.zeros(n, device=device, dtype=dtype)) for n in shapes)
    for parameter in model:
        parameter.grad = torch.empty_like(parameter)
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give the gradients values: a clip changes them, and again and again would make them denormal."""
    for parameter in model.parameters():
        parameter.grad.fill_(1.0)


# ---- Small tensors ----


def small(device: torch.device) -> list[str]:
    """A table of host and device microseconds: how long a call keeps the host, and how long the GPU is at it."""
    rows: list[Sequence[str]] = [("parameters", "", "host", "device")]
    for num_parameters in NUM_SMALL:
        model = make_model([SMALL] * num_parameters, device, torch.float32)
        for name, prepare, _, _ in CALLS:
            timing = time_call(prepare(model), device, before=lambda model=model: fill(model))
            rows.append((str(num_parameters), name, f"{timing.host_s * 1e6:.0f} µs", f"{timing.device_s * 1e6:.0f} µs"))
    return _table(rows)


# ---- Calls ----


def _ours(scales: bool) -> Callable[[nn.Module], Callable[[], Any]]:
    def prepare(model: nn.Module) -> Callable[[], Any]:
        device = next(model.parameters()).device
        window = AccumulationWindow(device)
        loss, num_targets = torch.ones((), device=device), torch.tensor(4, device=device)

        def call() -> Tensor:
            window.weigh(loss, num_targets)
            return window.close(model, MAX_NORM, scales=scales).grad_norm

        return call

    return prepare


def _torch(model: nn.Module) -> Callable[[], Any]:
    return lambda: nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)


def _three_passes(model: nn.Module) -> Callable[[], Any]:
    device = next(model.parameters()).device
    num_targets = torch.tensor(4, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        gradients = [p.grad for p in model.parameters()]
        torch._foreach_mul_(gradients, num_targets.reciprocal().to(gradients[0].dtype))
        return nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)

    return call


def _norm(model: nn.Module) -> Callable[[], Any]:
    return lambda: nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=True)


CALLS: tuple[tuple[str, Callable[[nn.Module], Callable[[], Any]], int, str], ...] = (
    ("torch's norm alone", _norm, 1, "1 read"),
    ("ours, folded", _ours(False), 1, "1 read"),
    ("ours", _ours(True), 3, "2 reads, 1 write"),
    ("torch's clip", _torch, 3, "2 reads, 1 write"),
    ("rescale, then torch's clip", _three_passes, 5, "3 reads, 2 writes"),
)
"""(name, model → call, passes over the gradients, the same in words)."""


# ---- Timing ----


def time_call(call: Callable[[], Any], device: torch.device, before: Callable[[], Any] | None = None) -> Timing:
    """Medians of ``NUM_REPEATS`` calls after three to warm up; ``before`` runs ahead of each, outside the time."""
    device_s, host_s = [], []
    for repeat in range(-3, NUM_REPEATS):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        started = time.perf_counter()
        call()
        elapsed = time.perf_counter() - started
        end.record()
        torch.cuda.synchronize(device)
        if repeat >= 0:
            host_s.append(elapsed)
            device_s.append(start.elapsed_time(end) / 1e3)
    timing = Timing(device_s=statistics.median(device_s), host_s=statistics.median(host_s))
    assert math.isfinite(timing.device_s)
    assert timing.device_s > 0
    return timing


def _ms(timing: Timing) -> str:
    return f"{timing.device_s * 1e3:.2f} ms"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return [f"| {' | '.join(cells)} |" for cells in lines]
