"""The cost of the exact gradient: ours beside what others do, counted and timed in the same run.

    python -m benchmarks.performance [--layouts fsdp2x2] [--sizes 300] [--no-trainer] [--only-cuda] [--out FILE]

Prints every measurement, writes the page, and fails if ours counts more collectives, host syncs, calls, gradient reads
or writes than promised. Times are shown beside their targets and fail nothing: they are noise on a busy machine.
"""

import argparse
import importlib.metadata
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks import page
from benchmarks.performance import judge, step, window
from benchmarks.performance.gpu import report as gpu
from benchmarks.performance.methods import HAS_AUTOMODEL
from benchmarks.performance.render import render
from benchmarks.trainings import silence

MODULE = "benchmarks.performance"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", help="comma-separated layouts (default: all)")
    parser.add_argument("--sizes", help="comma-separated numbers of parameters (default: 30,300,3000)")
    parser.add_argument("--repeats", type=int, default=41, help="of every call of a window's end")
    parser.add_argument("--pairs", type=int, default=15, help="of runs of the Trainer")
    parser.add_argument("--no-trainer", action="store_true", help="leave out the step of the Trainer")
    parser.add_argument("--only-trainer", action="store_true", help="measure that, and leave the rest of the page")
    parser.add_argument("--only-cuda", action="store_true", help="measure the GPU, and leave the rest of the page")
    page.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.only_cuda and not gpu.is_here():
        return 1
    data = page.load(options.out)
    started, faults = time.monotonic(), []
    if not options.render:
        measured = page.provenance(MODULE, options)
        if not options.only_cuda:
            if not options.only_trainer:
                faults = _windows(data, options)
                data |= {"measured": measured, "repeats": options.repeats}
            if not options.no_trainer:
                faults += _steps(data, options)
                data |= {"steps_measured": measured, "pairs": options.pairs}
            targets = judge.window_targets(data.get("windows", {})) + judge.step_targets(data.get("steps", {}))
            print("\n".join(" ".join(row) for row in targets))
        faults += gpu.measure_into(data, measured) if gpu.is_here() else []
    page.publish(options.out, data, render)
    print("\n".join([f"{time.monotonic() - started:.0f} s, {len(faults)} faults", *faults]))
    return 1 if faults else 0


def _windows(data: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Measure the ends of windows into ``data``; what is not as promised."""
    layouts = [name for name in window.LAYOUTS_MEASURED if not options.layouts or name in options.layouts.split(",")]
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else window.SIZES
    data["automodel"] = importlib.metadata.version("nemo-automodel") if HAS_AUTOMODEL else None
    data["windows"] = {layout: {} for layout in layouts}
    faults = []
    for layout in layouts:
        for size in sizes:
            with silence():
                costs = window.measure(layout, size, options.repeats)
            found = data["windows"][layout][str(size)] = window.record(costs)
            print("\n".join(f"{layout:22}{size:5} {name:13}{_line(cost)}" for name, cost in found.items()), flush=True)
            faults += judge.window_faults({(layout, size): costs})
    return faults


def _steps(data: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The same of the Trainer's steps."""
    faults, data["steps"] = [], {}
    for layout in step.LAYOUTS_MEASURED:
        with silence():
            counts = step.count(layout)
        print("\n".join(f"{layout:22}{name:6}{of}" for name, of in counts.items()), flush=True)
        faults += judge.step_faults({layout: counts})
        found = data["steps"][layout] = {"counts": {name: asdict(of) for name, of in counts.items()}, "times": {}}
        for accumulation in step.ACCUMULATIONS:
            with silence():
                times = step.record(step.time_steps(layout, accumulation, options.pairs))
            found["times"][str(accumulation)] = times
            print(f"{layout:22}accumulation {accumulation}: {times}", flush=True)
    return faults


def _line(cost: dict[str, Any] | str) -> str:
    if isinstance(cost, str):
        return cost[:100]
    counted = (f"{cost[name]:g} {name}" for name in ("collectives", "syncs", "calls", "reads", "writes"))
    return ", ".join([*counted, f"{cost['cpu_us']:.0f} µs"])


if __name__ == "__main__":
    sys.exit(main())
