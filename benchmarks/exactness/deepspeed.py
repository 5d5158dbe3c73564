"""Every head under DeepSpeed, at each stage of ZeRO: ours beside the stock Trainer, against float64."""

import itertools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.exactness.float32 import ACCUMULATIONS, NOT_ADDITIVE, NUM_SAMPLES, WRONG
from benchmarks.exactness.half import closeness, in_one_process
from benchmarks.exactness.half_bounds import MOST_SCALE, MOST_TIMES
from benchmarks.page import short_reason
from benchmarks.trainings import TRAINERS, silence
from tests.harness import deepspeed_cases
from tests.harness.gradients import norm_of
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainer_cases import make_data, micro_batches_of, truth_of_micro_batches

LAYOUTS = {1: "one_rank", 2: "ddp2"}
"""Ranks → the layout that splits data as they do."""
_OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3, offloaded": {"stage": 3, "zero": _OFFLOADED},
}
"""Name → arguments of the harness's ``config``."""
_FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
HALF_STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"bf16, {stage}": ("bf16", {"stage": stage, "bf16": {"enabled": True}}) for stage in (0, 1, 2, 3)},
    "bf16, 1, gradients in fp32": (
        "bf16",
        {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    **{f"fp16, {stage}": ("fp16", {"stage": stage, **_FP16}) for stage in (1, 2, 3)},
}
"""Name → precision and arguments of the harness's ``config``."""
HALF_HEADS = ("llama causal", "t5 seq2seq", "bert classes", "bert tokens", "vit images")
HALF_ACCUMULATIONS = (1, 4)
HALF_RANKS = 2
RATES = {"float32": 1024.0, "bf16": 1024.0, "fp16": 64.0}
"""Learning rates: so long a step that the weights' own rounding is nothing beside it."""


@dataclass(frozen=True)
class Errors:
    """Of one optimizer step: relative errors, and how many times too long the gradient is."""

    gradient: float
    norm: float | None
    """None where the log has no norm."""
    loss: float
    scale: float

    @property
    def largest(self) -> float:
        """NaN if one is."""
        parts = (self.gradient, 0.0 if self.norm is None else self.norm, self.loss)
        return next((part for part in parts if part != part), max(parts))


Result = list[Errors] | str
"""One for each accumulation; or what it crashed with."""
Cells = dict[tuple[str, str, int], dict[str, Result]]
"""(head, stage, ranks) → trainer → result; one process in plain torch is a trainer too in half precision."""


def measure_all(heads: Sequence[str], seed: int) -> tuple[Cells, Cells]:
    """Every head at every stage in float32, and some in half precision; prints as it goes."""
    wide: Cells = {}
    for num_ranks, head in itertools.product(LAYOUTS, heads):
        wide |= measure_stages(head, num_ranks, tuple(STAGES), seed)
    half: Cells = {}
    for head in heads:
        if head in HALF_HEADS:
            half |= measure_stages(head, HALF_RANKS, tuple(HALF_STAGES), seed)
    return wide, half


def measure_stages(head: str, num_ranks: int, stages: tuple[str, ...], seed: int) -> Cells:
    env = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    try:
        with silence():
            ranks = run_ranks(measure, num_ranks, head, stages, num_ranks, seed, env=env, deadline_s=600)
    except RankFailure as failure:
        first = min((r for r in failure.reports if r.is_failure), key=lambda r: (r.is_echo, r.time_s))
        reason = first.summary.removeprefix("raised ")
        ranks = [{(stage, trainer): reason for stage in stages for trainer in TRAINERS}]
    cells: Cells = {}
    for stage in stages:
        found = [{trainer: result for (of, trainer), result in rank.items() if of == stage} for rank in ranks]
        cells[head, stage, num_ranks] = row = {trainer: _worst([f[trainer] for f in found]) for trainer in found[0]}
        texts = "   ".join(f"{trainer}: {_line(result)}" for trainer, result in row.items())
        print(f"{num_ranks} ranks  {stage:28}{head:24}{texts}", flush=True)
    return cells


def _worst(results: list[Result]) -> Result:
    """Of all ranks, at each accumulation."""
    if crashes := [result for result in results if isinstance(result, str)]:
        return crashes[0]
    return [max(errors, key=lambda e: (e.largest != e.largest, e.largest)) for errors in zip(*results, strict=True)]


def _line(result: Result) -> str:
    if isinstance(result, str):
        return f"crashes: {short_reason(result)[:120]}"
    return " ".join(f"{error.largest:.1e}" for error in result)


# ---- In the ranks ----


def measure(head: str, stages: Sequence[str], num_ranks: int, seed: int) -> dict[tuple[str, str], Result]:
    """(stage, trainer) → result. Runs on every rank."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # errors here; DeepSpeed has several
    deepspeed_cases.use_cpu()
    _allow_fp16()
    data = make_data(head, NUM_SAMPLES, seed=seed)
    found: dict[tuple[str, str], Result] = {}
    for stage in stages:
        precision, settings = HALF_STAGES.get(stage) or ("float32", STAGES[stage])
        accumulations = ACCUMULATIONS if precision == "float32" else HALF_ACCUMULATIONS
        for trainer in TRAINERS:
            try:
                found[stage, trainer] = [
                    _errors(head, precision, settings, accumulation, trainer, data, num_ranks)
                    for accumulation in accumulations
                ]
            except Exception as error:  # of both ranks alike, or the other one waits until the deadline
                found[stage, trainer] = f"{type(error).__name__}: {error}"
        if precision != "float32":
            deepspeed_cases.reset()
            want, _ = truth_of_micro_batches(head, [data])
            alone = closeness(in_one_process(head, [data], precision, casts=True, checkpointing=False), want)
            error = Errors(alone.error, None, 0.0, alone.scale)
            found[stage, "one process"] = [error] * len(accumulations)
    return found


def _allow_fp16() -> None:
    """Let DeepSpeed compute in fp16 on CPU, which torch's own kernels can."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def _errors(
    head: str, precision: str, settings: dict[str, Any], accumulation: int, trainer: str, data: Any, num_ranks: int
) -> Errors:
    deepspeed_cases.reset()  # under ZeRO 3 models of transformers are made in shards
    splits = micro_batches_of(data, LAYOUTS[num_ranks], accumulation) if head in NOT_ADDITIVE else [data]
    want, want_loss = truth_of_micro_batches(head, splits)
    arguments = {"train_sampling_strategy": "sequential", "learning_rate": RATES[precision]}
    done = deepspeed_cases.train(
        head,
        accumulation,
        settings=deepspeed_cases.config(**settings),
        trainer_class=TRAINERS[trainer],
        data=data,
        arguments=arguments if precision == "float32" else arguments | {precision: True},
    )
    entry = done.log[0]
    found = closeness(done.change, want)
    norm = entry.get("grad_norm")
    return Errors(
        gradient=found.error,
        norm=None if norm is None else abs(norm / norm_of(want) - 1),
        loss=abs(entry["loss"] / want_loss - 1),
        scale=found.scale,
    )


