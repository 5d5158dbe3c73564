"""Every head in every layout: ours beside the stock Trainer, against float64, in float32 and in half precision.

    python -m benchmarks.exactness [--part float32] [--heads llama,bert] [--layouts ddp2,tp2] [--seed 1] [--out FILE]

Prints a line per head and layout, writes the tables, and fails if a cell of ours is wrong, or crashes where the stock
Trainer does not. The data is drawn afresh on every call; ``--seed`` repeats one. ``--part`` leaves the other part as
it is.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import logging
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from benchmarks import half_report
from benchmarks.sections import section, short_reason, with_section
from hf_gradutils import GradUtilsTrainer
from tests.harness.gradients import norm_of, relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import HEAD_LAYOUTS, LAYOUTS
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainer_cases import make_data, micro_batches_of, train, truth_of_micro_batches

ACCUMULATIONS = (1, 4, 8)
NUM_SAMPLES = 32
WRONG = 1e-5
TRAINERS: dict[str, type[Trainer]] = {"ours": GradUtilsTrainer, "stock": Trainer}
NOT_ADDITIVE = ("qwen3 moe aux",)
"""Heads with a term that no split leaves alone: the truth is the mean of the micro-batches', weighted by targets."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of one optimizer step."""

    gradient: float
    norm: float
    loss: float


Result = list[Errors] | str
"""One for each accumulation; or what it crashed with."""
Cells = dict[tuple[str, str], dict[str, Result]]
"""(head, layout) → trainer → result."""


def measure(head: str, layout: str, trainer: str, seed: int) -> list[Errors]:
    """Errors at each accumulation. Runs on every rank of the layout."""
    logging.disable(logging.WARNING)
    data = make_data(head, NUM_SAMPLES, seed=seed)
    return [_errors(head, layout, accumulation, trainer, data) for accumulation in ACCUMULATIONS]


def _errors(head: str, layout: str, accumulation: int, trainer: str, data: Any) -> Errors:
    splits = micro_batches_of(data, layout, accumulation) if head in NOT_ADDITIVE else [data]
    want, want_loss = truth_of_micro_batches(head, splits)
    done, tap = train(
        head,
        accumulation,
        layout=layout,
        data=data,
        trainer_class=TRAINERS[trainer],
        arguments={"train_sampling_strategy": "sequential"},
    )
    entry = done.state.log_history[0]
    return Errors(
        gradient=relative_error(tap.steps[0], want),
        norm=abs(entry["grad_norm"] / norm_of(want) - 1),
        loss=abs(entry["loss"] / want_loss - 1),
    )


def measure_cell(head: str, layout: str, trainer: str, seed: int) -> Result:
    """The largest errors of any rank at each accumulation; or what it crashed with."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ranks = run_ranks(measure, LAYOUTS[layout].num_ranks, head, layout, trainer, seed, deadline_s=120)
    except RankFailure as failure:
        failures = [report for report in failure.reports if report.is_failure]
        return min(failures, key=lambda report: (report.is_echo, report.time_s)).summary.removeprefix("raised ")
    return [max(errors, key=lambda e: max(e.gradient, e.norm, e.loss)) for errors in zip(*ranks, strict=True)]


# ---- The page ----


TITLE = "# Exactness: every head in every layout"
PARTS = ("## In float32", "## In half precision")
_INTRODUCTION = """\
One optimizer step of `GradUtilsTrainer` beside one of `transformers.Trainer`, both against one process with the whole
batch in float64. `make matrix` draws new data and writes this page anew; `tests/harness` has the heads
and the layouts: DDP, FSDP2 and HSDP through accelerate; native FSDP2 and HSDP, tensor and expert parallelism by
transformers. Tiny models without dropout, gloo on CPU; {num_samples} rows with ragged targets.

- *n/a*: neither trainer runs there, for the reason below the table; not counted in the summaries.
- {not_additive}: its auxiliary loss multiplies two means over the batch, so no accumulation gives what the
  whole batch gives. Both trainers are held against the mean of the micro-batches' own losses, weighted by targets.
- BERT's masked-LM head under `fsdp2x2` is sharded by hand, all that is tied in one group: accelerate 1.15 puts tied
  parameters into two groups, which torch 2.13 refuses. For T5 and BART, ours sees to it.
- Context parallelism's attention does not run on CPU and is not here; `tests/trainer/test_context_parallel.py`
  shows that its parts of rows are counted right."""

_PART = """\
The relative error of the gradient, ‖g − g*‖ / ‖g*‖, at accumulation {accumulations}. **Bold** is wrong, above
{wrong:.0e}.

{measured}

