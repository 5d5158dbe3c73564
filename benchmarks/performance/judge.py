"""Promises for the costs: counts fail the command, targets for times inform."""

from typing import Any

from benchmarks.performance.methods import AUTOMODEL, FOLDED, OURS, TORCH, TRAINER
from benchmarks.performance.step import FIRST, StepCounts
from benchmarks.performance.window import Outcome

MOST_CALLS = 20
TRAFFIC = {OURS: (2.0, 1.0), FOLDED: (1.0, 0.0)}
"""Reads and writes of every gradient before the optimizer."""
LARGEST_NORM_ERROR = 1e-6

TARGET_SIZE = 300
TARGETS = (
    ("fsdp2x2", TORCH, 2.0),
    ("hsdp2x2", TORCH, 4.0),
    ("tp2_fsdp2x2", TORCH, 4.0),
    ("two_meshes2x2", TRAINER, 4.0),
    ("fsdp2x2", AUTOMODEL, 5.0),
    ("hsdp2x2", AUTOMODEL, 5.0),
    ("tp2_fsdp2x2", AUTOMODEL, 5.0),
    ("two_meshes2x2", AUTOMODEL, 5.0),
)
"""(layout, peer, how many times our CPU time it should take at ``TARGET_SIZE`` parameters)."""

MET, MISSED = "met", "**not met**"


# ---- Counts ----


def window_faults(windows: dict[tuple[str, int], dict[str, Outcome]]) -> list[str]:
    """Counts of ours that are above what is promised."""
    found = []
    for (layout, size), costs in windows.items():
        for name, (reads, writes) in TRAFFIC.items():
            cost = costs[name]
            where = f"{name}, {layout}, {size} parameters"
            if isinstance(cost, str):
                found.append(f"{where}: {cost}")
                continue
            num_collectives = 0 if layout == "one_rank" else 1
            if cost.collectives != num_collectives:
                found.append(f"{where}: expected {num_collectives} collectives, got {cost.collectives}")
            if cost.syncs:
                found.append(f"{where}: expected no host sync, got {cost.syncs}")
            if cost.calls > MOST_CALLS:
                found.append(f"{where}: expected at most {MOST_CALLS} calls, got {cost.calls}")
            if (cost.reads, cost.writes) != (reads, writes):
                found.append(
                    f"{where}: expected {reads:g} reads and {writes:g} writes, got {cost.reads:g} / {cost.writes:g}"
                )
            if not cost.norm_error <= LARGEST_NORM_ERROR:
                found.append(f"{where}: the norm is off by {cost.norm_error:.1e}")
    return found


def step_faults(steps: dict[str, dict[str, StepCounts]]) -> list[str]:
    """Counts of our Trainer's step that are above what is promised, or above the stock Trainer's."""
    found = []
    for layout, counts in steps.items():
        ours, stock = counts["ours"], counts["stock"]
        first = counts.get(FIRST)
        if first is not None and (first.syncs_per_micro_batch or first.syncs_per_step):
            found.append(f"Trainer, {layout}: expected no host syncs of counts first")
        for accumulation, collectives in first.collectives.items() if first is not None else ():
            most = sum(ours.collectives[accumulation].values()) + 1
            if sum(collectives.values()) > most:
                found.append(
                    f"Trainer, {layout}, accumulation {accumulation}: counts first cost more than one all-reduce"
                )
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


# ---- Times ----

Target = tuple[str, str, str, str, str]
"""(what is wanted, ratio of CPU times, the same for the training's thread, collectives of both, whether it is met)."""


def window_targets(windows: dict[str, Any]) -> list[Target]:
    """From what was recorded of layouts; judged by the second of the ratios, to the percent."""
    rows = []
    for layout, peer, least in TARGETS:
        costs = windows.get(layout, {}).get(str(TARGET_SIZE), {})
        ours, theirs = costs.get(OURS), costs.get(peer)
        wanted = f"`{layout}`, {TARGET_SIZE} parameters: {peer} takes ≥ {least:g} × ours"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            of_process, of_thread = (theirs[f"{of}beside {OURS}"][1] for of in ("", "thread "))
            collectives = f"{theirs['collectives']} / {ours['collectives']}"
            verdict = MET if round(of_thread, 2) >= least else MISSED
            rows.append((wanted, f"{of_process:.2f}", f"{of_thread:.2f}", collectives, verdict))
        else:
            rows.append((wanted, "not measured", "", "", ""))
    return rows


def step_targets(steps: dict[str, Any]) -> list[Target]:
    """The same of the Trainer's step: repeats tell a percent apart at best."""
    rows = []
    for layout, found in steps.items():
        for accumulation, times in found["times"].items():
            wanted = f"`{layout}`, accumulation {accumulation}: a step takes ≤ 1 × the stock Trainer's"
            rows.append((wanted, f"{times['cpu'][1]:.2f}", "", "", step_verdict(times)))
    return rows


def step_verdict(times: dict[str, Any]) -> str:
    return MET if round(times["cpu"][1], 2) <= 1 else MISSED
