"""docs/performance.md from what was measured."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.performance import judge, window
from benchmarks.performance.gpu import render as gpu
from benchmarks.performance.methods import FOLDED, OURS
from benchmarks.performance.step import ACCUMULATIONS

Costs = dict[str, dict[str, dict[str, Any]]]
"""Layout → parameters → method → what ``window.record`` has made of it."""


def render(data: dict[str, Any]) -> str:
    """The page; parts that have not been measured say so."""
    windows, steps = data.get("windows", {}), data.get("steps", {})
    targets = judge.window_targets(windows) + judge.step_targets(steps)
    verdicts = [verdict for *_, verdict in targets]
    met, missed = verdicts.count(judge.MET), verdicts.count(judge.MISSED)
    sizes = {size for costs in windows.values() for size in costs}
    size = str(judge.TARGET_SIZE) if str(judge.TARGET_SIZE) in sizes else max(sizes, key=int, default="0")
    return page.fill(
        Path(__file__).with_name("page.md"),
        measured=page.provenance_text(data.get("measured", {})),
        steps_measured=page.provenance_text(data.get("steps_measured", {})),
        num_repeats=data.get("repeats"),
        num_pairs=data.get("pairs"),
        automodel=data.get("automodel") or "(not installed here, so not measured)",
        verdicts=f"{met} met, {missed} not met"
        + (f", {len(targets) - met - missed} not measured" if met + missed < len(targets) else ""),
        targets=page.table([_TARGETS, *targets]),
        counted_size=size,
        counts=page.table(_counts(windows, size)),
        most_on_four=window.MOST_ON_FOUR,
        times=page.folded("Each layout, size and method", page.table(_times(windows))),
        step_counts=page.table(_step_counts(steps)) if steps else page.NOT_MEASURED,
        step_times=page.table(_step_times(steps)) if steps else page.NOT_MEASURED,
        gpu=gpu.render(data.get("gpu")),
    )


_TARGETS = ("target", "CPU time of the processes", "of the training's thread", "collectives, theirs / ours", "")


def _counts(windows: Costs, size: str) -> Iterable[Sequence[Any]]:
    yield ("layout", "", "collectives", "host syncs", "calls", "reads / writes")
    for layout, sizes in windows.items():
        for name, cost in sizes.get(size, {}).items():
            if isinstance(cost, str):
                yield (f"`{layout}`", name, *[cost.partition(" ")[0]] * 4)
                continue
            calls = dict.fromkeys(str(c[name]["calls"]) for c in sizes.values() if isinstance(c.get(name), dict))
            traffic = f"{cost['reads']:.2g} / {cost['writes']:.2g}"
            yield (f"`{layout}`", name, cost["collectives"], cost["syncs"], " / ".join(calls), traffic)


def _times(windows: Costs) -> Iterable[Sequence[str]]:
    yield ("layout", "parameters", "", "CPU time", "beside ours", "beside ours, folded", "first call")
    for layout, sizes in windows.items():
        for size, costs in sizes.items():
            for name, cost in costs.items():
                where = (f"`{layout}`", size, name)
                if isinstance(cost, str):
                    yield (*where, cost.partition(" ")[0], "", "", "")
                    continue
                spreads = (_spread(cost[of]) if of in cost else "" for of in (f"beside {OURS}", f"beside {FOLDED}"))
                yield (*where, f"{cost['cpu_us']:.0f} µs", *spreads, f"{cost['first_s']:.2g} s")


def _spread(values: Sequence[float]) -> str:
    smallest, median, largest = values
    return f"{smallest:.2f} / **{median:.2f}** / {largest:.2f}"


def _step_counts(steps: dict[str, Any]) -> Iterable[Sequence[Any]]:
    yield ("layout", "", "ahead", "batch bytes", "syncs", "collectives")
    for layout, found in steps.items():
        for name, counts in found["counts"].items():
            named = ", ".join(f"{n} {kind}" for kind, n in counts["collectives"][str(max(ACCUMULATIONS))].items())
            syncs = f"{counts['syncs_per_micro_batch']:g} + {counts['syncs_per_step']:g}"
            of_batches = (counts["look_ahead"], f"{counts['live_batch_bytes']:,}")
            yield (f"`{layout}`", name, *of_batches, syncs, named or "none")


def _step_times(steps: dict[str, Any]) -> Iterable[Sequence[Any]]:
    ratios = ("CPU time, ours / stock", "counts first / stock", "wall time, ours / stock")
    yield ("layout", "accumulation", "ours, CPU", "stock, CPU", *ratios, "")
    for layout, found in steps.items():
        for accumulation, times in found["times"].items():
            medians = (f"{times['cpu_ms'][name]:.1f} ms" for name in ("ours", "stock"))
            spreads = (_spread(times[of]) if of in times else "" for of in ("cpu", "first", "wall"))
            yield (f"`{layout}`", accumulation, *medians, *spreads, judge.step_verdict(times))
