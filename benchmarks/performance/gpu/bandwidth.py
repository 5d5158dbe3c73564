"""Bytes over bandwidth: the norm, and the norm and the scale, against what a copy reaches in the same run."""

from collections.abc import Callable

import torch

from benchmarks.performance.gpu import clock, known_gradients
from benchmarks.performance.gpu.clock import Timing, ms
from benchmarks.performance.gpu.known_gradients import KnownGradients, Method, name_of, sizes_of
from benchmarks.performance.gpu.part import Part
from benchmarks.performance.methods import FOLDED, OURS

DTYPES = (torch.float32, torch.bfloat16)

TARGETS = ((FOLDED, "norm", 0.85), (OURS, "norm and scale", 0.80))
"""(name, what it does, how much of the copy's bandwidth it should reach)."""


def measure(device: torch.device, dtype: torch.dtype, num_elements: int) -> Part:
    """A table of the methods: milliseconds, bytes and, its value, the part of the copy's bandwidth."""
    found = Part("", "gradient bytes moved", "device", "of the copy's bandwidth")
    num_bytes = num_elements * dtype.itemsize
    copy_s = _copy_time(device, dtype, num_elements).device_s
    bandwidth = 2 * num_bytes / copy_s
    found.add("copy", "1 read, 1 write", ms(copy_s), f"{bandwidth / 1e12:.2f} TB/s")
    known = KnownGradients(sizes_of(num_elements), device, dtype)
    for name, method in known_gradients.methods().items():
        if name in (OURS, FOLDED):
            found.faults += known_gradients.faults(name, method, known)
        timing = clock.attempt(_timed(method, known), device)
        if isinstance(timing, str):
            found.add(name, method.text, timing)
            continue
        share = ""
        if method.num_passes is not None:
            found.values[name] = method.num_passes * num_bytes / timing.device_s / bandwidth
            share = f"{found.values[name]:.0%}"
        found.add(name, method.text, ms(timing.device_s), share)
    return found


def _copy_time(device: torch.device, dtype: torch.dtype, num_elements: int) -> Timing:
    source = torch.ones(num_elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return clock.time_call(lambda: target.copy_(source), device, is_queued=True)


def _timed(method: Method, known: KnownGradients) -> Callable[[], Timing]:
    return lambda: clock.time_call(method.prepare(known.model), known.device, before=known.fill, is_queued=True)


def target_rows(shares: dict[str, dict[str, float]]) -> list[tuple[str, float | None, float]]:
    """(what is wanted, what was measured, the least that meets it)."""
    rows = []
    for dtype in map(name_of, DTYPES):
        for name, what, least in TARGETS:
            share = shares.get(dtype, {}).get(name)
            rows.append((f"{what}, {dtype}: ≥ {least:.0%} of the copy's bandwidth", share, least))
    return rows
