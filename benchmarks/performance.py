"""What the exact gradient costs: ours beside what others do, counted and timed in the same run.

    python -m benchmarks.performance [--layouts "FSDP2 2"] [--sizes 300] [--no-trainer] [--only-cuda] [--out FILE]

Prints every measurement, writes the page, and fails if ours counts more collectives, host syncs, calls, gradient reads
or writes than promised. Times are shown beside their targets and fail nothing: they are noise on a busy machine.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import cuda_report, step_cost, window_cost
from benchmarks.sections import table
from benchmarks.step_cost import StepCounts, StepTimes
from benchmarks.window_cost import AUTOMODEL, FOLDED, OURS, TORCH, TRAINER, Cost, Outcome, ratios, thread_ratios

MOST_CALLS = 20
TRAFFIC = {OURS: (2.0, 1.0), FOLDED: (1.0, 0.0)}
"""Reads and writes of every gradient before the optimizer."""
LARGEST_NORM_ERROR = 1e-6

TARGET_SIZE = 300
TARGETS = (
    ("FSDP2 2", TORCH, 2.0),
    ("HSDP 2x2", TORCH, 4.0),
    ("FSDP2 x TP 2x2", TORCH, 4.0),
    ("two meshes 2x2", TRAINER, 4.0),
    ("FSDP2 2", AUTOMODEL, 5.0),
    ("HSDP 2x2", AUTOMODEL, 5.0),
    ("FSDP2 x TP 2x2", AUTOMODEL, 5.0),
    ("two meshes 2x2", AUTOMODEL, 5.0),
)
"""(layout, peer, how many times our CPU time it should take at ``TARGET_SIZE`` parameters)."""

Windows = dict[tuple[str, int], dict[str, Outcome]]
"""(layout, parameters) → method → cost."""
Steps = dict[str, dict[str, StepCounts]]
"""Layout → trainer → counts."""
Times = dict[tuple[str, int], dict[str, StepTimes]]
"""(layout, accumulation) → trainer → times."""


# ---- What must hold ----


def window_faults(windows: Windows) -> list[str]:
    """Counts of ours that are above what is promised."""
    found = []
    for (layout, size), costs in windows.items():
        for name, (reads, writes) in TRAFFIC.items():
            cost = costs[name]
            where = f"{name}, {layout}, {size} parameters"
            if isinstance(cost, str):
                found.append(f"{where}: {cost}")
                continue
            num_collectives = 0 if layout == "1 rank" else 1
            if cost.collectives != num_collectives:
                found.append(f"{where}: expected {num_collectives} collectives, got {cost.collectives}")
            if cost.syncs:
                found.append(f"{where}: expected no host sync, got {cost.syncs}")
            if cost.calls > MOST_CALLS:
                found.append(f"{where}: expected at most {MOST_CALLS} calls, got {cost.calls}")
            if (cost.reads, cost.writes) != (reads, writes):
                found.append(f"{where}: expected {reads:g} reads and {writes:g} writes, got {_traffic(cost)}")
            if not cost.norm_error <= LARGEST_NORM_ERROR:
                found.append(f"{where}: the norm is off by {cost.norm_error:.1e}")
    return found


def step_faults(steps: Steps) -> list[str]:
    """Counts of our Trainer's step that are above what is promised, or above the stock Trainer's."""
    found = []
    for layout, counts in steps.items():
        ours, stock = counts["ours"], counts["stock"]
        if ours.look_ahead > 1:
            found.append(f"Trainer, {layout}: expected 1 batch fetched ahead, got {ours.look_ahead}")
        for name in ("syncs_per_micro_batch", "syncs_per_step"):
            if getattr(ours, name):
                found.append(f"Trainer, {layout}: expected no {name}, got {getattr(ours, name):g}")
        for accumulation, collectives in ours.collectives.items():
            num_ours, num_stock = sum(collectives.values()), sum(stock.collectives[accumulation].values())
            if num_ours > num_stock:
                found.append(
                    f"Trainer, {layout}, accumulation {accumulation}: expected at most the stock Trainer's {num_stock} "
                    f"collectives, got {num_ours}"
                )
    return found


# ---- The page ----

_PAGE = """\
# Performance: what the exact gradient costs

`make bench` measures this anew and writes this page. {date}, {versions};
CPU with gloo, one thread per rank, {num_cpus} cores for all ranks, load {load:.1f} at the start.
Counts are exact and hold on any machine, and the command fails if ours break their promise. **Times are noisy** and
fail nothing: CPU time of the processes, added over the ranks, of {num_repeats} repeats in which everybody has a turn.
Ratios are of the turns of one repeat, as smallest / **median** / largest.

