"""docs/frameworks.md from what was measured."""

from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.frameworks.judge import TOLERANCE, Row, is_measured, is_right, truth
from tests.harness.framework_materials import NUM_ROWS
from tests.harness.framework_programs import CHECK, LAYOUTS, OURS, PROGRAMS, STOCK

_COMMON = ("torch", "accelerate")
"""Versions that have a place above the table where they are the same in all rows."""


def render(data: dict[str, Any]) -> str:
    """The page; programs that have not been measured are not on it."""
    rows: dict[str, Row] = data.get("programs", {})
    return page.fill(
        Path(__file__).with_name("page.md"),
        num_rows=NUM_ROWS,
        tolerance=f"{TOLERANCE:g}",
        common=_common(rows),
        table=_table(rows) if rows else page.NOT_MEASURED,
        wrong=page.bullets(_wrong(rows)),
        errors=page.bullets(_errors(rows)),
    )


def _common(rows: dict[str, Row]) -> str:
    versions = {f"{name} {row['versions'][name]}" for row in rows.values() for name in _COMMON}
    return ", ".join(sorted(versions, reverse=True))


def _table(rows: dict[str, Row]) -> str:
    header = ("program", "line to change", *(f"stock, {layout}" for layout in LAYOUTS), "ours, largest error")
    return page.table([(*header, "check of stock", "measured"), *(_cells(key, row) for key, row in rows.items())])


def _cells(key: str, row: Row) -> tuple[str, ...]:
    program, want = PROGRAMS[key], truth(row)
    stock = (_numbers(row[STOCK].get(str(layout)), want) for layout in LAYOUTS)
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name not in _COMMON)
    return (program.name, program.line, *stock, _ours(row, want), _check(row), f"{row['date']}, {versions}")


def _numbers(cell: Any, want: Row | None) -> str:
    if not is_measured(cell):
        return "does not run"
    text = f"{float(cell['loss']):.4g}, {float(cell['grad_norm']):.4g}"
    return text if want and is_right(cell, want) else f"**{text}**"


def _ours(row: Row, want: Row | None) -> str:
    cells = {layout: row[OURS].get(str(layout)) for layout in LAYOUTS}
    measured = {layout: cell for layout, cell in cells.items() if is_measured(cell)}
    if want is None or not measured:
        return "does not run"
    largest = f"{max(cell['off'] for cell in measured.values()):.0e}"
    text = largest if all(is_right(cell, want) for cell in measured.values()) else f"**{largest}**"
    missing = [str(layout) for layout in cells if layout not in measured]
    return f"{text}; {', '.join(missing)} does not run" if missing else text


def _check(row: Row) -> str:
    answers = {str(layout): row[CHECK].get(str(layout), {}).get("answer", "") for layout in LAYOUTS}
    ran = {layout: answer for layout, answer in answers.items() if is_measured(row[STOCK].get(layout))}
    if len(set(ran.values())) == 1:
        return next(iter(ran.values()))
    return "; ".join(f"{layout}: {answer}" for layout, answer in ran.items()) or "does not run"


def _wrong(rows: dict[str, Row]) -> list[str]:
    """What the check said where it was not satisfied, once for all layouts in which it said the same."""
    lines = []
    for key, row in rows.items():
        said: dict[str, list[str]] = {}
        for layout, cell in row[CHECK].items():
            if cell["answer"] != "exact" and is_measured(row[STOCK].get(layout)):
                said.setdefault(cell["said"] or cell["answer"], []).append(layout)
        lines += [f"{PROGRAMS[key].name}, {' and '.join(layouts)}: “{text}”" for text, layouts in said.items()]
    return lines


def _errors(rows: dict[str, Row]) -> list[str]:
    """One line for a layout that runs in neither."""
    lines = []
    for key, row in rows.items():
        for layout in map(str, LAYOUTS):
            failed = {mode: row[mode][layout]["error"] for mode in (STOCK, OURS) if "error" in row[mode][layout]}
            if failed:
                lines.append(f"{PROGRAMS[key].name}, {layout}, {' and '.join(failed)}: `{next(iter(failed.values()))}`")
    return lines
