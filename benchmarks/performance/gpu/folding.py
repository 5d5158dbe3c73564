"""The window's end and a fused AdamW's step, with the scaling before the step and folded into it.

                 passes over as many elements as the gradients have
step             7    parameters and two moments read and written, gradients read
explicit    3 +  7    norm; scale; step
folded      1 +  8    norm; a step that writes the scaled gradients, too
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.performance.gpu import clock, known_gradients
from benchmarks.performance.gpu.clock import Timing, ms
from benchmarks.performance.gpu.known_gradients import KnownGradients, name_of, sizes_of
from benchmarks.performance.gpu.part import Part
from hf_gradutils.accelerator._optimizer import as_flag
from hf_gradutils.window import WindowReport

NUM_COPIES = 4
"""Parameters, gradients and two moments."""

EXPLICIT, FOLDED_STEP = "window's end, then step", "the same, folded"


def make_optimizer(known: KnownGradients, **options: bool) -> AdamW:
    return AdamW(known.model.parameters(), lr=1e-3, fused=True, **options)


def window_and_step(known: KnownGradients, optimizer: AdamW, *, folds: bool) -> Callable[[], Tensor]:
    """Step like ``GradUtilsOptimizer``: tensors on the device say if to skip and, folded, what to divide by."""
    end = known_gradients.window_end(known.model, scales=not folds)

    def call() -> Tensor:
        report = end()
        given = _orders(report, folds=folds)
        for name, value in given.items():
            setattr(optimizer, name, value)
        try:
            optimizer.step()
        finally:
            for name in given:
                delattr(optimizer, name)
        return report.grad_norm

    return call


def _orders(report: WindowReport, *, folds: bool) -> dict[str, Tensor]:
    orders = {"found_inf": as_flag(report.is_finite)}
    return orders | {"grad_scale": report.multiplier.reciprocal().to(torch.float32)} if folds else orders


def _three_passes_and_step(known: KnownGradients, optimizer: AdamW) -> Callable[[], Tensor]:
    clip = known_gradients.three_passes(known.model)

    def call() -> Tensor:
        norm = clip()
        optimizer.step()
        return norm

    return call


def measure(device: torch.device, dtype: torch.dtype, num_elements: int) -> Part:
    """A table of the ways to a step: milliseconds, passes, bytes over time."""
    known = KnownGradients(sizes_of(num_elements), device, dtype)
    optimizer = make_optimizer(known)
    calls = {
        "step alone": (lambda: optimizer.step, 7),
        EXPLICIT: (lambda: window_and_step(known, optimizer, folds=False), 10),
        FOLDED_STEP: (lambda: window_and_step(known, optimizer, folds=True), 9),
        "three passes, then step": (lambda: _three_passes_and_step(known, optimizer), 12),
    }
    found = Part("", "passes", "device", "beside explicit", "moved")
    for folds, name in ((False, EXPLICIT), (True, FOLDED_STEP)):
        faults = clock.attempt(functools.partial(_faults, name, known, optimizer, folds=folds), device)
        found.faults += [f"{name}, {name_of(dtype)}: {faults}"] if isinstance(faults, str) else faults
    outcomes = {
        name: clock.attempt(functools.partial(_timed, make, known), device) for name, (make, _) in calls.items()
    }
    found.values = {name: timing for name, timing in outcomes.items() if isinstance(timing, Timing)}
    for name, (_, num_passes) in calls.items():
        if name not in found.values:
            found.add(name, str(num_passes), str(outcomes[name]))
            continue
        device_s = found.values[name].device_s
        beside = f"{device_s / found.values[EXPLICIT].device_s:.2f}" if EXPLICIT in found.values else ""
        moved = num_passes * num_elements * dtype.itemsize / device_s
        found.add(name, str(num_passes), ms(device_s), beside, f"{moved / 1e12:.2f} TB/s")
    return found


def _timed(make: Callable[[], Callable[[], Any]], known: KnownGradients) -> Timing:
    return clock.time_call(make(), known.device, before=known.fill, is_queued=True)


def _faults(name: str, known: KnownGradients, optimizer: AdamW, *, folds: bool) -> list[str]:
    """A step that waits for the device, or that took other gradients than the clipped mean."""
    where = f"{name}, {name_of(known.dtype)}"
    call = window_and_step(known, optimizer, folds=folds)
    known.fill()
    call()
    state = optimizer.state[next(known.model.parameters())]
    found = []
    # The first moment of k equal gradients is 1 - beta1 ** k of them.
    share = 1 - optimizer.param_groups[0]["betas"][0] ** float(state["step"])
    error = known.error_of(state["exp_avg"][:7] / share)
    if not error <= 2 * known_gradients.ROUNDING[known.dtype]:  # the moment is rounded, too
        found.append(f"{where}: the step took gradients that are off by {error:.1e}")
    known.fill()
    # On the CPU, AdamW itself reads its counters on the host.
    if known.device.type != "cpu" and (reason := clock.why_it_waits(call, known.device)):
        found.append(f"{where}: waits for the device: {reason}")
    return found