## Targets

{targets}

## The end of a window

Gradients are there; what is measured is the norm and the clip. Ours is `AccumulationWindow.close`: it also divides by
the window's targets and communicates targets and loss, for which others need a collective more, not counted here.
*Folded* leaves the multiplication to a fused optimizer (`fold_into_optimizer=True`), whose own write is not counted.

- *torch*: `torch.nn.utils.clip_grad_norm_`. *Trainer*: `transformers.Trainer._clip_grad_norm`.
- *accelerate*: `Accelerator.clip_grad_norm_`; measured on mixed gradients, because on others it is torch's function.
- *Automodel*: {automodel}
- Every parameter has 128 elements, so that calls are what costs. The norm of ours is checked against float64, to 1e-6.

### Counted, at {counted_size} parameters

*calls*: top-level operations of torch; where they differ, at each size measured (30, 300, 3000 parameters). *reads* and
*writes*: of all gradient bytes, copies of the gradients included, but for those that stay in a cache: on CPU a norm in
float64 is taken of a copy, of a chunk of one gradient, or of all of them together where they are as small as here.

{counts}

### Timed

How many times our CPU time others take. *First call*: CPU seconds of the slowest rank, in the order of the rows: what
torch remembers of an earlier row is not made again. Ours makes its plan then; torch works out how the result of each
operation on DTensors is sharded. On four ranks and 3000 parameters that took a minute, so only ours is measured above
{most_on_four} there.

{times}

{steps}
## On a GPU

{cuda}
"""

_STEPS = """\
## A step of the Trainer

`GradUtilsTrainer` beside `transformers.Trainer`: a Llama of 4 layers × 64, fused AdamW, clipping, no logging; {batch}
rows of {length} tokens per micro-batch, FSDP2 on CPU by the shim that the tests use.

### Counted, at accumulation {most}

*ahead*: batches fetched before their turn. *batch bytes*: of all batches alive while one is trained on, at most; no
other memory is measured. *syncs*: host syncs per micro-batch, and per step besides; the model's own and those of AdamW
on CPU (one per parameter, none on a GPU) are left out.
*collectives*: of a step, with those of DDP and FSDP2.

{counts}

### Timed

Our time over the stock Trainer's: 1.00 is equal, less is faster. {num_pairs} pairs of short runs that take turns,
without their first step.

{times}

