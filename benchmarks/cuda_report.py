"""The section ``## On a GPU`` of the page: measured where there is one, else kept from the page as it is."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import (
    cuda_bandwidth,
    cuda_folding,
    cuda_launches,
    cuda_memory,
    cuda_streaming,
    device_clock,
    sections,
    window_cost,
)
from benchmarks.known_gradients import fitting, name_of
from benchmarks.sections import Part
from tests.harness.cuda_ranks import let_ranks_start_cuda

HEADING = "## On a GPU"
NO_GPU = "No GPU here: nothing was measured on one."
BUDGET_S = 400
"""Until the last row of the slow part begins, which takes a minute at most."""

MET, MISSED = "met", "**not met**"


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are for a GPU."""

    num_elements: int = 2**30
    num_parameters: tuple[int, ...] = (300, 3000)
    accumulation: int = 32
    layers: cuda_memory.Layers = field(default_factory=cuda_memory.Layers)
    images: cuda_streaming.Images = field(default_factory=cuda_streaming.Images)


def report(device: torch.device | None = None, sizes: Sizes | None = None) -> tuple[list[str], list[str]]:
    """(lines of Markdown, what is not as promised); prints every row as it comes."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    sizes = sizes or Sizes()
    started = time.monotonic()
    body: list[str] = []
    faults: list[str] = []

    def add(title: str, measure: Callable[[], Part], explanation: str) -> Part:
        print(f"{time.monotonic() - started:.0f} s: {title}", flush=True)
        found = device_clock.attempt(measure, device)
        if isinstance(found, str):
            print(found, flush=True)
            found = Part(lines=[found], faults=[f"{title}: {found}"])
        body.extend([f"### {title}", "", *found.lines, "", *explanation.splitlines(), ""])
        faults.extend(found.faults)
        return found

    def fit(dtype: torch.dtype, num_copies: int) -> tuple[int, str]:
        num = fitting(sizes.num_elements, device_clock.free_bytes(device), dtype, num_copies)
        return num, f"{num / 1e9:.2f}B elements in {name_of(dtype)}"

    shares = {}
    for dtype in cuda_bandwidth.DTYPES:
        num, text = fit(dtype, 2)
        measure = partial(cuda_bandwidth.measure, device, dtype, num)
        shares[dtype] = add(f"Norm and scale: {text}", measure, cuda_bandwidth.EXPLANATION).values
    for dtype in cuda_bandwidth.DTYPES:
        num, text = fit(dtype, cuda_folding.NUM_COPIES)
        measure = partial(cuda_folding.measure, device, dtype, num)
        add(f"The optimizer step, folded or not: {text}", measure, cuda_folding.EXPLANATION)
    small = f"parameters of {cuda_launches.SMALL} elements in float32"
    measure = partial(cuda_launches.measure, device, sizes.num_parameters)
    add(f"Launches: {small}", measure, cuda_launches.EXPLANATION)
    measure = partial(cuda_launches.measure_graphs, device, sizes.num_parameters)
    add(f"CUDA graphs: {small}", measure, cuda_launches.GRAPH_EXPLANATION)
    device_clock.free_bytes(device)  # gives back what other processes need now
    if device.type == "cuda":
        warnings.simplefilter("default")  # what a driver, or a build of torch that nobody here has seen, warns of
        let_ranks_start_cuda()
    measure = partial(cuda_streaming.measure, device, sizes.images, sizes.accumulation)
    add("Batches in memory", measure, cuda_streaming.explanation(sizes.images, sizes.accumulation))
    measure = partial(cuda_memory.measure, device, sizes.layers, sizes.accumulation, started + BUDGET_S)
    add("Sync policies in memory", measure, cuda_memory.explanation(sizes.layers, sizes.accumulation))

    print(f"{time.monotonic() - started:.0f} s: targets", flush=True)
    targets = target_lines(shares)
    return [*_head(device), "", "### Targets", "", *targets, "", *body], faults


_HEAD = """\
`make bench` measures this where there is a GPU. {description}; medians of {num_repeats} calls.

- *ours*, *ours, folded*: `AccumulationWindow.close` as above, on one rank, with a micro-batch that is weighed before.
- *torch*: `torch.nn.utils.clip_grad_norm_`. *three passes*: gradients are divided by the targets first, then the same.
- *Automodel*: {automodel}
- The command fails if a norm of ours is off by more than 1e-6 (float32) or 1e-5 (bfloat16), if gradients are not scaled
  right, or if anything in ours makes the host wait for the device (`torch.cuda.set_sync_debug_mode`).
"""


def _head(device: torch.device) -> list[str]:
    return _HEAD.format(
        description=device_clock.description(device),
        num_repeats=device_clock.NUM_REPEATS,
        automodel="its `clip_grad_norm`." if window_cost.HAS_AUTOMODEL else "not installed here.",
    ).splitlines()


def target_lines(shares: dict[torch.dtype, dict[str, float]]) -> list[str]:
    """A table of what is wanted, what was measured and whether that is enough."""
    table = sections.Table("target", "measured", "")
    for wanted, share, least in cuda_bandwidth.target_rows(shares):
        measured = ("not measured",) if share is None else (f"{share:.0%}", MET if share >= least else MISSED)
        table.add(wanted, *measured)
    return table.lines()


# ---- The page ----


def measured_or_kept(page: Path | None) -> tuple[list[str], list[str]]:
    """:func:`report`; without a GPU what the page says of an earlier one, and :data:`NO_GPU` if it says nothing."""
    if torch.cuda.is_available():
        return report()
    print(NO_GPU, flush=True)
    return sections.section(_text(page), HEADING) or [NO_GPU], []


def replace_section(page: Path | None) -> int:
    """Measure, and write nothing but this section; returns the number of faults."""
    if not torch.cuda.is_available():
        print(NO_GPU, flush=True)
        return 1
    lines, faults = report()
    if page is not None:
        page.parent.mkdir(exist_ok=True)
        page.write_text(sections.with_section(_text(page), HEADING, lines))
        print(f"wrote {HEADING!r} of {page}")
    print("\n".join([f"{len(faults)} faults", *faults]), flush=True)
    return len(faults)


def _text(page: Path | None) -> str:
    return page.read_text() if page is not None and page.exists() else ""
