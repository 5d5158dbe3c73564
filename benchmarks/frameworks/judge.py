"""What counts as wrong."""

import math
from typing import Any

from tests.harness.framework_programs import CHECK, LAYOUTS, OURS, STOCK, TRUTH

TOLERANCE = 1e-4
"""Relative error of loss and gradient norm, above which a number is wrong: float32, and sums in another order."""
Row = dict[str, Any]
"""What was measured of a program."""


def truth(row: Row) -> Row | None:
    """Loss and gradient norm of the stock program with the whole batch in one micro-batch on one rank."""
    found = row.get(STOCK, {}).get(str(TRUTH))
    return found if is_measured(found) else None


def is_measured(cell: Any) -> bool:
    return isinstance(cell, dict) and "loss" in cell


def is_right(cell: Any, want: Row) -> bool:
    """True where both numbers are those of the whole batch."""
    return is_measured(cell) and all(
        math.isclose(float(cell[name]), float(want[name]), rel_tol=TOLERANCE) for name in ("loss", "grad_norm")
    )


def with_distances(row: Row) -> Row:
    """The row with how far our numbers are from the truth, relatively: a page's file rounds the numbers themselves."""
    want = truth(row)
    for cell in row.get(OURS, {}).values():
        if want is not None and is_measured(cell):
            cell["off"] = max(abs(float(cell[name]) / float(value) - 1) for name, value in want.items())
    return row


def faults(row: Row) -> list[str]:
    """What is not as promised. Where the stock program does not run, nothing is promised."""
    want = truth(row)
    if want is None:
        return [f"the stock program does not run: {row.get(STOCK, {}).get(str(TRUTH))}"]
    found = []
    for layout in map(str, LAYOUTS):
        stock, ours, check = (row.get(mode, {}).get(layout) for mode in (STOCK, OURS, CHECK))
        if not is_measured(stock):
            continue
        if not is_right(ours, want):
            found.append(f"ours, {layout}: {ours}, expected {want}")
        expected = "exact" if is_right(stock, want) else "wrong"
        if not check or check["answer"] != expected:
            found.append(f"check, {layout}: {check}, expected {expected}")
    return found
