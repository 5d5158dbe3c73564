"""docs/whole_batch.md from what was measured."""

from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.exactness import router, sentences, whole_batch, whole_batch_cost

NAME = "whole_batch.md"
"""Of the page, beside that of the matrix."""


def measure(seed: int) -> tuple[dict[str, Any], list[str]]:
    """What the page shows, and what is not as promised."""
    cells, routed = whole_batch.measure(seed), whole_batch.measure_routers(seed)
    cost = whole_batch_cost.measure()
    found = {
        "cells": cells,
        "routers": routed,
        "distances": router.measure(seed),
        "cost": cost,
        "sentences": (of_sentences := sentences.measure()),
    }
    return found, whole_batch.faults(cells, routed) + whole_batch_cost.faults(cost) + _faults(of_sentences)


def _faults(of_sentences: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in of_sentences:
        loss, error = row["ours"]
        loss_error = abs(loss - row["whole"]) / abs(row["whole"])
        if not max(error, loss_error) < whole_batch.WRONG:
            found.append(
                f"{row['loss']} of sentence-transformers, {row['ranks']} ranks × {row['micro-batches']}: "
                f"{error:.0e}, loss {loss_error:.0e}"
            )
    if all(row["stock"][1] < whole_batch.WRONG for row in of_sentences):
        found.append("sentence-transformers: stock is right, which shows nothing")
    return found


def render(data: dict[str, Any]) -> str:
    """The page; parts that have not been measured say so."""
    cost = data.get("cost")
    return page.fill(
        Path(__file__).with_name(NAME),
        measured=page.provenance_text(data.get("measured", {})),
        num_samples=whole_batch.NUM_SAMPLES,
        wrong=f"{whole_batch.WRONG:.0e}",
        cells=_cells(data["cells"]) if "cells" in data else page.NOT_MEASURED,
        routers=_routers(data["routers"]) if "routers" in data else page.NOT_MEASURED,
        distances=page.folded("Distance of the mean, by model, routing and tokens", router.table(data["distances"]))
        if "distances" in data
        else page.NOT_MEASURED,
        sentences=sentences.table(data["sentences"]) if "sentences" in data else page.NOT_MEASURED,
        batch=whole_batch_cost.BATCH,
        kept=whole_batch_cost.bytes_of_rows() // 2**10,
        num_micro_batches=whole_batch_cost.NUM_MICRO_BATCHES,
        num_rounds=whole_batch_cost.NUM_ROUNDS,
        parameters=f"{cost['parameters'] / 1e6:.0f}" if cost else "?",
        work=_work(cost) if cost else page.NOT_MEASURED,
        calls=_calls(cost["calls"]) if cost else page.NOT_MEASURED,
    )


def _cells(cells: whole_batch.Cells) -> str:
    cuts = (f"{layout.replace('_', ' ')}, {n}" for layout, n in whole_batch.CUTS)
    rows: list[tuple[Any, ...]] = [("head", "", *cuts)]
    for name, of_head in cells.items():
        for column, row in of_head.items():
            blank = [""] * (len(whole_batch.CUTS) - len(row))
            rows.append((f"`{name}`", column, *whole_batch.shown(row), *blank))
    return page.table(rows)


def _routers(routed: whole_batch.Routed) -> str:
    header = ("layout", "coefficient", *whole_batch.ROUTED)
    body = (
        (f"`{row['layout']}`", f"{row['coefficient']:g}", *whole_batch.shown([row[c] for c in whole_batch.ROUTED]))
        for row in routed
    )
    return page.table([header, *body])


def _work(cost: dict[str, Any]) -> str:
    header = ("", "forwards", "rows through the model", "activations kept", "CPU time of a step", "beside one pass")
    rows: list[tuple[Any, ...]] = [header]
    for name, of in cost["work"].items():
        times = cost["times"][name]
        least, median, most = times["beside one pass"]
        beside = "" if name == whole_batch_cost.ONE_PASS else f"{least:.2f} / **{median:.2f}** / {most:.2f}"
        size = f"{of['activations'] / 2**20:.2f} MiB"
        rows.append((name, f"{of['forwards']:g}", f"{of['rows']:g}", size, f"{times['seconds']:.2f} s", beside))
    return page.table(rows)


def _calls(calls: dict[str, dict[str, Any]]) -> str:
    names = sorted({name for of in calls.values() for found in of.values() for name in found["collectives"]})
    rows: list[tuple[Any, ...]] = [("", "micro-batches", *names, "host syncs")]
    for name, of in calls.items():
        for number, found in of.items():
            rows.append((name, number, *(found["collectives"].get(n, 0) for n in names), found["syncs"]))
    return page.table(rows)
