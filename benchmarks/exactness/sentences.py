"""Losses of sentence-transformers: the logged loss and the gradient, by layout, of the stock trainer and of ours.

    python -m benchmarks.exactness.sentences [--losses mnr,cosent]

A tiny BERT in float32, 16 rows, one optimizer step over all of them; the gradient is compared with that of one process
that sees all rows at once, in float64. Prints a markdown table.
"""

import argparse
import logging
from typing import Any

from benchmarks import page
from benchmarks.trainings import silence
from tests.harness.gradients import relative_error
from tests.harness.ranks import run_ranks
from tests.harness.sentence_cases import Exact, Stock, train, truth

LOSSES = {
    "mnr": "MultipleNegativesRankingLoss",
    "cached mnr": "CachedMultipleNegativesRankingLoss",
    "cosent": "CoSENTLoss",
    "batch hard": "BatchHardTripletLoss",
    "softmax": "SoftmaxLoss",
    "cosine": "CosineSimilarityLoss",
}
"""Case → name on the page."""
LAYOUTS = ((1, 1), (1, 4), (2, 1), (2, 4))
"""(ranks, micro-batches)."""
TRAINERS = {"stock": Stock, "ours": Exact}


def measure(losses: list[str] | None = None) -> list[dict[str, Any]]:
    """A row for each loss and layout: ``{trainer: (logged loss, relative error of the gradient)}`` of both trainers."""
    names = list(LOSSES) if losses is None else losses
    with silence():
        return [row for num_ranks in (1, 2) for row in run_ranks(_measure, num_ranks, names, deadline_s=400)[0]]


def _measure(names: list[str]) -> list[dict[str, Any]]:
    """The rows of one number of ranks."""
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    rows = []
    for name in names:
        want, loss = truth(name)
        for num_ranks, accumulation in LAYOUTS:
            if num_ranks == dist.get_world_size():
                row: dict[str, Any] = {"loss": name, "ranks": num_ranks, "micro-batches": accumulation, "whole": loss}
                for trainer, trainer_class in TRAINERS.items():
                    gradients, logged = train(name, trainer_class, accumulation, num_ranks=num_ranks)
                    row[trainer] = (logged, relative_error(gradients, want))
                rows.append(row)
    return rows


def table(measured: list[dict[str, Any]]) -> str:
    """A row for each loss: the logged loss and the gradient's error in each layout, of the stock trainer / of ours."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for row in measured:
        cells = (f"{logged:.3f} ({error:.0e})" for logged, error in (row[trainer] for trainer in TRAINERS))
        found.setdefault(row["loss"], {})[row["ranks"], row["micro-batches"]] = " / ".join(cells)
    header = ("loss", *(f"{num_ranks} × {accumulation}" for num_ranks, accumulation in LAYOUTS))
    return page.table([header, *((LOSSES.get(n, n), *(cells[x] for x in LAYOUTS)) for n, cells in found.items())])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=lambda names: names.split(","), help="(default: all)")
    print(table(measure(parser.parse_args(arguments).losses)))


if __name__ == "__main__":
    main()
