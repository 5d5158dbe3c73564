"""Losses of the whole batch, of several means and of routers: ours beside the stock Trainer, against float64.

One optimizer step of tiny models without dropout, as in float32.py. Stock's is the mean of the micro-batches' losses,
but their sum for ``BertForPreTraining``, whose forward takes the count and does not divide by it.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from transformers import Trainer

from benchmarks.exactness.float32 import NUM_SAMPLES, WRONG, on_ranks
from benchmarks.heads.classes import build
from benchmarks.heads.configs import tiny_config
from benchmarks.page import short_reason
from benchmarks.trainings import TRAINERS
from hf_gradutils import GradUtilsPlugin
from tests.harness import router_cases
from tests.harness.gradients import cast, default_dtype, relative_error, whole_gradients
from tests.harness.head_rows import collate, count_rows, each
from tests.harness.heads import Head
from tests.harness.shared_heads import SHARED_HEADS, collate_boxes, image_with_boxes
from tests.harness.trainer_cases import train

ACCUMULATIONS = {"one_rank": (1, 4, 8), "ddp2": (1, 4)}
"""Layout → accumulations."""
CUTS = tuple((layout, n) for layout, accumulations in ACCUMULATIONS.items() for n in accumulations)
COEFFICIENTS = (1.0, 0.01, 0.001)
"""Of the router loss."""
ROUTED_ACCUMULATION = 4
MOST_TIMES = 1.5
"""bfloat16: errors of ours over those of one pass."""
_IN_ORDER = {"train_sampling_strategy": "sequential"}

Cell = float | str
"""The relative error of the gradient, or what the Trainer crashed with."""
Cells = dict[str, dict[str, list[Cell]]]
"""Head → column → cells, one for each of ``CUTS``; one pass in bfloat16 has one."""


def _detr() -> nn.Module:
    """In evaluation mode within: its backbone has batch normalisation, which is frozen in DETR."""
    return build(hf.DetrForObjectDetection, tiny_config(hf.DetrConfig, num_labels=3))


CASES: dict[str, Head] = {
    "CLIPModel": SHARED_HEADS["clip pairs"],
    "SiglipModel": SHARED_HEADS["siglip pairs"],
    "BertForPreTraining": SHARED_HEADS["bert pretraining"],
    "DetrForObjectDetection": Head(_detr, each(image_with_boxes), (), count_rows, collate=collate_boxes),
}
HALF = ("CLIPModel", "SiglipModel", "BertForPreTraining")
"""Also in bfloat16. DETR is not: a box more or less matches another query for a last bit."""


# ---- Losses of the whole batch, and of several means ----


def measure(seed: int) -> Cells:
    """All of it; prints as it goes."""
    cells: Cells = {}
    for name in CASES:
        found = cells[name] = {column: [] for column in _trainings(name)}
        for layout in ACCUMULATIONS:
            ranks = on_ranks(layout, _measure_on_rank, name, layout, seed)
            for column, row in found.items():
                if isinstance(ranks, str):
                    row += [short_reason(ranks)] * len(ACCUMULATIONS[layout])
                else:
                    row += [max(errors) for errors in zip(*(rank[column] for rank in ranks), strict=True)]
        if name in HALF:
            found["one pass, bf16"] = [_error_of_half(CASES[name], seed)]
        print("\n".join(f"{name:24}{column:16}{row}" for column, row in found.items()), flush=True)
    return cells


def _error_of_half(case: Head, seed: int) -> float:
    """Of one pass in bfloat16."""
    data = case.rows(NUM_SAMPLES, seed)
    return relative_error(in_one_pass(case, data, torch.bfloat16), in_one_pass(case, data, torch.float64))


def _measure_on_rank(name: str, layout: str, seed: int) -> dict[str, list[float]]:
    logging.disable(logging.WARNING)
    case = CASES[name]
    data = case.rows(NUM_SAMPLES, seed)
    want = in_one_pass(case, data, torch.float64)
    found: dict[str, list[float]] = {}
    for column, (trainer, arguments) in _trainings(name).items():
        found[column] = []
        for accumulation in ACCUMULATIONS[layout]:
            tap = train(
                "plain module",  # which names nothing that is not given here
                accumulation,
                layout=layout,
                model=case.build(),
                data=data,
                data_collator=case.collate,
                trainer_class=trainer,
                arguments=_IN_ORDER | arguments,
            )[1]
            found[column].append(relative_error(tap.steps[0], want))
    return found


def _trainings(name: str) -> dict[str, tuple[type[Trainer], dict[str, Any]]]:
    found: dict[str, tuple[type[Trainer], dict[str, Any]]] = {column: (of, {}) for column, of in TRAINERS.items()}
    return found | ({"ours, bf16": (TRAINERS["ours"], {"bf16": True})} if name in HALF else {})


def in_one_pass(case: Head, data: list[Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradient of one process and one batch: in float64, or in float32 under autocast to ``dtype``."""
    model = case.build()
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            loss = model(**case.collate(data))["loss"]
        loss.backward()
        return whole_gradients(model)
    with default_dtype(torch.float64):  # in which detectors make the weights of classes
        model.double()(**cast(case.collate(data), torch.float64))["loss"].backward()
    return whole_gradients(model)


