"""Bounds for gradients in half precision.

Half precision rounds, so no gradient is exact. A cell is judged by two numbers that float64 gives:

    error    ‖g - g*‖ / ‖g*‖          at most MOST_TIMES the reference's
    scale    ⟨g, g*⟩ / ‖g*‖²          at most MOST_SCALE off the reference's: rounding averages out in it

The reference is the stock Trainer's cell where the stock Trainer is right (in float32, with the same data), and else
one process that computes the whole batch in the same precision, in plain torch. A gradient that is 1.05 times as long
has to fail in every cell, or the cell tells nothing and is a fault.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.exactness import float32
from benchmarks.page import short_reason

ACCUMULATIONS = (1, 4)
PRECISIONS = ("bf16", "fp16")
MOST_TIMES = {"stock": 1.2, "one process": 1.5, "one process with a router": 4.0}
"""By reference. A router that sends a token elsewhere for a last bit moves the gradient by more than rounding."""
MOST_SCALE = {"bf16": 0.02, "fp16": 0.005}
PLANTED = 1.05
"""A scale that has to fail."""
RIGHT = 1e-5
"""The stock Trainer is right where its relative error in float32 is not above this."""


@dataclass(frozen=True)
class Closeness:
    """How near one optimizer step's gradient is to float64's."""

    error: float
    scale: float

    def times(self, factor: float) -> "Closeness":
        """Of the gradient that is this many times as long."""
        # ‖f·g - g*‖² = f²·‖g‖² - 2f·⟨g, g*⟩ + ‖g*‖², in units of ‖g*‖²
        square_norm = self.error**2 + 2 * self.scale - 1
        square = factor**2 * square_norm - 2 * factor * self.scale + 1
        return Closeness(math.sqrt(max(square, 0.0)), factor * self.scale)


@dataclass(frozen=True)
class Cell:
    """One head in one layout, precision and accumulation, with activation checkpointing or without."""

    closeness: Closeness
    one_process: Closeness
    """Of one process with the whole batch in the same precision, in plain torch."""
    is_right_in_float32: bool
    """Relative error of the stock Trainer in float32 not above ``RIGHT``; False for ours, which nothing asks."""

    @property
    def is_right(self) -> bool:
        """For the stock Trainer. Right in float32 is not enough: under fp16 and native sharding it does not unscale."""
        return self.is_right_in_float32 and abs(self.closeness.scale - self.one_process.scale) < PLANTED - 1


Key = tuple[int, bool]
"""(accumulation, activation checkpointing)."""
Result = dict[Key, Cell] | str
"""The cells of a Trainer, or the reason of its crash."""
Cells = dict[tuple[str, str, str], dict[str, Result]]
"""(head, layout, precision) → trainer → result."""
KEYS: tuple[Key, ...] = tuple((n, checkpointing) for checkpointing in (False, True) for n in ACCUMULATIONS)


# ---- Judged ----


def reference_of(head: str, row: Mapping[str, Result], key: Key) -> tuple[str, Closeness]:
    """The reference of ours: its name, and its closeness."""
    ours, stock = row["ours"], row["stock"]
    assert not isinstance(ours, str)
    if not isinstance(stock, str) and stock[key].is_right:
        return "stock", stock[key].closeness
    return "one process with a router" if "moe" in head else "one process", ours[key].one_process


def why_wrong(got: Closeness, name: str, reference: Closeness, precision: str) -> str:
    """In which of the two numbers it is off; empty if in none."""
    if not got.error <= MOST_TIMES[name] * reference.error:
        return f"error {got.error:.1e}, {name} {reference.error:.1e}"
    if not abs(got.scale - reference.scale) <= MOST_SCALE[precision]:
        return f"scale {got.scale:.4f}, {name} {reference.scale:.4f}"
    return ""


def faults(cells: Cells) -> list[str]:
    """Cells in which ours is wrong, crashes where stock does not, or would pass with a planted scale."""
    found = []
    for (head, layout, precision), row in cells.items():
        ours = row["ours"]
        where = f"{head}, {layout}, {precision}"
        if isinstance(ours, str):
            if not isinstance(row["stock"], str):
                found.append(f"{where}: only ours crashes: {ours}")
            continue
        for key, cell in ours.items():
            reference = reference_of(head, row, key)
            place = f"{where}, accumulation {key[0]}{', checkpointing' if key[1] else ''}"
            if why := why_wrong(cell.closeness, *reference, precision):
                found.append(f"{place}: {why}")
            elif not why_wrong(cell.closeness.times(PLANTED), *reference, precision):
                found.append(f"{place}: a scale of {PLANTED} passes as well")
    return found


def is_off(head: str, row: Mapping[str, Result], trainer: str, key: Key, precision: str) -> bool:
    """Ours by its reference; stock by the one process, which is the same for both."""
    cells = row[trainer]
    assert not isinstance(cells, str)
    cell = cells[key]
    if trainer == "ours":
        return bool(why_wrong(cell.closeness, *reference_of(head, row, key), precision))
    return bool(why_wrong(cell.closeness, "one process", cell.one_process, precision))


def unmeasured(cells: Cells, layouts: Iterable[str]) -> list[str]:
    """Where nothing ran at all, which no table would show as a fault."""
    rows = {(head, f"{layout}, {precision}"): row for (head, layout, precision), row in cells.items()}
    return float32.unmeasured(rows, [f"{layout}, {precision}" for precision in PRECISIONS for layout in layouts])


# ---- Recorded ----


def record(cells: Cells) -> dict[str, Any]:
    """Precision → layout → what its table shows; ``off`` has the places in ``error`` of cells that are off."""
    precisions: dict[str, Any] = {}
    for (head, layout, precision), row in cells.items():
        of_layout = {"largest": {"error / reference": 0.0, "scale": 0.0}}
        found = precisions.setdefault(precision, {}).setdefault(layout, of_layout)
        if float32.is_out_of_reach(row):
            found.setdefault("neither", {})[head] = float32.why_neither_runs(row)
            continue
        found.setdefault("heads", {})[head] = {trainer: _record_of(head, row, trainer, precision) for trainer in row}
        for key, cell in row["ours"].items() if not isinstance(row["ours"], str) else ():
            _, reference = reference_of(head, row, key)
            ratio, offset = cell.closeness.error / reference.error, abs(cell.closeness.scale - reference.scale)
            for name, value in (("error / reference", ratio), ("scale", offset)):
                found["largest"][name] = max(value, found["largest"][name])
    return precisions


def _record_of(head: str, row: Mapping[str, Result], trainer: str, precision: str) -> dict[str, Any] | str:
    result = row[trainer]
    if isinstance(result, str):
        return short_reason(result)
    errors = [result[key].closeness.error if key in result else None for key in KEYS]
    return {
        "error": errors,
        "off": [i for i, key in enumerate(KEYS) if key in result and is_off(head, row, trainer, key, precision)],
    }
