"""The router loss of mixtures of experts: how far the mean of its micro-batches' is from the whole batch's.

    python -m benchmarks.exactness.router [--seed 1]

Tiny models in float64, 4 micro-batches of 4 rows of ragged lengths, the gradient of cross-entropy + coefficient ·
router loss. The mean weights a micro-batch's loss by its targets. Prints a markdown table.
"""

import argparse
import logging
import random
from typing import Any

from benchmarks import page
from tests.harness import router_cases as cases
from tests.harness.gradients import relative_error

MODELS = ("qwen3 moe", "mixtral")
COEFFICIENTS = (1.0, 0.01, 0.001)
TIMES = (1, 16)
"""Rows of 2 to 16 words, or so many times longer."""
ROUTINGS = {"equal": False, "unequal": True}
"""Tokens of all micro-batches go to the same experts, or to others because each has words of its own."""


def measure(seed: int) -> list[dict[str, Any]]:
    """Relative errors of the whole gradient: one row for each model, routing, size and coefficient."""
    return [
        _measure(model, routing, times, coefficient, seed)
        for model in MODELS
        for routing in ROUTINGS
        for times in TIMES
        for coefficient in COEFFICIENTS
    ]


def _measure(name: str, routing: str, times: int, coefficient: float, seed: int) -> dict[str, Any]:
    model = cases.make_router_model(name, coefficient)
    batches = cases.ragged_micro_batches(model, unequal=ROUTINGS[routing], times=times, seed=seed)
    want = cases.gradient_of_whole_batch(model, batches)
    return {
        "model": name,
        "routing": routing,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "coefficient": coefficient,
        "mean of micro-batches": relative_error(cases.gradient_of_mean(model, batches), want),
        "two passes": relative_error(cases.gradient_of_two_passes(model, batches), want),
    }


def table(measured: list[dict[str, Any]]) -> str:
    """A row for each model, routing and size; errors by coefficient, of the mean of micro-batches / of two passes."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in measured:
        case = (row["model"], row["routing"], row["tokens"])
        errors = f"{row['mean of micro-batches']:.1e} / {row['two passes']:.0e}"
        found.setdefault(case, []).append(errors)
    header = ("model", "routing", "tokens", *(f"coefficient {coefficient:g}" for coefficient in COEFFICIENTS))
    return page.table([header, *((*case, *errors) for case, errors in found.items())])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="of the data (default: drawn)")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}\n\n{table(measure(seed))}")


if __name__ == "__main__":
    main()
