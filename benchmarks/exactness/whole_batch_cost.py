"""The cost of a loss of the whole batch: two passes beside one pass over the whole batch, and the mean of means.

A CLIP in ``NUM_MICRO_BATCHES`` micro-batches. Forwards, activations, collectives and host syncs are counted; times
of runs that take turns only inform.
"""

import logging
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.performance.window import on_ranks, ratios, spread
from benchmarks.trainings import SETTINGS, silence
from hf_gradutils import GradUtilsTrainer
from tests.harness.counting import Reads, SavedBytes, collectives, events_of
from tests.harness.shared_heads import collate_pairs
from tests.harness.trainer_cases import reset_accelerate

BATCH, NUM_MICRO_BATCHES = 64, 8
"""Rows of the whole batch of a rank, and how it is cut."""
LENGTH, VOCAB, IMAGE, PATCH, EMBEDDING = 16, 1024, 32, 8, 128
TWO_PASSES, ONE_PASS, MEAN = "two passes", "one pass", "mean of means"
WAYS: dict[str, tuple[type[Trainer], int]] = {
    TWO_PASSES: (GradUtilsTrainer, NUM_MICRO_BATCHES),
    ONE_PASS: (Trainer, 1),
    MEAN: (Trainer, NUM_MICRO_BATCHES),
}
"""Way → Trainer and accumulation. The stock Trainer in one pass is the whole batch, in several the mean of means."""
NUM_TIMED, NUM_ROUNDS = 2, 5
"""Steps of a run beside its first, and runs of each way."""
COUNTED_AT = (1, 8)
"""Micro-batches of a window whose collectives and host syncs are counted."""


def make_model(num_layers: int, hidden_size: int) -> nn.Module:
    torch.manual_seed(0)
    tower = {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "projection_dim": EMBEDDING,
    }
    text = tower | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": 2}
    image = tower | {"image_size": IMAGE, "patch_size": PATCH}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=EMBEDDING))


def large() -> nn.Module:
    return make_model(8, 256)


def small() -> nn.Module:
    return make_model(1, 32)


def make_rows(num_rows: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(3, VOCAB, (LENGTH,), generator=generator),
            "attention_mask": torch.ones(LENGTH, dtype=torch.int64),
            "pixel_values": torch.randn(3, IMAGE, IMAGE, generator=generator),
        }
        for _ in range(num_rows)
    ]


def train(
    trainer_class: type[Trainer], accumulation: int, num_steps: int, model: nn.Module, *callbacks: TrainerCallback
) -> None:
    reset_accelerate()
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    arguments: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": BATCH // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": num_steps,
        "optim": "adamw_torch_fused",
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    trainer_class(
        model=model,
        args=TrainingArguments(**SETTINGS | arguments),
        train_dataset=make_rows(BATCH * num_ranks * num_steps),
        data_collator=collate_pairs,
        callbacks=list(callbacks),
    ).train()


# ---- Forwards and activations ----


@dataclass(frozen=True)
class Work:
    """Of the steps after the first, which also checks."""

    forwards: float
    """Per step."""
    rows: float
    """Per step, through the model."""
    activations: int
    """Bytes that autograd keeps for backwards, at the peak."""


def count_work() -> dict[str, Work]:
    """Way → work, on one rank."""
    with silence():
        found: dict[str, Work] = on_ranks(_count_work, "one_rank")[0]
    return found


def _count_work(layout: str) -> dict[str, Work]:
    logging.disable(logging.WARNING)
    return {name: _work_of(*way) for name, way in WAYS.items()}


def _work_of(trainer_class: type[Trainer], accumulation: int) -> Work:
    model, num_steps = large(), 2
    saved = SavedBytes(model)
    watch = _Watch(saved)
    model.register_forward_pre_hook(watch.see, with_kwargs=True)
    with saved.counted():
        train(trainer_class, accumulation, 1 + num_steps, model, watch)
    return Work(watch.num_forwards / num_steps, watch.num_rows / num_steps, saved.peak)


