"""The tables about DeepSpeed in docs/exactness.md, from what deepspeed.py has recorded."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import page
from benchmarks.exactness.deepspeed import HALF_ACCUMULATIONS
from benchmarks.exactness.float32 import ACCUMULATIONS, NOT_ADDITIVE, WRONG

Stages = dict[str, dict[str, Any]]
"""Stage → what ``record`` has made of it."""

CLASSES = {
    "causal": ("llama causal", "qwen3 causal", "gemma3 causal", "mixtral moe"),
    "causal, auxiliary loss": NOT_ADDITIVE,
    "causal, own or no count": ("gpt2 causal", "qwen2.5-vl causal", "qwen2.5-vl images"),
    "seq2seq": ("bart seq2seq", "t5 seq2seq", "whisper seq2seq"),
    "tokens": ("bart causal", "bert masked", "bert tokens", "electra discriminator"),
    "rows": (
        *("llama classes", "llama regression", "bert classes", "bert regression", "bert multi-label", "bert choices"),
        *("bert next sentence", "wav2vec2 audio classes", "wav2vec2 ctc mean"),
    ),
    "rows, stock exact": ("bert answers", "vit images", "wav2vec2 ctc sum"),
    "pixels, patches": ("segformer pixels", "beit pixels", "vit masked patches"),
    "plain module": ("plain module", "plain shifting module"),
}
"""Class → its heads."""


def places(data: dict[str, Any]) -> dict[str, str]:
    """What the template has places for."""
    wide, half = data.get("float32", {}), data.get("half", {})
    return {
        "deepspeed_measured": page.provenance_text(data.get("measured", {})),
        "deepspeed_summary": _summary(wide) if wide else page.NOT_MEASURED,
        "deepspeed_classes": _classes(wide) if wide else page.NOT_MEASURED,
        "deepspeed_heads": "\n\n".join(_heads(ranks, stages) for ranks, stages in wide.items()),
        "deepspeed_half": _half(half) if half else page.NOT_MEASURED,
        "deepspeed_half_accumulations": ", ".join(map(str, HALF_ACCUMULATIONS)),
        "deepspeed_half_heads": "\n\n".join(_half_heads(stages) for stages in half.values()),
    }


# ---- float32 ----


def _summary(wide: dict[str, Stages]) -> str:
    header = ("ranks", "ZeRO", "cells", "ours wrong", "ours, largest error of gradient, norm, loss")
    rows = [(*header, "stock wrong: gradient", "stock wrong: norm", "stock: no norm", "stock wrong: loss")]
    for ranks, stages in wide.items():
        for stage, found in stages.items():
            heads = found["heads"].values()
            largest = ", ".join(f"{float(value):.0e}" for value in found["largest"].values())
            wrong = sum(not float(error) <= WRONG for row in heads for error in _errors(row, "ours"))
            stock = found["stock wrong"]
            cells = sum(len(_errors(row, "ours")) for row in heads)
            of_stock = (stock[name] for name in ("gradient", "norm", "missing norm", "loss"))
            rows.append((ranks, stage, cells, wrong, largest, *of_stock))
    return page.table(rows)


def _classes(wide: dict[str, Stages]) -> str:
    """Ours at each stage, on any number of ranks; how many times too long stock's gradient is on two, at any stage."""
    names = list(next(iter(wide.values())))
    columns = [f"scale of stock, {n}" for n in ACCUMULATIONS]
    rows: list[tuple[Any, ...]] = [("kind", "heads", *(f"ours, ZeRO {name}" for name in names), *columns)]
    for name, heads in CLASSES.items():
        ours = [_largest(wide, stage, heads) for stage in names]
        measured = [
            row["stock"]["scale"]
            for found in wide["2"].values()
            for head, row in found["heads"].items()
            if head in heads and not isinstance(row["stock"], str)
        ]
        rows.append((name, len(heads), *ours, *map(_range, zip(*measured, strict=True))))
    return page.table(rows)


