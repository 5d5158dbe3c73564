"""The part of docs/exactness.md about half precision: measured, judged and written."""

from collections.abc import Iterable, Sequence

from benchmarks import half_accumulation, half_memory
from benchmarks.half_exactness import (
    ACCUMULATIONS,
    DTYPES,
    MOST_SCALE,
    MOST_TIMES,
    PLANTED,
    TRAINERS,
    Cells,
    Key,
    Result,
    faults,
    measure_cells,
    reference_of,
    why_wrong,
)
from benchmarks.sections import Part, short_reason, table
from hf_gradutils.accelerator._half_precision import MANY_MICRO_BATCHES

KEYS: tuple[Key, ...] = tuple((n, checkpointing) for checkpointing in (False, True) for n in ACCUMULATIONS)

_BOUNDS = """\
Half precision rounds, so no gradient is exact, and each cell is held against what rounding does there: the stock
Trainer's cell where that one is right (in float32, with the same data, to 1e-5), else one process that computes the
whole batch in the same precision in plain torch. *Off* is a cell whose error ‖g − g*‖ / ‖g*‖ is above {times_stock} ×
stock's ({times_alone} × the one process's, {times_routed} × where a router may send a token elsewhere for a last
bit), or whose scale ⟨g, g*⟩ / ‖g*‖², in which rounding averages out, is further than {scales} from the reference's. A
gradient {planted} times as long has to be off in every cell, or the command fails.

Mixed precision as the Trainer switches it on, `bf16=True` or `fp16=True`: autocast, but under `fsdp2x2` and `hsdp2x2`
accelerate casts the weights. fp16 with a `GradScaler`, put in place by hand, since accelerate has one on accelerators
only; DDP with `ddp_find_unused_parameters=True`, which gradient checkpointing turns off. Stock is wrong where a
number is **bold**, by the bounds of the one process. `nan` and `inf`: the gradient itself overflows."""

_ACCUMULATION = """\
Models whose parameters are bfloat16 (`model.bfloat16()`), {num_samples} rows, `sync="defer"`: the relative error
against the same weights in float64, by what `.grad` accumulates in (`accumulate_in_float32=False` and `True`). A sum
of n gradients in bfloat16 adds about 1.1e-3 · √n. From {many} micro-batches on that is as much as computing in
bfloat16 is off, and `"auto"`, the default, accumulates in float32 and rounds when the window ends. It takes 2 bytes
more per parameter meanwhile; under FSDP2, where these are of whole gradients, only `True` does it.

torch lets a gradient be wider than its parameter (`Tensor.grad_dtype`), with these exceptions:

- DDP's buckets take gradients of the parameter's dtype only. The sum is rounded before the last micro-batch is added
  and averaged, and under `sync="every"` in every micro-batch.
- FSDP2 accumulates deferred gradients in float32 and reduces them in it on any torch; shards that were reduced
  already (`sync="every"`, `"reduce_scatter"`) before torch 2.15 in the parameter's dtype.
- Models that transformers has sharded itself (`DistributedConfig(fsdp_size=…)`) before torch 2.15, and FSDP1,
  accumulate in the parameter's dtype."""

_MEMORY = """\
MiB that a step of a Llama (4 layers × 128, {vocab} words, rows of {length} tokens; {parameters:.1f} M parameters)
takes at its peak beyond what was there before, AdamW, `bf16=True`, FSDP2: counted by the allocator of rank 0 in a
process group that communicates nothing. *rows* of a micro-batch. *every* and *defer* are ours with that `sync`,
*default* is ours with nothing set: `auto`, because gradients that are deferred in float32 take 2 bytes per parameter
more than stock's in bfloat16. It defers where that memory is free, as it is here, and takes no more than stock where
it is not."""


def measure(heads: Sequence[str], layouts: Sequence[str], seed: int, *, is_whole: bool) -> Part:
    """All of it; prints as it goes.

    Args:
        heads: Of ``tests/harness/heads.py``.
        layouts: Of ``tests/harness/trainer_cases.py``.
        seed: Of the data.
        is_whole: Measure long accumulation and memory as well.
    """
    cells: Cells = {}
    for precision in DTYPES:
        for layout in layouts:
            for head in heads:
                row = {trainer: measure_cells(head, layout, precision, trainer, seed) for trainer in TRAINERS}
                cells[head, layout, precision] = row
                texts = (f"{trainer}: {' '.join(_texts(head, row, trainer, precision))}" for trainer in TRAINERS)
                print(f"{precision:6}{layout:16}{head:24}" + "   ".join(texts), flush=True)
    part = Part(lines=[*_bounds(), "", *_summary(cells, layouts)], faults=faults(cells))
    for precision in DTYPES:
        for layout in layouts:
            part.lines += _section(cells, layout, precision)
    if is_whole:
        accumulated = half_accumulation.measure(seed)
        peaks = half_memory.measure()
        part.lines += [
            "",
            "### Long accumulation",
            "",
            *_accumulation(),
            "",
            *table(half_accumulation.rows(accumulated)),
        ]
        part.lines += ["", "### Peak memory", "", *_memory(), "", *table(half_memory.rows(peaks))]
        part.faults += unmeasured(cells, layouts)
        part.faults += half_accumulation.faults(accumulated) + half_memory.faults(peaks)
    return part


