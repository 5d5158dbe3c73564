"""Every head in every layout: ours beside the stock Trainer, against float64, in float32 and in half precision.

    python -m benchmarks.exactness [--part deepspeed] [--heads llama,bert] [--layouts ddp2,tp2] [--seed 1] [--out FILE]

Prints a line per head and layout, writes the page, and fails if a cell of ours is wrong, or crashes where the stock
Trainer does not. The data is drawn afresh on every call; ``--seed`` repeats one. ``--part`` keeps the other parts of
the page as they are, and so does DeepSpeed's part where DeepSpeed is not installed. ``whole_batch`` has a page of its
own beside FILE, ``whole_batch.md``.
"""

import argparse
import random
import sys
import time
from importlib.util import find_spec
from typing import Any

from benchmarks import page
from benchmarks.exactness import accumulation, deepspeed, float32, half, half_bounds, memory, whole_batch_page
from benchmarks.exactness.render import render
from tests.harness.heads import HEADS
from tests.harness.layouts import HEAD_LAYOUTS

PARTS = ("float32", "half", "deepspeed")
OWN_PAGE = "whole_batch"
"""A part beside those."""

Part = tuple[dict[str, Any], list[str]]
"""(what the page shows, what is not as promised)."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*PARTS, OWN_PAGE), help="measure this one alone (default: all)")
    parser.add_argument("--heads", help="comma-separated parts of head names (default: all)")
    parser.add_argument("--layouts", help="comma-separated layouts (default: all)")
    parser.add_argument("--seed", type=int, help="of the data (default: drawn)")
    page.add_arguments(parser)
    options = parser.parse_args(arguments)
    own_page = options.out and options.out.with_name(whole_batch_page.NAME)
    if options.render:
        if options.part != OWN_PAGE:
            page.publish(options.out, page.load(options.out), render)
        page.publish(own_page, page.load(own_page), whole_batch_page.render)
        return 0
    data = page.load(options.out)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    heads = [h for h in HEADS if not options.heads or any(part in h for part in options.heads.split(","))]
    layouts = [name for name in HEAD_LAYOUTS if not options.layouts or name in options.layouts.split(",")]
    print(f"seed {options.seed}: {len(heads)} heads x {len(layouts)} layouts", flush=True)

    started, faults = time.monotonic(), []
    for name, measure in zip(PARTS, (_float32, _half, _deepspeed), strict=True):
        if options.part in (None, name) and (name != "deepspeed" or find_spec("deepspeed")):
            measured = page.provenance("benchmarks.exactness", options, *(["deepspeed"] if name == "deepspeed" else []))
            part, found = measure(heads, layouts, options)
            data[name] = {"measured": measured, **part}
            faults += found
    if options.part != OWN_PAGE:
        page.publish(options.out, data, render)
    if options.part == OWN_PAGE or not (options.part or options.heads or options.layouts):
        measured = page.provenance("benchmarks.exactness", options)
        part, found = whole_batch_page.measure(options.seed)
        page.publish(own_page, {"measured": measured, **part}, whole_batch_page.render)
        faults += found
    print("\n".join([f"{time.monotonic() - started:.0f} s, {len(faults)} faults", *faults]))
    return 1 if faults else 0


def _float32(heads: list[str], layouts: list[str], options: argparse.Namespace) -> Part:
    cells = float32.measure_all(heads, layouts, options.seed)
    faults = float32.faults(cells) + ([] if options.heads else float32.unmeasured(cells, layouts))
    return {"layouts": float32.record(cells)}, faults


def _half(heads: list[str], layouts: list[str], options: argparse.Namespace) -> Part:
    """The matrix; and long accumulation and memory, unless a part was chosen."""
    cells = half.measure_all(heads, layouts, options.seed)
    found: dict[str, Any] = {"precisions": half_bounds.record(cells)}
    faults = half_bounds.faults(cells)
    if not (options.heads or options.layouts):
        accumulated, peaks = accumulation.measure(options.seed), memory.measure()
        found |= {"accumulation": accumulation.record(accumulated), "memory": memory.record(peaks)}
        faults += half_bounds.unmeasured(cells, layouts) + accumulation.faults(accumulated) + memory.faults(peaks)
    return found, faults


def _deepspeed(heads: list[str], layouts: list[str], options: argparse.Namespace) -> Part:
    """Stages of ZeRO have the place of layouts."""
    wide, half = deepspeed.measure_all(heads, options.seed)
    return {"float32": deepspeed.record(wide), "half": deepspeed.record(half)}, deepspeed.faults(wide, half)


if __name__ == "__main__":
    sys.exit(main())