"""


def page(windows: Windows, steps: Steps, times: Times, cuda: Sequence[str], load: float) -> str:
    """All of it, as Markdown."""
    packages = ("torch", "transformers", "accelerate")
    sizes = sorted({size for _, size in windows})
    counted_size = TARGET_SIZE if TARGET_SIZE in sizes else sizes[-1]
    text = _PAGE.format(
        date=datetime.datetime.now(datetime.UTC).date(),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        num_cpus=window_cost.num_cpus(),
        load=load,
        num_repeats=min(
            len(cost.cpu_s) for costs in windows.values() for cost in costs.values() if isinstance(cost, Cost)
        ),
        automodel=automodel_text(),
        counted_size=counted_size,
        counts=_table(_count_rows(windows, counted_size)),
        times=_table(_time_rows(windows)),
        most_on_four=window_cost.MOST_ON_FOUR,
        targets=_targets(windows, times),
        steps=_steps_section(steps, times) if steps else "",
        cuda="\n".join(cuda),
    )
    return text.rstrip() + "\n"


def automodel_text() -> str:
    """What of NeMo Automodel is measured."""
    if not window_cost.HAS_AUTOMODEL:
        return "NeMo Automodel is not installed here, so not measured (`pip install --no-deps nemo-automodel`)."
    version = importlib.metadata.version("nemo-automodel")
    return (
        f"`clip_grad_norm` of nemo-automodel {version}. By its source it has a fused kernel on a GPU, so its counts "
        "and times here say nothing about it there."
    )


def _count_rows(windows: Windows, size: int) -> Iterable[Sequence[str]]:
    yield ("layout", "", "collectives", "host syncs", "calls", "reads / writes")
    for (layout, of_size), costs in windows.items():
        for name, cost in costs.items() if of_size == size else ():
            if isinstance(cost, str):
                yield (layout, name, *[cost.partition(" ")[0]] * 4)
                continue
            calls = _calls(windows, layout, name)
            yield (layout, name, str(cost.collectives), str(cost.syncs), calls, _traffic(cost))


def _calls(windows: Windows, layout: str, method: str) -> str:
    """At all sizes, once if they are the same."""
    costs = [costs[method] for (of, _), costs in windows.items() if of == layout and method in costs]
    return " / ".join(dict.fromkeys(str(cost.calls) for cost in costs if isinstance(cost, Cost)))


def _traffic(cost: Cost) -> str:
    return f"{cost.reads:.2g} / {cost.writes:.2g}"


def _time_rows(windows: Windows) -> Iterable[Sequence[str]]:
    yield ("layout", "parameters", "", "CPU time", "beside ours", "beside ours, folded", "first call")
    for (layout, size), costs in windows.items():
        ours, folded = costs[OURS], costs[FOLDED]
        for name, cost in costs.items():
            if isinstance(cost, str):
                yield (layout, str(size), name, cost.partition(" ")[0], "", "", "")
            elif isinstance(ours, Cost) and isinstance(folded, Cost):
                spreads = [_spread(ratios(cost, own)) if name not in TRAFFIC else "" for own in (ours, folded)]
                yield (
                    layout,
                    str(size),
                    name,
                    f"{statistics.median(cost.cpu_s) * 1e6:.0f} µs",
                    *spreads,
                    f"{cost.first_s:.2g} s",
                )


def _spread(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{values[0]:.2f} / **{statistics.median(values):.2f}** / {values[-1]:.2f}"


MET, MISSED = "met", "**not met**"


def _targets(windows: Windows, times: Times) -> str:
    rows = target_rows(windows) + step_target_rows(times)
    verdicts = [verdict for *_, verdict in rows]
    met, missed = verdicts.count(MET), verdicts.count(MISSED)
    text = f"Judged by the median: {met} met, {missed} not met"
    text += f", {len(rows) - met - missed} not measured." if met + missed < len(rows) else "."
    header = ("target", "CPU time of the processes", "of the training's thread", "collectives, theirs / ours", "")
    return f"{text} {_TARGETS_NOTE}\n\n{_table([header, *rows])}"


_TARGETS_NOTE = """A window's end is judged by the CPU time of the training's
own thread. That of the processes has gloo's threads in it, too, which wait for each other's messages: four ranks on
few cores spend up to 1 ms of it in one small all-reduce, and not twice the same."""


def target_rows(windows: Windows) -> list[tuple[str, str, str, str, str]]:
    """(what is wanted, ratio of CPU times, the same for the training's thread, collectives of both, whether it is met).

    Judged by the second of the ratios.
    """
    rows = []
    for layout, peer, least in TARGETS:
        costs = windows.get((layout, TARGET_SIZE), {})
        ours, theirs = costs.get(OURS), costs.get(peer)
        wanted = f"{layout}, {TARGET_SIZE} parameters: {peer} takes ≥ {least:g} × ours"
        if isinstance(ours, Cost) and isinstance(theirs, Cost):
            median = statistics.median(ratios(theirs, ours))
            collectives = f"{theirs.collectives} / {ours.collectives}"
            of_thread = statistics.median(thread_ratios(theirs, ours))
            verdict = MET if round(of_thread, 2) >= least else MISSED
            rows.append((wanted, f"{median:.2f}", f"{of_thread:.2f}", collectives, verdict))
        else:
            rows.append((wanted, "not measured", "", "", ""))
    return rows


def step_target_rows(times: Times) -> list[tuple[str, str, str, str, str]]:
    """As :func:`target_rows`, of the Trainer's step; to the percent, which is what repeats tell apart at best."""
    rows = []
    for (layout, accumulation), by_trainer in times.items():
        wanted = f"{layout}, accumulation {accumulation}: our Trainer's step takes ≤ 1 × the stock Trainer's"
        median = statistics.median(step_ratios(by_trainer["ours"].cpu_s, by_trainer["stock"].cpu_s))
        rows.append((wanted, f"{median:.2f}", "", "", MET if round(median, 2) <= 1 else MISSED))
    return rows


def _steps_section(steps: Steps, times: Times) -> str:
    num_pairs = min((len(t["ours"].cpu_s) for t in times.values()), default=0)
    return _STEPS.format(
        batch=step_cost.BATCH,
        length=step_cost.LENGTH,
        most=max(step_cost.ACCUMULATIONS),
        counts=_table(_step_rows(steps)),
        num_pairs=num_pairs,
        times=_table(_step_time_rows(times)),
    )


def _step_rows(steps: Steps) -> Iterable[Sequence[str]]:
    yield ("layout", "", "ahead", "batch bytes", "syncs", "collectives")
    most = max(step_cost.ACCUMULATIONS)
    for layout, by_trainer in steps.items():
        for name, counts in by_trainer.items():
            named = ", ".join(f"{n} {kind}" for kind, n in counts.collectives[most].items()) or "none"
            syncs = f"{counts.syncs_per_micro_batch:g} + {counts.syncs_per_step:g}"
            yield (layout, name, str(counts.look_ahead), f"{counts.live_batch_bytes:,}", syncs, named)


def _step_time_rows(times: Times) -> Iterable[Sequence[str]]:
    yield ("layout", "accumulation", "ours, CPU", "stock, CPU", "CPU time, ours / stock", "wall time, ours / stock", "")
    for (layout, accumulation), by_trainer in times.items():
        ours, stock = by_trainer["ours"], by_trainer["stock"]
        cpu = step_ratios(ours.cpu_s, stock.cpu_s)
        wall = step_ratios(ours.wall_s, stock.wall_s)
        medians = [f"{statistics.median(t.cpu_s) * 1e3:.1f} ms" for t in (ours, stock)]
        verdict = MET if round(statistics.median(cpu), 2) <= 1 else MISSED
        yield (layout, str(accumulation), *medians, _spread(cpu), _spread(wall), verdict)


def step_ratios(ours: Sequence[float], stock: Sequence[float]) -> list[float]:
    return sorted(a / b for a, b in zip(ours, stock, strict=True))


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(rows))


