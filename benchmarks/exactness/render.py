"""docs/exactness.md from what was measured."""

import collections
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.exactness import accumulation, deepspeed_tables, float32, half_bounds, memory
from benchmarks.trainings import TRAINERS
from hf_gradutils.accelerator._half_precision import MANY_MICRO_BATCHES

Layouts = dict[str, dict[str, Any]]
"""Layout → what ``record`` of float32.py or half_bounds.py has made of it."""


def render(data: dict[str, Any]) -> str:
    """The page; parts that have not been measured say so."""
    wide, half = data.get("float32", {}), data.get("half", {})
    deepspeed = data.get("deepspeed", {})
    precisions: dict[str, Layouts] = half.get("precisions", {})
    return page.fill(
        Path(__file__).with_name("page.md"),
        num_samples=float32.NUM_SAMPLES,
        not_additive=page.code(float32.NOT_ADDITIVE),
        accumulations=", ".join(map(str, float32.ACCUMULATIONS)),
        wrong=f"{float32.WRONG:.0e}",
        float32_measured=page.provenance_text(wide.get("measured", {})),
        float32_summary=_float32_summary(wide["layouts"]) if wide else page.NOT_MEASURED,
        float32_tables=_float32_tables(wide.get("layouts", {})),
        half_measured=page.provenance_text(half.get("measured", {})),
        half_summary=_half_summary(precisions) if half else page.NOT_MEASURED,
        half_tables="\n\n".join(_half_tables(name, layouts) for name, layouts in precisions.items()),
        times_stock=half_bounds.MOST_TIMES["stock"],
        times_alone=half_bounds.MOST_TIMES["one process"],
        times_routed=half_bounds.MOST_TIMES["one process with a router"],
        scales=" and ".join(f"{most} ({precision})" for precision, most in half_bounds.MOST_SCALE.items()),
        planted=half_bounds.PLANTED,
        many=MANY_MICRO_BATCHES,
        accumulation=_accumulation(half["accumulation"]) if "accumulation" in half else page.NOT_MEASURED,
        memory=_memory(half["memory"]) if "memory" in half else page.NOT_MEASURED,
        **deepspeed_tables.places(deepspeed),
    )


def _float32_summary(layouts: Layouts) -> str:
    header = ("layout", "heads", "cells", "ours wrong", "ours crashes")
    header += ("ours, largest error of gradient, norm, loss", "stock wrong", "stock crashes")
    rows = [header]
    for layout, found in layouts.items():
        heads = found.get("heads", {})
        wrong, crashes = (
            {trainer: sum(map(count, (row[trainer] for row in heads.values()))) for trainer in TRAINERS}
            for count in (_num_wrong, _is_crash)
        )
        largest = ", ".join(f"{value:.0e}" for value in found["largest"].values())
        of_ours = (len(heads), len(heads) * len(float32.ACCUMULATIONS), wrong["ours"], crashes["ours"])
        rows.append((f"`{layout}`", *of_ours, largest, wrong["stock"], crashes["stock"]))
    return page.table(rows)


def _is_crash(result: Any) -> bool:
    return isinstance(result, str)


def _num_wrong(result: list[Any] | str) -> int:
    return 0 if _is_crash(result) else sum(not float(error) <= float32.WRONG for error in result)


def _float32_tables(layouts: Layouts) -> str:
    columns = [str(n) for n in float32.ACCUMULATIONS]
    return "\n\n".join(_table(f"<code>{name}</code>", of, columns, _float32_cells) for name, of in layouts.items())


def _float32_cells(errors: list[Any]) -> Iterable[str]:
    return (_number(error, is_bold=not float(error) <= float32.WRONG) for error in errors)


def _number(error: float | str, *, is_bold: bool) -> str:
    text = f"{float(error):.1e}"
    return f"**{text}**" if is_bold else text


def _table(title: str, found: dict[str, Any], columns: list[str], cells: Callable[[Any], Iterable[str]]) -> str:
    """A table of heads, folded away; below it, by number, why some of them crash or run with neither Trainer."""
    rows = [("head", *(f"{trainer}, {column}" for trainer in TRAINERS for column in columns))]
    crashes: dict[str, int] = {}
    for head, row in found.get("heads", {}).items():
        texts: list[str] = []
        for trainer in TRAINERS:
            if isinstance(row[trainer], str):
                number = crashes.setdefault(row[trainer], len(crashes) + 1)
                texts += [f"crashes ({number})"] * len(columns)
            else:
                texts += cells(row[trainer])
        rows.append((head, *texts))
    neither = collections.defaultdict(list)
    for head, reason in found.get("neither", {}).items():
        neither["; stock: ".join(map(_first_sentence, reason.split("; stock: ")))].append(head)
    reasons = [f"({number}) {_first_sentence(reason)}" for reason, number in crashes.items()]
    reasons += [f"{', '.join(heads)}: {reason}" for reason, heads in neither.items()]
    return page.folded(title, page.table(rows) + (f"\n\n{page.bullets(reasons)}" if reasons else ""))


def _first_sentence(reason: str) -> str:
    return reason.partition(". ")[0].removesuffix(".")


def _half_summary(precisions: dict[str, Layouts]) -> str:
    header = ("precision", "layout", "heads", "cells", "ours off", "ours crashes")
    header += ("ours, error / reference at most", "ours, scale off by at most", "stock off", "stock crashes")
    rows = [header]
    for precision, layouts in precisions.items():
        for layout, found in layouts.items():
            ours, stock = ([row[trainer] for row in found.get("heads", {}).values()] for trainer in TRAINERS)
            num_cells = sum(error is not None for cell in ours if not _is_crash(cell) for error in cell["error"])
            off, crashes = ([sum(map(count, results)) for results in (ours, stock)] for count in (_num_off, _is_crash))
            largest = (f"{found['largest']['error / reference']:.2f}", f"{found['largest']['scale']:.4f}")
            of_ours = (len(ours), num_cells, off[0], crashes[0], *largest)
            rows.append((precision, f"`{layout}`", *of_ours, off[1], crashes[1]))
    return page.table(rows)


def _num_off(result: dict[str, Any] | str) -> int:
    return 0 if isinstance(result, str) else len(result["off"])


def _half_tables(precision: str, layouts: Layouts) -> str:
    columns = [f"{n}{', checkpointing' if checkpointing else ''}" for n, checkpointing in half_bounds.KEYS]
    tables = (_table(f"{precision}, <code>{name}</code>", of, columns, _half_cells) for name, of in layouts.items())
    return "\n\n".join(tables)


def _half_cells(cells: dict[str, Any]) -> Iterable[str]:
    for place, error in enumerate(cells["error"]):
        yield "–" if error is None else _number(error, is_bold=place in cells["off"])


def _accumulation(rows: list[dict[str, Any]]) -> str:
    header = ("head", "layout", *(f"{name}, {n}" for name in accumulation.SETTINGS for n in accumulation.ACCUMULATIONS))
    body = (
        (row["head"], f"`{row['layout']}`", *(f"{error:.1e}" for name in accumulation.SETTINGS for error in row[name]))
        for row in rows
    )
    return page.table([header, *body])


def _memory(rows: list[dict[str, Any]]) -> str:
    body = (
        (
            *(row[name] for name in memory.CASE[:-1]),
            "on" if row["checkpointing"] else "off",
            *(f"{row[way]:.2f}" for way in memory.WAYS),
        )
        for row in rows
    )
    return page.table([(*memory.CASE, *memory.WAYS), *body])
