"""All that is measured on a GPU, part by part; what was measured on one before stays where there is none."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.performance.gpu import bandwidth, clock, folding, launches, memory, streaming
from benchmarks.performance.gpu.known_gradients import fitting, name_of
from benchmarks.performance.gpu.part import Part
from benchmarks.performance.gpu.render import NO_GPU
from tests.harness.cuda_ranks import let_ranks_start_cuda

BUDGET_S = 400
"""Until the last row of the slow part begins, which takes a minute at most."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are for a GPU."""

    num_elements: int = 2**30
    num_parameters: tuple[int, ...] = (300, 3000)
    accumulation: int = 32
    layers: memory.Layers = field(default_factory=memory.Layers)
    images: streaming.Images = field(default_factory=streaming.Images)


def is_here() -> bool:
    """Tell if there is a GPU, and print that there is none."""
    if not torch.cuda.is_available():
        print(NO_GPU, flush=True)
    return torch.cuda.is_available()


def measure_into(data: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Put what the GPU shows into ``data``; what is not as promised."""
    device = torch.device("cuda", torch.cuda.current_device())
    parts, faults = measure(device, Sizes())
    machine = measured["machine"] | {"gpu": clock.description(device)}
    data["gpu"] = {"measured": measured | {"machine": machine}, "parts": parts}
    return faults


def measure(device: torch.device, sizes: Sizes) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """(name of a part → its tables, what is not as promised); prints every row as it comes."""
    started = time.monotonic()
    parts: dict[str, list[dict[str, Any]]] = {}
    faults: list[str] = []

    def add(name: str, of: str, measure: Callable[[], Part], **more: Any) -> Part:
        print(f"{time.monotonic() - started:.0f} s: {name}, {of}", flush=True)
        found = clock.attempt(measure, device)
        fault = found if isinstance(found, str) else ""
        if isinstance(found, str):
            print(found, flush=True)
            found = Part()
            found.faults = [f"{name}, {of}: {fault}"]
        parts.setdefault(name, []).append({"of": of, "rows": found.rows, "fault": fault, **more})
        faults.extend(found.faults)
        return found

    def fit(dtype: torch.dtype, num_copies: int) -> tuple[int, str]:
        num = fitting(sizes.num_elements, clock.free_bytes(device), dtype, num_copies)
        return num, f"{num / 1e9:.2f}B elements in {name_of(dtype)}"

    for dtype in bandwidth.DTYPES:
        num, of = fit(dtype, 2)
        found = add("bandwidth", of, partial(bandwidth.measure, device, dtype, num), dtype=name_of(dtype))
        parts["bandwidth"][-1]["shares"] = found.values
    for dtype in bandwidth.DTYPES:
        num, of = fit(dtype, folding.NUM_COPIES)
        add("folding", of, partial(folding.measure, device, dtype, num))
    of = f"Up to {max(sizes.num_parameters)} parameters"
    add("launches", of, partial(launches.measure, device, sizes.num_parameters))
    add("graphs", of, partial(launches.measure_graphs, device, sizes.num_parameters))
    clock.free_bytes(device)  # gives back what other processes need now
    if device.type == "cuda":
        warnings.simplefilter("default")  # a driver or a build of torch that was never tried here may warn
        let_ranks_start_cuda()
    micro_batches = f"accumulation {sizes.accumulation}"
    of = f"{sizes.images}, {micro_batches}"
    add("streaming", of, partial(streaming.measure, device, sizes.images, sizes.accumulation))
    of = f"{sizes.layers}, {micro_batches}"
    add("memory", of, partial(memory.measure, device, sizes.layers, sizes.accumulation, started + BUDGET_S))
    return parts, faults
