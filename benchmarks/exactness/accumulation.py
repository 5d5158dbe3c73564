"""How much of a gradient in bfloat16 is lost while it accumulates, and what accumulating in float32 gets back.

Models whose parameters are bfloat16 themselves. The truth is the same weights in float64.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.exactness.half import closeness
from benchmarks.exactness.half_bounds import Closeness
from benchmarks.trainings import silence
from hf_gradutils import GradUtilsPlugin
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import run_ranks
from tests.harness.trainer_cases import make_data, make_model, train

NUM_SAMPLES = 128
ACCUMULATIONS = (1, 8, 64)
LAYOUTS_MEASURED = ("one_rank", "ddp2", "fsdp2x2")
HEADS_MEASURED = ("llama causal", "bert classes", "vit images", "bert tokens")
SETTINGS = {"bfloat16": False, "float32": True}
"""Dtype in which gradients accumulate → ``accumulate_in_float32``."""

Errors = dict[tuple[str, str, int], dict[str, Closeness]]
"""(head, layout, accumulation) → what gradients accumulate in → how near the step's gradient was."""


def measure(seed: int) -> Errors:
    """All of it; prints as it goes."""
    found: Errors = {}
    for case in itertools.product(HEADS_MEASURED, LAYOUTS_MEASURED, ACCUMULATIONS):
        num_ranks = LAYOUTS[case[1]].num_ranks
        with silence():
            found[case] = {
                name: run_ranks(gradient_error, num_ranks, *case, seed, wide, deadline_s=180)[0]
                for name, wide in SETTINGS.items()
            }
        print(*case, *(f"{name}: {near.error:.1e}" for name, near in found[case].items()), sep="  ", flush=True)
    return found


def gradient_error(head: str, layout: str, accumulation: int, seed: int, wide: bool) -> Closeness:
    """How near a step of the Trainer comes. Runs on every rank of the layout."""
    logging.disable(logging.WARNING)
    data = make_data(head, NUM_SAMPLES, seed=seed)
    plugin = GradUtilsPlugin(accumulate_in_float32=wide, sync="defer")
    model = make_model(head).bfloat16()
    trainer, tap = train(head, accumulation, layout=layout, data=data, model=model, grad_plugin=plugin)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in trainer.model.parameters())
    return closeness(tap.steps[0], truth_of_rounded_weights(head, data))


def truth_of_rounded_weights(head: str, data: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    model = make_model(head).bfloat16().double()
    batch = HEADS[head].collate(list(data))
    batch = {name: v.bfloat16().double() if v.is_floating_point() else v for name, v in batch.items()}
    model(**batch)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def record(found: Errors) -> list[dict[str, Any]]:
    """Errors by what gradients accumulate in, one for each accumulation; a row for each head and layout."""
    return [
        {"head": head, "layout": layout}
        | {name: [found[head, layout, n][name].error for n in ACCUMULATIONS] for name in SETTINGS}
        for head in HEADS_MEASURED
        for layout in LAYOUTS_MEASURED
    ]


def faults(found: Errors) -> list[str]:
    """Where accumulating in float32 does not help at 64 micro-batches, or hurts at fewer by more than luck does."""
    wrong = []
    for (head, layout, accumulation), cell in found.items():
        narrow, wide = (cell[name].error for name in SETTINGS)
        if wide > narrow * (0.98 if accumulation == max(ACCUMULATIONS) else 1.1):
            wrong.append(f"{head}, {layout}, accumulation {accumulation}: {wide:.2e} in float32, {narrow:.2e} without")
    return wrong