def unmeasured(cells: Cells, layouts: Sequence[str]) -> list[str]:
    """Where nothing ran at all, which no table would show as a fault."""
    ran = {(layout, precision) for (_, layout, precision), row in cells.items() if _runs(row)}
    wanted = [(layout, precision) for precision in DTYPES for layout in layouts]
    return [
        f"{layout}, {precision}: neither trainer ran, with any head"
        for layout, precision in wanted
        if (layout, precision) not in ran
    ]


def _bounds() -> list[str]:
    scales = " and ".join(f"{most} ({precision})" for precision, most in MOST_SCALE.items())
    text = _BOUNDS.format(
        times_stock=MOST_TIMES["stock"],
        times_alone=MOST_TIMES["one process"],
        times_routed=MOST_TIMES["one process with a router"],
        scales=scales,
        planted=PLANTED,
    )
    return text.splitlines()


def _accumulation() -> list[str]:
    text = _ACCUMULATION.format(num_samples=half_accumulation.NUM_SAMPLES, many=MANY_MICRO_BATCHES)
    return text.splitlines()


def _memory() -> list[str]:
    num_parameters = sum(p.numel() for p in half_memory.model_of_benchmark().parameters())
    text = _MEMORY.format(vocab=half_memory.VOCAB, length=half_memory.LENGTH, parameters=num_parameters / 1e6)
    return text.splitlines()


def _is_off(head: str, row: dict[str, Result], trainer: str, key: Key, precision: str) -> bool:
    """Ours by its reference; stock by the one process, which is the same for both."""
    cells = row[trainer]
    assert not isinstance(cells, str)
    cell = cells[key]
    if trainer == "ours":
        return bool(why_wrong(cell.closeness, *reference_of(head, row, key), precision))
    return bool(why_wrong(cell.closeness, "one process", cell.one_process, precision))


def _summary(cells: Cells, layouts: Sequence[str]) -> list[str]:
    rows = [
        (
            *("precision", "layout", "heads", "cells", "ours off", "ours crashes"),
            *("ours, error / reference at most", "ours, scale off by at most", "stock off", "stock crashes"),
        )
    ]
    for precision in DTYPES:
        for layout in layouts:
            chosen = {
                head: row for (head, of, in_), row in cells.items() if (of, in_) == (layout, precision) and _runs(row)
            }
            rows.append((precision, layout, *_counts(chosen, precision)))
    return table(rows)


def _runs(row: dict[str, Result]) -> bool:
    return not all(isinstance(result, str) for result in row.values())


def _counts(rows: dict[str, dict[str, Result]], precision: str) -> tuple[str, ...]:
    """Of the heads that run in one layout."""
    ratios, offsets, num_cells = [0.0], [0.0], 0
    off = dict.fromkeys(TRAINERS, 0)
    crashes = {trainer: sum(isinstance(row[trainer], str) for row in rows.values()) for trainer in TRAINERS}
    for head, row in rows.items():
        for trainer, result in row.items():
            if isinstance(result, str):
                continue
            off[trainer] += sum(_is_off(head, row, trainer, key, precision) for key in result)
            for key, cell in result.items() if trainer == "ours" else ():
                _, reference = reference_of(head, row, key)
                num_cells += 1
                ratios.append(cell.closeness.error / reference.error)
                offsets.append(abs(cell.closeness.scale - reference.scale))
    worst = (f"{max(ratios):.2f}", f"{max(offsets):.4f}")
    counts = (str(len(rows)), str(num_cells), str(off["ours"]), str(crashes["ours"]), *worst)
    return (*counts, str(off["stock"]), str(crashes["stock"]))


def _section(cells: Cells, layout: str, precision: str) -> list[str]:
    names = [f"{n}{', checkpointing' if checkpointing else ''}" for n, checkpointing in KEYS]
    rows: list[Sequence[str]] = [("head", *(f"{trainer}, {name}" for trainer in TRAINERS for name in names))]
    reasons: dict[str, int] = {}
    for (head, of, in_), row in cells.items():
        if (of, in_) == (layout, precision):
            rows.append(
                (head, *(text for trainer in TRAINERS for text in _texts(head, row, trainer, precision, reasons)))
            )
    numbered = [f"({number}) {reason}\\" for reason, number in reasons.items()]
    return ["", f"### {precision}, {layout}", "", *table(rows), *([""] if numbered else []), *numbered]


def _texts(
    head: str, row: dict[str, Result], trainer: str, precision: str, reasons: dict[str, int] | None = None
) -> Iterable[str]:
    """Of each key; crashes by the number of their reason."""
    result = row[trainer]
    for key in KEYS:
        if isinstance(result, str):
            word = "crashes" if _runs(row) else "n/a"
            yield (
                word
                if reasons is None
                else f"{word} ({reasons.setdefault(short_reason(result, 160), len(reasons) + 1)})"
            )
        elif key not in result:
            yield "–"
        else:
            number = f"{result[key].closeness.error:.1e}"
            yield f"**{number}**" if _is_off(head, row, trainer, key, precision) else number
