"""A training step of ``GradUtilsTrainer`` beside one of ``transformers.Trainer``: the same model, data and settings.

Runs of a few steps take turns. The first step of a run is left out: it builds, probes and allocates.
"""

import contextlib
import logging
import statistics
import time
import unittest.mock
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.performance.window import on_ranks, ratios, spread
from benchmarks.trainings import SETTINGS, TRAINERS
from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from tests.harness.counting import collectives, events_of, num_host_syncs
from tests.harness.heads import collate
from tests.harness.layouts import LAYOUTS
from tests.harness.trainer_cases import fsdp_on_cpu, reset_accelerate

LAYOUTS_MEASURED = ("one_rank", "ddp2", "fsdp2x2")
ACCUMULATIONS = (1, 8)
NUM_TIMED = {1: 24, 8: 5}
"""Accumulation → timed steps of one run."""

FIRST = "ours, counts first"


class CountsFirst(GradUtilsTrainer):
    """Ours, with the targets of each window counted before its first forward, as the stock Trainer does."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, grad_plugin=GradUtilsPlugin(counts="first"), **kwargs)


MEASURED: dict[str, type[Trainer]] = {**TRAINERS, FIRST: CountsFirst}
"""By name."""

BATCH, LENGTH, VOCAB = 8, 32, 256


@dataclass(frozen=True)
class StepCounts:
    """The cost of steps of one Trainer, at accumulation 8 unless said otherwise."""

    look_ahead: int
    """Batches fetched and not yet trained on, at most."""
    live_batch_bytes: int
    """Bytes of all batches that are alive while one is trained on, at most."""
    syncs_per_micro_batch: float
    """Beyond those of the model's own forward and backward."""
    syncs_per_step: float
    """Besides, and beyond those of the optimizer itself: on CPU one per parameter."""
    collectives: dict[int, dict[str, int]]
    """Accumulation → name → number per step, the model's own and the wrapper's too."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds per step, one entry for each run; entry i of both trainers belongs together."""

    cpu_s: tuple[float, ...]
    """Process CPU time, added over the ranks."""
    wall_s: tuple[float, ...]


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def make_rows(num_rows: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(num_rows):
        words = torch.randint(VOCAB, (LENGTH,), generator=generator)
        labels = words.clone()
        labels[: int(torch.randint(1, LENGTH // 2, (), generator=generator))] = -100
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


def train(
    trainer_class: type[Trainer], layout: str, accumulation: int, num_steps: int, rows: Any, **kwargs: Any
) -> None:
    reset_accelerate()
    spread = LAYOUTS[layout]
    extra = spread.arguments(("LlamaDecoderLayer",))
    arguments: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "max_steps": num_steps,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "ddp_find_unused_parameters": False,
    }
    with fsdp_on_cpu() if extra else contextlib.nullcontext():
        trainer = trainer_class(
            model=make_model(),
            args=TrainingArguments(**SETTINGS | arguments | extra),
            train_dataset=rows,
            **{"data_collator": collate} | kwargs,
        )
        trainer.train()
    assert trainer.state.global_step == num_steps
    assert spread.is_right(trainer.model_wrapped), type(trainer.model_wrapped)


def rows_per_step(layout: str, accumulation: int) -> int:
    return BATCH * LAYOUTS[layout].num_data_ranks * accumulation


# ---- Counted ----


def count(layout: str) -> dict[str, StepCounts]:
    """Trainer → counts, the same on all ranks."""
    first, *others = on_ranks(_count_on_rank, layout)
    assert all(result == first for result in others)
    return first


def _count_on_rank(layout: str) -> dict[str, StepCounts]:
    logging.disable(logging.WARNING)
    return {name: _counts(trainer_class, layout) for name, trainer_class in MEASURED.items()}


def _counts(trainer_class: type[Trainer], layout: str) -> StepCounts:
    look_ahead, live = _batches_held(trainer_class, layout)
    per_step = {accumulation: _per_step(trainer_class, layout, accumulation) for accumulation in ACCUMULATIONS}
    fewest, most = ACCUMULATIONS
    syncs = {accumulation: syncs for accumulation, (syncs, _) in per_step.items()}
    per_micro_batch = (syncs[most] - syncs[fewest]) / (most - fewest)
    return StepCounts(
        look_ahead=look_ahead,
        live_batch_bytes=live,
        syncs_per_micro_batch=per_micro_batch - _syncs_of_the_model(),
        syncs_per_step=syncs[fewest] - fewest * per_micro_batch - _syncs_of_the_optimizer(),
        collectives={accumulation: dict(found) for accumulation, (_, found) in per_step.items()},
    )


def _per_step(trainer_class: type[Trainer], layout: str, accumulation: int) -> tuple[int, dict[str, int]]:
    """Host syncs and collectives of one step: what one step more adds."""
    rows = make_rows(3 * rows_per_step(layout, accumulation))
    short, long = (events_of(lambda n=n: train(trainer_class, layout, accumulation, n, rows)) for n in (2, 3))
    added = collectives(long)
    added.subtract(collectives(short))
    return num_host_syncs(long) - num_host_syncs(short), {name: n for name, n in sorted(added.items()) if n}


def _syncs_of_the_model() -> int:
    model, batch = make_model().train(), collate(make_rows(BATCH))
    return num_host_syncs(events_of(lambda: model(**batch).loss.backward()))


def _syncs_of_the_optimizer() -> int:
    model = make_model()
    model(**collate(make_rows(BATCH))).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    return num_host_syncs(events_of(optimizer.step))


def _batches_held(trainer_class: type[Trainer], layout: str) -> tuple[int, int]:
    seen: list[weakref.ref[Tensor]] = []
    num_fetched, num_trained, ahead, num_bytes = 0, 0, 0, 0

    def watched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.extend(weakref.ref(value) for value in batch.values())
        return batch

    def watched_collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        nonlocal num_fetched
        num_fetched += 1
        return watched(collate(rows))

    def watched_send(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return watched(send_to_device(*args, **kwargs))  # copies among ranks on CPU too

    class Watched(trainer_class):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal num_trained, ahead, num_bytes
            num_trained += 1
            ahead = max(ahead, num_fetched - num_trained)
            alive = {t.data_ptr(): t.nbytes for t in (reference() for reference in seen) if t is not None}
            num_bytes = max(num_bytes, sum(alive.values()))
            return super().training_step(*args, **kwargs)

    most = max(ACCUMULATIONS)
    # An own step, as that of the watching class, would have the targets counted first.
    options = {"grad_plugin": GradUtilsPlugin(counts="streamed")} if trainer_class is GradUtilsTrainer else {}
    rows = make_rows(3 * rows_per_step(layout, most))
    with unittest.mock.patch("accelerate.data_loader.send_to_device", watched_send):
        train(Watched, layout, most, 3, rows, data_collator=watched_collate, **options)
    return ahead, num_bytes


# ---- Timed ----


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append((time.process_time(), time.perf_counter()))

    def per_step(self) -> tuple[float, float]:
        """CPU and wall seconds of a step, without the first."""
        (first_cpu, first_wall), (last_cpu, last_wall) = self.times[0], self.times[-1]
        num_steps = len(self.times) - 1
        return (last_cpu - first_cpu) / num_steps, (last_wall - first_wall) / num_steps


def time_steps(layout: str, accumulation: int, num_pairs: int) -> dict[str, StepTimes]:
    """Trainer → times."""
    results = on_ranks(_time_on_rank, layout, accumulation, num_pairs)
    times = {}
    for name in MEASURED:
        runs = list(zip(*(result[name] for result in results), strict=True))
        times[name] = StepTimes(
            cpu_s=tuple(sum(cpu for cpu, _ in ranks) for ranks in runs),
            wall_s=tuple(max(wall for _, wall in ranks) for ranks in runs),
        )
    return times


def _time_on_rank(layout: str, accumulation: int, num_pairs: int) -> dict[str, list[tuple[float, float]]]:
    logging.disable(logging.WARNING)
    num_steps = 1 + NUM_TIMED[accumulation]
    rows = make_rows(num_steps * rows_per_step(layout, accumulation))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURED}
    for pair in range(-1, num_pairs):
        for name in MEASURED if pair % 2 else reversed(MEASURED):
            clock = _Clock()
            train(MEASURED[name], layout, accumulation, num_steps, rows, callbacks=[clock])
            if pair >= 0:  # the very first pair also loads modules
                times[name].append(clock.per_step())
    return times


def record(times: dict[str, StepTimes]) -> dict[str, Any]:
    """Medians in milliseconds, and times of ours over those of the stock Trainer."""
    ours, stock, first = times["ours"], times["stock"], times.get(FIRST)
    return {
        **({"first": spread(ratios(first.cpu_s, stock.cpu_s))} if first is not None else {}),
        "cpu_ms": {name: statistics.median(of.cpu_s) * 1e3 for name, of in times.items()},
        "cpu": spread(ratios(ours.cpu_s, stock.cpu_s)),
        "wall": spread(ratios(ours.wall_s, stock.wall_s)),
    }
