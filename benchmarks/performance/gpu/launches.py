"""Many small parameters: what a window's end costs in launches, and what a CUDA graph of it with the step saves."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.performance.gpu import clock, known_gradients
from benchmarks.performance.gpu.clock import us
from benchmarks.performance.gpu.folding import make_optimizer, window_and_step
from benchmarks.performance.gpu.known_gradients import KnownGradients
from benchmarks.performance.gpu.part import Part
from benchmarks.performance.methods import FOLDED, OURS

SMALL = 128
"""Elements of each parameter."""


def _add(found: Part, names: tuple[str, ...], make: Callable[[], Callable[[], Any]], known: KnownGradients) -> None:
    """One row: the times of a call on fresh gradients, and its kernels."""
    outcome = clock.attempt(functools.partial(_cells, make, known), known.device)
    found.add(*names, *([outcome] if isinstance(outcome, str) else outcome))


def _cells(make: Callable[[], Callable[[], Any]], known: KnownGradients) -> list[str]:
    call = make()
    idle, busy = (
        clock.time_call(call, known.device, before=known.fill, is_queued=is_queued) for is_queued in (False, True)
    )
    num = clock.attempt(functools.partial(clock.num_launches, call, known.device), known.device)
    return [us(idle.host_s), us(idle.device_s), us(busy.device_s), str(num)]


def measure(device: torch.device, num_parameters: tuple[int, ...]) -> Part:
    """A table of host and device microseconds of the methods."""
    found = Part("parameters", "", "host", "device, idle", "device, busy", "kernels")
    for num in num_parameters:
        known = KnownGradients([SMALL] * num, device, torch.float32)
        for name, method in known_gradients.methods().items():
            if name in (OURS, FOLDED):
                found.faults += known_gradients.faults(name, method, known)
            _add(found, (str(num), name), functools.partial(method.prepare, known.model), known)
    return found


def measure_graphs(device: torch.device, num_parameters: tuple[int, ...]) -> Part:
    """A table of the window's end with the step, as it is and as a graph."""
    found = Part("parameters", "", "", "host", "device, idle", "device, busy", "kernels")
    for num in num_parameters:
        known = KnownGradients([SMALL] * num, device, torch.float32)
        for name, folds in (("explicit", False), ("folded", True)):
            names = (str(num), f"{name}, step")
            make = functools.partial(window_and_step, known, make_optimizer(known), folds=folds)
            _add(found, (*names, "as it is"), make, known)
            graph = clock.attempt(functools.partial(_graph, known, folds=folds), device)
            if isinstance(graph, str):
                found.add(*names, "graph", graph)
                faults = [graph]
            else:
                replay, faults = graph
                _add(found, (*names, "graph"), lambda replay=replay: replay, known)
            found.faults += [f"{', '.join(names)}, as a graph: {fault}" for fault in faults]
    return found


def _graph(known: KnownGradients, *, folds: bool) -> tuple[Callable[[], Any], list[str]]:
    """A replay of a window's end and the step, and its broken promises."""
    optimizer = make_optimizer(known, capturable=True)
    replay = clock.captured(window_and_step(known, optimizer, folds=folds), known.device)
    first = next(known.model.parameters())
    num_steps = float(optimizer.state[first]["step"]) if first in optimizer.state else 0.0
    known.fill()
    replay()
    found = []
    if float(optimizer.state[first]["step"]) != num_steps + 1:
        found.append("a replay took no step")
    error = known.error_of(first.grad)  # of a folded step, too: it writes what it has scaled
    if not error <= known_gradients.ROUNDING[known.dtype]:
        found.append(f"scaled gradients are off by {error:.1e}")
    return replay, found