class _Watch(TrainerCallback):
    """Counts after the first step; a window's first pass runs before its step begins."""

    def __init__(self, saved: SavedBytes) -> None:
        self.num_forwards = self.num_rows = 0
        self._saved = saved

    def see(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.num_forwards += 1
        self.num_rows += len(kwargs["input_ids"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.num_forwards = self.num_rows = 0
            self._saved.peak = self._saved.now


def bytes_of_rows() -> int:
    """Of the embeddings of a whole batch: both kinds, and their gradients, in float32."""
    return BATCH * EMBEDDING * 2 * 2 * 4


# ---- Collectives and host syncs ----


def count_calls() -> dict[str, dict[str, Any]]:
    """Trainer → what a step adds on two ranks, by micro-batches of its window."""
    with silence():
        first, *others = on_ranks(_count_calls, "ddp2")
    assert all(result == first for result in others)
    found: dict[str, dict[str, Any]] = first
    return found


def _count_calls(layout: str) -> dict[str, dict[str, Any]]:
    logging.disable(logging.WARNING)
    own = _reads_of_a_forward()
    found: dict[str, dict[str, Any]] = {}
    for name, (trainer_class, passes) in {"two passes": (GradUtilsTrainer, 2), "stock": (Trainer, 1)}.items():
        for accumulation in COUNTED_AT:
            counts = [_calls_of(trainer_class, accumulation, num_steps) for num_steps in (2, 3)]
            added = counts[1][0].copy()
            added.subtract(counts[0][0])
            syncs = counts[1][1] - counts[0][1] - own * passes * accumulation
            calls = {of: n for of, n in sorted(added.items()) if n}
            found.setdefault(name, {})[str(accumulation)] = {"collectives": calls, "syncs": syncs}
    return found


def _calls_of(trainer_class: type[Trainer], accumulation: int, num_steps: int) -> Any:
    """Collectives, and host syncs that Python asks for: a fused optimizer's, one for each parameter on CPU, are not."""
    with Reads() as reads:
        events = events_of(lambda: train(trainer_class, accumulation, num_steps, small()))
    return collectives(events), reads.count


def _reads_of_a_forward() -> int:
    model, batch = small(), collate_pairs(make_rows(2))
    with Reads() as reads:
        model(**batch)
    return reads.count


# ---- Timed ----


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())


def time_steps(num_rounds: int = NUM_ROUNDS) -> dict[str, list[float]]:
    """Way → CPU seconds per step, one for each round; entry i of all ways belongs together."""
    with silence():
        found: dict[str, list[float]] = on_ranks(_time_steps, "one_rank", num_rounds)[0]
    return found


def _time_steps(layout: str, num_rounds: int) -> dict[str, list[float]]:
    logging.disable(logging.WARNING)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for index in range(num_rounds):
        for name in WAYS if index % 2 else reversed(WAYS):
            clock = _Clock()
            train(*WAYS[name], 1 + NUM_TIMED, large(), clock)
            times[name].append((clock.times[-1] - clock.times[0]) / NUM_TIMED)
    return times


# ---- All of it ----


def measure() -> dict[str, Any]:
    """Work, calls and times, as a page shows them; prints as it goes."""
    work, calls = count_work(), count_calls()
    print(work, calls, sep="\n", flush=True)
    times = time_steps()
    print(times, flush=True)
    return {
        "parameters": sum(p.numel() for p in large().parameters()),
        "work": {name: vars(of) for name, of in work.items()},
        "calls": calls,
        "times": {
            name: {"seconds": statistics.median(of), "beside one pass": spread(ratios(of, times[ONE_PASS]))}
            for name, of in times.items()
        },
    }


def faults(found: dict[str, Any]) -> list[str]:
    """Counts that are not as promised."""
    work, calls = found["work"], found["calls"]
    said = []
    if work[TWO_PASSES]["forwards"] != 2 * NUM_MICRO_BATCHES:
        said.append(f"two passes: {work[TWO_PASSES]['forwards']} forwards of {NUM_MICRO_BATCHES} micro-batches")
    if work[TWO_PASSES]["activations"] > work[MEAN]["activations"] + bytes_of_rows():
        said.append(
            f"two passes keep {work[TWO_PASSES]['activations']} bytes, a micro-batch {work[MEAN]['activations']}"
        )
    if work[ONE_PASS]["activations"] < NUM_MICRO_BATCHES / 2 * work[MEAN]["activations"]:
        said.append("one pass keeps little more than a micro-batch, so that the comparison shows nothing")
    few, many = (calls["two passes"][str(n)] for n in COUNTED_AT)
    if few != many:
        said.append(f"two passes: a window of {COUNTED_AT[1]} micro-batches costs {many}, of one {few}")
    if few["syncs"] > 1 or few["collectives"].get("all_gather") != 2:
        said.append(f"two passes: a window costs {few}")
    return said