# ---- The command ----


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", help="semicolon-separated layouts (default: all)")
    parser.add_argument("--sizes", help="comma-separated numbers of parameters (default: 30,300,3000)")
    parser.add_argument("--repeats", type=int, default=41, help="of every call of a window's end")
    parser.add_argument("--pairs", type=int, default=15, help="of runs of the Trainer")
    parser.add_argument("--no-trainer", action="store_true", help="leave out the step of the Trainer")
    parser.add_argument("--only-cuda", action="store_true", help="measure the GPU, and leave the rest of the page")
    parser.add_argument("--out", type=Path, default=None, help="the Markdown file to write (default: none)")
    options = parser.parse_args(arguments)
    if options.only_cuda:
        return 1 if cuda_report.replace_section(options.out) else 0
    layouts = [name for name in window_cost.LAYOUTS if not options.layouts or name in options.layouts.split(";")]
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else list(window_cost.SIZES)
    started, load = time.monotonic(), window_cost.load()
    print(f"Automodel: {automodel_text()}", flush=True)

    windows: Windows = {}
    for layout in layouts:
        for size in sizes:
            with contextlib.redirect_stdout(io.StringIO()):
                windows[layout, size] = window_cost.measure(layout, size, options.repeats)
            print("\n".join(_window_lines(layout, size, windows[layout, size])), flush=True)
    steps, times = {}, {}
    for layout in step_cost.SPREADS if not options.no_trainer else ():
        with contextlib.redirect_stdout(io.StringIO()):
            steps[layout] = step_cost.count(layout)
        print("\n".join(" ".join(row) for row in list(_step_rows({layout: steps[layout]}))[1:]), flush=True)
        for accumulation in step_cost.ACCUMULATIONS:
            with contextlib.redirect_stdout(io.StringIO()):
                times[layout, accumulation] = step_cost.time_steps(layout, accumulation, options.pairs)
            cell = {(layout, accumulation): times[layout, accumulation]}
            print(" ".join(list(_step_time_rows(cell))[1]), flush=True)
    cuda, cuda_faults = cuda_report.measured_or_kept(options.out)

    print("\n".join(" ".join(row) for row in target_rows(windows) + step_target_rows(times)))
    if options.out is not None:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(page(windows, steps, times, cuda, load))
        print(f"wrote {options.out}")
    found = window_faults(windows) + step_faults(steps) + cuda_faults
    print("\n".join([f"{time.monotonic() - started:.0f} s, {len(found)} faults", *found]))
    return 1 if found else 0


def _window_lines(layout: str, size: int, costs: dict[str, Outcome]) -> list[str]:
    lines = []
    for name, cost in costs.items():
        if isinstance(cost, str):
            text = cost[:100]
        else:
            text = f"{cost.collectives} collectives, {cost.syncs} syncs, {cost.calls} calls, {_traffic(cost)}"
            if name not in TRAFFIC and isinstance(costs[OURS], Cost):
                text += f", {_spread(ratios(cost, costs[OURS]))} of ours"
        lines.append(f"{layout:22}{size:5} {name:13}{text}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