def _largest(wide: dict[str, Stages], stage: str, heads: Iterable[str]) -> str:
    found = [
        float(error)
        for stages in wide.values()
        for head, row in stages[stage]["heads"].items()
        if head in heads
        for error in _errors(row, "ours")
    ]
    return f"{max(found):.0e}" if found else "–"


def _range(factors: Iterable[Any]) -> str:
    texts = [f"{factor:.3g}" for factor in sorted(map(float, factors))]
    return f"× {texts[0]}" if texts[0] == texts[-1] else f"× {texts[0]} to {texts[-1]}"


def _heads(ranks: str, stages: Stages) -> str:
    columns = (f"stock, {n}" for n in ACCUMULATIONS)
    rows: list[tuple[str, ...]] = [("head", *(f"ours, ZeRO {stage}" for stage in stages), *columns)]
    crashes: list[str] = []
    for head in next(iter(stages.values()))["heads"]:
        of = {stage: found["heads"][head] for stage, found in stages.items()}
        ours = [_worst_of(_errors(row, "ours")) for row in of.values()]
        by_stage = [_errors(row, "stock") for row in of.values() if not isinstance(row["stock"], str)]
        stock = [_worst_of(map(float, errors)) for errors in zip(*by_stage, strict=True)]
        rows.append((head, *ours, *(stock or ["crashes"] * len(ACCUMULATIONS))))
        crashes += [
            f"{head}, ZeRO {stage}, {trainer}: {row[trainer]}"
            for stage, row in of.items()
            for trainer in ("ours", "stock")
            if isinstance(row[trainer], str)
        ]
    body = page.table(rows) + (f"\n\n{page.bullets(crashes)}" if crashes else "")
    return page.folded(f"{ranks} rank{'s' if ranks != '1' else ''}", body)


def _errors(row: dict[str, Any], trainer: str) -> list[float]:
    return [] if isinstance(row[trainer], str) else [float(error) for error in row[trainer]["error"]]


def _worst_of(errors: Iterable[float]) -> str:
    found = list(errors)
    if not found:
        return "crashes"
    worst = next((error for error in found if math.isnan(error)), max(found))
    return f"**{worst:.1e}**" if not worst <= WRONG else f"{worst:.1e}"


# ---- In half precision ----


def _half(half: dict[str, Stages]) -> str:
    header = ("precision, ZeRO", "cells", "ours, error / one process's at most", "scale off by at most")
    rows: list[tuple[Any, ...]] = [(*header, "norm off by at most", "scale of stock")]
    for stages in half.values():
        for stage, found in stages.items():
            cells = list(_beside_one_process(found))
            ratio, off = max(error / of for error, of, _, _ in cells), max(abs(s - of) for _, _, s, of in cells)
            norm = float(found["largest"]["norm"])
            scales = [
                float(s)
                for row in found["heads"].values()
                if not isinstance(row["stock"], str)
                for s in row["stock"]["scale"]
            ]
            rows.append((stage, len(cells), f"{ratio:.2f}", f"{off:.4f}", f"{norm:.4f}", _range(scales)))
    return page.table(rows)


def _beside_one_process(found: dict[str, Any]) -> Iterator[tuple[float, float, float, float]]:
    """Error and scale of each cell of ours, each followed by one process's."""
    for row in found["heads"].values():
        if not isinstance(row["ours"], str):
            parts = (row[who][what] for what in ("error", "scale") for who in ("ours", "one process"))
            for cell in zip(*parts, strict=True):
                error, of_one, scale, scale_of_one = map(float, cell)
                yield error, of_one, scale, scale_of_one


def _half_heads(stages: Stages) -> str:
    heads = list(next(iter(stages.values()))["heads"])
    rows: list[tuple[str, ...]] = [("precision, ZeRO", *heads)]
    for stage, found in stages.items():
        rows.append((stage, *(_half_cell(found["heads"][head]) for head in heads)))
    return page.folded("Errors of the gradient at accumulation 1, 4 (one process)", page.table(rows))


def _half_cell(row: dict[str, Any]) -> str:
    ours = ", ".join(f"{error:.1e}" for error in _errors(row, "ours")) or "crashes"
    return f"{ours} ({_errors(row, 'one process')[0]:.1e})"
