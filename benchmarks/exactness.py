"""Every head in every layout, ours beside the stock Trainer, against one process in float64.

    python benchmarks/exactness.py [--heads llama,bert] [--layouts ddp2,tp2] [--out docs/exactness.md]

Prints a line per cell and writes the table. The data is drawn afresh on every call; ``--seed`` repeats one.
"""

import argparse
import contextlib
import io
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from heads import HEADS
from ranks import RankFailure, run_ranks
from trainer_cases import LAYOUTS, make_data, micro_batches_of, norm, relative_error, train, truth_of_micro_batches
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer

ACCUMULATIONS = (1, 4, 8)
NUM_SAMPLES = 32
WRONG = 1e-5
TRAINERS: dict[str, type[Trainer]] = {"ours": GradUtilsTrainer, "stock": Trainer}
Cell = dict[str, list[float] | str]
"""Trainer → relative errors of gradient, norm and loss, the largest of them; or why it crashed."""


def measure(head: str, layout: str, trainer: str, seed: int) -> list[float]:
    """For each accumulation the largest relative error of gradient, norm and loss. Runs on every rank of the layout."""
    logging.disable(logging.WARNING)
    data = make_data(head, NUM_SAMPLES, seed=seed)
    return [_error(head, layout, accumulation, trainer, data) for accumulation in ACCUMULATIONS]


def _error(head: str, layout: str, accumulation: int, trainer: str, data: Any) -> float:
    splits = micro_batches_of(data, layout, accumulation) if head == "qwen3 moe aux" else [data]
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
    errors = [relative_error(tap.steps[0], want)]
    errors += [abs(entry["grad_norm"] / norm(want) - 1), abs(entry["loss"] / want_loss - 1)]
    return max(errors)


def measure_cell(head: str, layout: str, trainer: str, seed: int) -> list[float] | str:
    """The error at each accumulation, the largest of any rank; or what it crashed with."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ranks = run_ranks(measure, LAYOUTS[layout].num_ranks, head, layout, trainer, seed, deadline_s=120)
    except RankFailure as failure:
        failures = [report for report in failure.reports if report.is_failure]
        return min(failures, key=lambda report: (report.is_echo, report.time_s)).summary
    return [max(errors) for errors in zip(*ranks, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", help="comma-separated parts of head names (default: all)")
    parser.add_argument("--layouts", help="comma-separated layouts (default: all)")
    parser.add_argument("--seed", type=int, default=None, help="of the data (default: drawn)")
    parser.add_argument("--out", type=Path, default=None, help="the Markdown file to write")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    heads = [h for h in HEADS if not options.heads or any(part in h for part in options.heads.split(","))]
    layouts = [name for name in LAYOUTS if not options.layouts or name in options.layouts.split(",")]
    print(f"seed {seed}: {len(heads)} heads x {len(layouts)} layouts x accumulation {ACCUMULATIONS}", flush=True)

    started = time.monotonic()
    cells: dict[tuple[str, str], Cell] = {}
    for head in heads:
        for layout in layouts:
            cell = cells[head, layout] = {t: measure_cell(head, layout, t, seed) for t in TRAINERS}
            print(f"{head:24}{layout:16}" + "   ".join(f"{t}: {_text(r)}" for t, r in cell.items()), flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


def _text(result: list[float] | str) -> str:
    return f"crashes: {result[:150]}" if isinstance(result, str) else " ".join(f"{error:.1e}" for error in result)


if __name__ == "__main__":
    sys.exit(main())