# ---- Recorded ----


def record(cells: Cells) -> dict[str, Any]:
    """Ranks → stage → what its tables show: gradients by head, and the largest errors and number of wrong cells."""
    found: dict[str, Any] = {}
    for (head, stage, num_ranks), row in cells.items():
        of_stage = found.setdefault(str(num_ranks), {}).setdefault(
            stage,
            {
                "largest": dict.fromkeys(MEASURED, 0.0),
                "stock wrong": dict.fromkeys((*MEASURED, "missing norm"), 0),
                "heads": {},
            },
        )
        of_stage["heads"][head] = {trainer: _recorded(result) for trainer, result in row.items()}
        for errors in row["ours"] if not isinstance(row["ours"], str) else ():
            for name in MEASURED:
                of_stage["largest"][name] = max(getattr(errors, name) or 0.0, of_stage["largest"][name])
        for errors in row["stock"] if not isinstance(row["stock"], str) else ():
            of_stage["stock wrong"]["missing norm"] += errors.norm is None
            for name in MEASURED:
                of_stage["stock wrong"][name] += not (getattr(errors, name) or 0.0) <= WRONG
    return found


MEASURED = ("gradient", "norm", "loss")


def _recorded(result: Result) -> dict[str, list[float]] | str:
    if isinstance(result, str):
        return short_reason(result)
    errors, scales = [e.gradient for e in result], [e.scale for e in result]
    return {"error": [float(f"{e:.1e}") for e in errors], "scale": [float(f"{scale:.4g}") for scale in scales]}


# ---- Judged ----


def faults(wide: Cells, half: Cells) -> list[str]:
    """Cells of ours that are wrong, in half precision beside one process; and crashes where stock does not."""
    found = []
    for (head, stage, num_ranks), row in (wide | half).items():
        place = f"{head}, ZeRO {stage}, {num_ranks} ranks"
        ours, alone = row["ours"], row.get("one process")
        if isinstance(ours, str):
            if not isinstance(row["stock"], str) or alone is None:
                found.append(f"{place}: ours crashes: {ours}")
        elif alone is None:
            found += [f"{place}: {errors}" for errors in ours if not errors.largest <= WRONG or errors.norm is None]
        else:
            assert not isinstance(alone, str)
            found += [
                f"{place}: {e}, one process {of}" for e, of in zip(ours, alone, strict=True) if _is_off(stage, e, of)
            ]
    return found


def _is_off(stage: str, errors: Errors, alone: Errors) -> bool:
    most = MOST_SCALE[HALF_STAGES[stage][0]]
    is_near = errors.gradient <= MOST_TIMES["one process"] * alone.gradient and abs(errors.scale - alone.scale) <= most
    return not (is_near and errors.norm is not None and errors.norm <= most)
