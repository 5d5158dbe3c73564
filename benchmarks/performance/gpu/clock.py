"""A call on a device: its times, launches, waits of the host, CUDA graph and memory.

All calls that only CUDA has are here. On the CPU a call is over when it returns, an operation of torch is its own
launch, a graph is the call itself, and memory is not counted.
"""

import math
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.harness.counting import events_of, num_host_syncs, top_level

NUM_WARM_UP = 3
NUM_REPEATS = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats."""

    device_s: float
    """Between two events on the device, before and after the call."""
    host_s: float
    """Of the call itself, which need not wait for the device."""


def time_call(
    call: Callable[[], Any], device: torch.device, before: Callable[[], Any] | None = None, *, is_queued: bool = False
) -> Timing:
    """Medians of :data:`NUM_REPEATS` calls.

    Args:
        call: What is timed.
        device: On which it works.
        before: Runs ahead of each call, outside the time.
        is_queued: The device is kept busy until the host is done, as it is in training: what is launched follows
            upon one another. Else it idles when the call begins, and waits for every launch that comes too late.
    """
    times: list[tuple[float, float]] = []
    for _ in range(NUM_WARM_UP + NUM_REPEATS):
        if before is not None:
            before()
        busy_s = min(2 * times[-1][1], _LONGEST_BUSY_S) if is_queued and times else 0.0
        times.append(_on_cuda(call, device, busy_s) if device.type == "cuda" else _on_cpu(call))
    device_s, host_s = (statistics.median(of_one) for of_one in zip(*times[NUM_WARM_UP:], strict=True))
    assert math.isfinite(device_s)
    assert device_s > 0
    return Timing(device_s=device_s, host_s=host_s)


_MOST_CYCLES_PER_S = 2e9
"""Of a GPU's clock."""
_LONGEST_BUSY_S = 0.2
"""A first call that compiles something takes long; the next will not."""


def _on_cuda(call: Callable[[], Any], device: torch.device, busy_s: float) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if busy_s:
        torch.cuda._sleep(int(busy_s * _MOST_CYCLES_PER_S))
    start.record()
    started = time.perf_counter()
    call()
    host_s = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3, host_s


def _on_cpu(call: Callable[[], Any]) -> tuple[float, float]:
    started = time.perf_counter()
    call()
    elapsed = time.perf_counter() - started
    return elapsed, elapsed


def num_launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels, copies and fills that a call has the device do, as torch's profiler sees them."""
    if device.type != "cuda":
        return len(top_level(events_of(call)))
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    found = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    assert found, "the profiler saw nothing on the device"
    return len(found)


def why_it_waits(call: Callable[[], Any], device: torch.device) -> str | None:
    """The reason why the host waits for the device in a call; None if it does not."""
    if device.type != "cuda":
        num_syncs = num_host_syncs(events_of(call))
        return f"{num_syncs} host syncs" if num_syncs else None
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Replays a call, from a CUDA graph of it."""
    if device.type != "cuda":
        return call
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    # It warns of a capturable optimizer that runs uncaptured: what is made once has to be there before the capture.
    with torch.cuda.stream(stream), warnings.catch_warnings(action="ignore"):
        for _ in range(NUM_WARM_UP):
            call()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(before)  # which a capture that fails leaves undone
    return graph.replay


# ---- Memory ----


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated; inf on a CPU."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


def reset_peak(device: torch.device) -> None:
    """Forget how much memory was in use at most."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Bytes of this process's tensors that were alive together since :func:`reset_peak`, at most; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


# ---- What is said ----


def description(device: torch.device) -> str:
    """The GPU in words; empty for a CPU."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:150]


def attempt(function: Callable[[], T], device: torch.device) -> T | str:
    """Call a function; its result, or "raises X: …". Memory that a failure holds is released."""
    try:
        return function()
    except Exception as error:  # of a peer, of memory, of a driver: a row says so, and the others are still measured
        traceback.print_exc()
        said = f"raises {type(error).__name__}: {first_line(error)}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return said
