"""The section "On a GPU" of docs/performance.md from what was measured."""

from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.performance.gpu.bandwidth import target_rows
from benchmarks.performance.gpu.clock import NUM_REPEATS
from benchmarks.performance.judge import MET, MISSED

NO_GPU = "No GPU here: nothing was measured on one."


def render(data: dict[str, Any] | None) -> str:
    """The section; one sentence where no GPU has been measured."""
    if not data:
        return NO_GPU
    return page.fill(
        Path(__file__).with_name("page.md"),
        measured=page.provenance_text(data["measured"]),
        num_repeats=NUM_REPEATS,
        targets=targets(data["parts"]["bandwidth"]),
        **{name: "\n\n".join(map(_part, parts)) for name, parts in data["parts"].items()},
    )


def _part(part: dict[str, Any]) -> str:
    return f"{part['of']}:\n\n{part['fault'] or page.table(part['rows'])}"


def targets(parts: list[dict[str, Any]]) -> str:
    """A table of what is wanted, what was measured and whether that is enough."""
    rows = [("target", "measured", "")]
    for wanted, share, least in target_rows({part["dtype"]: part["shares"] for part in parts}):
        measured = ("not measured", "") if share is None else (f"{share:.0%}", MET if share >= least else MISSED)
        rows.append((wanted, *measured))
    return page.table(rows)
