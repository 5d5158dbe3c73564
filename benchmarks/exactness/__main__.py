"""Every head in every layout: ours beside the stock Trainer, against float64, in float32 and in half precision.

    python -m benchmarks.exactness [--part float32] [--heads llama,bert] [--layouts ddp2,tp2] [--seed 1] [--out FILE]

Prints a line per head and layout, writes the page, and fails if a cell of ours is wrong, or crashes where the stock
Trainer does not. The data is drawn afresh on every call; ``--seed`` repeats one. ``--part`` keeps the other part of
the page as it is.
"""

import argparse
import random
import sys
import time
from typing import Any

from benchmarks import page
from benchmarks.exactness import accumulation, float32, half, half_bounds, memory
from benchmarks.exactness.render import render
from tests.harness.heads import HEADS
from tests.harness.layouts import HEAD_LAYOUTS

Part = tuple[dict[str, Any], list[str]]
"""(what the page shows, what is not as promised)."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("float32", "half"), help="measure this one alone (default: both)")
    parser.add_argument("--heads", help="comma-separated parts of head names (default: all)")
    parser.add_argument("--layouts", help="comma-separated layouts (default: all)")
    parser.add_argument("--seed", type=int, help="of the data (default: drawn)")
    page.add_arguments(parser)
    options = parser.parse_args(arguments)
    data = page.load(options.out)
    if options.render:
        page.publish(options.out, data, render)
        return 0
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    heads = [h for h in HEADS if not options.heads or any(part in h for part in options.heads.split(","))]
    layouts = [name for name in HEAD_LAYOUTS if not options.layouts or name in options.layouts.split(",")]
    print(f"seed {options.seed}: {len(heads)} heads x {len(layouts)} layouts", flush=True)

    started, faults = time.monotonic(), []
    measured = page.provenance("benchmarks.exactness", options)
    for name, measure in (("float32", _float32), ("half", _half)):
        if options.part in (None, name):
            part, found = measure(heads, layouts, options)
            data[name] = {"measured": measured, **part}
            faults += found
    page.publish(options.out, data, render)
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


if __name__ == "__main__":
    sys.exit(main())