{summary}
{sections}"""


def measured(seed: int) -> str:
    """When and with what a part was measured."""
    packages = ("torch", "transformers", "accelerate")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"Seed {seed}, {datetime.datetime.now(datetime.UTC).date()}, {versions}."


def part(cells: Cells, seed: int) -> list[str]:
    """The first part of the page, below its heading."""
    layouts = list(dict.fromkeys(layout for _, layout in cells))
    text = _PART.format(
        accumulations=", ".join(map(str, ACCUMULATIONS)),
        wrong=WRONG,
        measured=measured(seed),
        summary="\n".join(_summary(cells, layouts)),
        sections="\n".join(line for layout in layouts for line in _section(cells, layout)),
    )
    return text.splitlines()


def write_page(out: Path, parts: dict[str, list[str]]) -> None:
    """Write the parts that were measured; the page keeps the others."""
    out.parent.mkdir(exist_ok=True)
    page = out.read_text() if out.exists() else ""
    introduction = _INTRODUCTION.format(num_samples=NUM_SAMPLES, not_additive=", ".join(NOT_ADDITIVE))
    written = f"{TITLE}\n\n{introduction}\n"
    for heading in PARTS:
        if body := parts.get(heading) or section(page, heading):
            written = with_section(written, heading, body)
    out.write_text(written)
    print(f"wrote {out}")


def _summary(cells: Cells, layouts: list[str]) -> list[str]:
    lines = [
        "| layout | heads | cells | ours wrong | ours crashes | ours, largest error of gradient, norm, loss "
        "| stock wrong | stock crashes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layout in layouts:
        rows = [row for (_, of), row in cells.items() if of == layout and not _is_out_of_reach(row)]
        texts = [layout, str(len(rows)), str(len(rows) * len(ACCUMULATIONS))]
        for trainer in TRAINERS:
            results = [row[trainer] for row in rows]
            errors = [e for result in results if not isinstance(result, str) for e in result]
            texts += [str(sum(not e.gradient <= WRONG for e in errors)), str(sum(isinstance(r, str) for r in results))]
            if trainer == "ours":
                largest = [
                    max((getattr(e, name) for e in errors), default=0.0) for name in ("gradient", "norm", "loss")
                ]
                texts.append(", ".join(f"{value:.0e}" for value in largest))
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def _section(cells: Cells, layout: str) -> list[str]:
    lines = ["", f"### {layout}", ""]
    header = [f"{trainer}, {accumulation}" for trainer in TRAINERS for accumulation in ACCUMULATIONS]
    lines += [f"| head | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    reasons: dict[str, int] = {}
    for (head, of), row in cells.items():
        if of != layout:
            continue
        texts = []
        for result in row.values():
            if isinstance(result, str):
                number = reasons.setdefault(short_reason(result), len(reasons) + 1)
                word = "n/a" if _is_out_of_reach(row) else "crashes"
                texts += [f"{word} ({number})"] * len(ACCUMULATIONS)
            else:
                texts += [_number(e.gradient) for e in result]
        lines.append(f"| {head} | {' | '.join(texts)} |")
    return lines + ([""] if reasons else []) + [f"({number}) {reason}\\" for reason, number in reasons.items()]


def _number(error: float) -> str:
    return f"{error:.1e}" if error <= WRONG else f"**{error:.1e}**"


def _is_out_of_reach(row: dict[str, Result]) -> bool:
    """Neither runs, and not because of either."""
    return all(isinstance(result, str) for result in row.values())


def faults(cells: Cells) -> list[str]:
    """What must not be: ours wrong, or crashing where stock does not."""
    found = []
    for (head, layout), row in cells.items():
        if isinstance(row["ours"], str):
            if not isinstance(row["stock"], str):
                found.append(f"{head}, {layout}: only ours crashes: {row['ours']}")
        else:
            wrong = [e for e in row["ours"] if not max(e.gradient, e.norm, e.loss) <= WRONG]
            found += [f"{head}, {layout}: {error}" for error in wrong]
    return found


def unmeasured(cells: Cells, layouts: Iterable[str]) -> list[str]:
    """Layouts in which nothing ran at all, which no table would show as a fault."""
    ran = {layout for (_, layout), row in cells.items() if not _is_out_of_reach(row)}
    return [f"{layout}: neither trainer ran, with any head" for layout in layouts if layout not in ran]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("float32", "half"), help="measure this one alone (default: both)")
    parser.add_argument("--heads", help="comma-separated parts of head names (default: all)")
    parser.add_argument("--layouts", help="comma-separated layouts (default: all)")
    parser.add_argument("--seed", type=int, default=None, help="of the data (default: drawn)")
    parser.add_argument("--out", type=Path, default=None, help="the Markdown file to write (default: none)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    heads = [h for h in HEADS if not options.heads or any(part in h for part in options.heads.split(","))]
    layouts = [name for name in HEAD_LAYOUTS if not options.layouts or name in options.layouts.split(",")]
    print(f"seed {seed}: {len(heads)} heads x {len(layouts)} layouts", flush=True)

    started = time.monotonic()
    parts, found = {}, []
    if options.part != "half":
        cells = measure_all(heads, layouts, seed)
        parts[PARTS[0]] = part(cells, seed)
        found += faults(cells) + ([] if options.heads else unmeasured(cells, layouts))
    if options.part != "float32":
        half = half_report.measure(heads, layouts, seed, is_whole=not (options.heads or options.layouts))
        parts[PARTS[1]] = [measured(seed), "", *half.lines]
        found += half.faults
    if options.out is not None:
        write_page(options.out, parts)
    print("\n".join([f"{time.monotonic() - started:.0f} s, {len(found)} faults", *found]))
    return 1 if found else 0


def measure_all(heads: list[str], layouts: list[str], seed: int) -> Cells:
    """Every head in every layout; prints as it goes."""
    cells: Cells = {}
    for layout in layouts:
        for head in heads:
            row = cells[head, layout] = {t: measure_cell(head, layout, t, seed) for t in TRAINERS}
            print(f"{layout:16}{head:24}" + "   ".join(f"{t}: {_line(r)}" for t, r in row.items()), flush=True)
    return cells


def _line(result: Result) -> str:
    if isinstance(result, str):
        return f"crashes: {short_reason(result)[:120]}"
    return " ".join(f"{error.gradient:.1e}" for error in result)


if __name__ == "__main__":
    sys.exit(main())