# ---- Router losses ----

Routed = list[dict[str, Any]]
"""A row for each layout and coefficient: errors by column."""


def measure_routers(seed: int) -> Routed:
    """A mixture of experts, each of whose micro-batches has words of its own."""
    rows: Routed = []
    for layout, coefficient in itertools.product(ACCUMULATIONS, COEFFICIENTS):
        ranks = on_ranks(layout, _routed_on_rank, layout, coefficient, seed)
        errors = short_reason(ranks) if isinstance(ranks, str) else ranks[0]
        found = errors if isinstance(errors, dict) else dict.fromkeys(ROUTED, errors)
        rows.append({"layout": layout, "coefficient": coefficient} | found)
        print(rows[-1], flush=True)
    return rows


ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    'ours, aux="exact"': ("ours", {"grad_plugin": "exact"}),
    'ours, aux="mean"': ("ours", {"grad_plugin": "mean"}),
    "stock": ("stock", {}),
}
"""Column → Trainer and options."""


def _routed_on_rank(layout: str, coefficient: float, seed: int) -> dict[str, float]:
    logging.disable(logging.WARNING)

    def make_model() -> nn.Module:
        model = router_cases.make_router_model("qwen3 moe", coefficient)
        model.config.output_router_logits = True  # type: ignore[union-attr]
        return model

    batches = router_cases.ragged_micro_batches(make_model(), unequal=True, one_length=True, seed=seed)
    want = router_cases.gradient_of_whole_batch(make_model(), batches)
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    found = {}
    for column, (trainer, options) in ROUTED.items():
        tap = train(
            "plain module",
            ROUTED_ACCUMULATION // num_ranks,
            layout=layout,
            model=make_model().float(),
            data=rows,
            data_collator=collate,
            trainer_class=TRAINERS[trainer],
            arguments=_IN_ORDER,
            **{name: GradUtilsPlugin(aux=value) for name, value in options.items()},
        )[1]
        found[column] = relative_error(tap.steps[0], want)
    return found


# ---- Judged ----


def faults(cells: Cells, routed: Routed) -> list[str]:
    """Cells of ours that are wrong; and cut batches for which stock is right, so that nothing is shown."""
    found = []
    for name, row in cells.items():
        for cut, ours, stock in zip(CUTS, row["ours"], row["stock"], strict=True):
            if not _is_right(ours):
                found.append(f"{name}, {cut}: {ours}")
            if cut != CUTS[0] and _is_right(stock):
                found.append(f"{name}, {cut}: stock is right, which shows nothing")
        for cut, half in zip(CUTS, row.get("ours, bf16", []), strict=False):
            most = row["one pass, bf16"][0]
            if isinstance(half, str) or isinstance(most, str) or not half <= MOST_TIMES * most:
                found.append(f"{name}, {cut}, bf16: {half}, one pass {most}")
    for row_of in routed:
        if not _is_right(row_of['ours, aux="exact"']):
            found.append(f"router loss, {row_of}")
    if all(_is_right(row_of['ours, aux="mean"']) for row_of in routed):
        found.append("router loss: the mean is right, which shows nothing")
    return found


def _is_right(cell: Cell) -> bool:
    return not isinstance(cell, str) and cell <= WRONG


def shown(cells: Sequence[Cell]) -> Iterator[str]:
    """Cells of a table."""
    for cell in cells:
        if isinstance(cell, str):
            yield f"crashes: {cell}"
        else:
            yield f"{cell:.1e}"
