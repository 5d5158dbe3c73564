"""Peak memory of a training step in bfloat16 under FSDP2: ours beside the stock Trainer.

Counted by the allocator of the CPU on rank 0 of a process group that communicates nothing (torch's "fake" backend), so
that the numbers are exact and any number of ranks fits on one machine. Nothing is learnt there: gathered weights are
not the real ones.
"""

import gc
import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.trainings import SETTINGS, silence
from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import run_ranks
from tests.harness.trainer_cases import CHECKPOINTING, fsdp_on_cpu, reset_accelerate

VOCAB, LENGTH = 4096, 128
STEP = 3
"""Measured: the optimizer's state is there, and ``sync="auto"`` has decided."""
MIB = 2**20

NUM_RANKS = (2, 8)
BATCH_SIZES = (8, 1)
ACCUMULATIONS = (1, 4)
WAYS: dict[str, str | None] = {"stock": "", "every": "every", "defer": "defer", "default": None}
"""Column → ``sync`` of ours; the first is the stock Trainer."""

Case = tuple[int, int, int, bool]
CASE = ("ranks", "rows", "accumulation", "checkpointing")
"""Names of the parts of a case; rows are those of a micro-batch."""
Peaks = dict[Case, dict[str, float]]
"""Case → column → MiB at the peak, beyond what was there before the step."""


def model_of_benchmark() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, **sizes, **heads))


def measure() -> Peaks:
    """All of it; prints as it goes."""
    peaks: Peaks = {}
    for case in itertools.product(NUM_RANKS, BATCH_SIZES, ACCUMULATIONS, (False, True)):
        peaks[case] = peaks_of(case)
        print(*case, *(f"{way}: {mib:.2f}" for way, mib in peaks[case].items()), sep="  ", flush=True)
    return peaks


def peaks_of(case: Case, ways: Iterable[str] = tuple(WAYS)) -> dict[str, float]:
    with silence():
        found: dict[str, float] = run_ranks(_peaks_of, 1, case, tuple(ways), init=False, deadline_s=180)[0]
    return found


def _peaks_of(case: Case, ways: Sequence[str]) -> dict[str, float]:
    """Runs in a process of its own."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(case[0]), LOCAL_WORLD_SIZE=str(case[0]))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case[0])
    return {way: peak_mib(case, way) for way in ways}


def peak_mib(case: Case, way: str) -> float:
    num_ranks, batch_size, accumulation, checkpointing = case
    reset_accelerate()
    options: dict[str, Any] = {}
    if way != "stock":
        options["grad_plugin"] = GradUtilsPlugin(
            on_nonfinite="ignore",  # the weights are not real, nor are the gradients
            check_loss_unit=False,
            loss_unit="shifted_tokens",
            sync=WAYS[way],  # type: ignore[arg-type]
        )
    watch = PeakOfStep()
    with fsdp_on_cpu():
        arguments = TrainingArguments(
            **SETTINGS,
            use_cpu=True,
            bf16=True,
            **{CHECKPOINTING: checkpointing},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=STEP + 1,
            logging_strategy="no",
            **LAYOUTS["fsdp2x2"].arguments(("LlamaDecoderLayer",)),
        )
        trainer = (Trainer if way == "stock" else GradUtilsTrainer)(
            model=model_of_benchmark(),
            args=arguments,
            train_dataset=_rows(num_ranks * batch_size * accumulation),
            callbacks=[watch],
            **options,
        )
        trainer.train()
    assert trainer.accelerator.is_fsdp2
    assert watch.peak is not None
    return watch.peak / MIB


def _rows(num_rows: int) -> list[dict[str, torch.Tensor]]:
    words = torch.randint(1, VOCAB, (num_rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.clone()} for row in words]


class PeakOfStep(TrainerCallback):
    """Bytes that a step has allocated at its peak, beyond what was there before."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._profile: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to count."""
        if state.global_step == STEP:
            gc.collect()
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the peak."""
        if self._profile is None or self.peak is not None:
            return
        self._profile.__exit__(None, None, None)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        total = self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            self.peak = max(self.peak, total)


def record(peaks: Peaks) -> list[dict[str, Any]]:
    """A row for each case."""
    return [dict(zip(CASE, case, strict=True)) | by_way for case, by_way in peaks.items()]


def faults(peaks: Peaks) -> list[str]:
    """Where ours takes more than stock although nothing is deferred."""
    found = []
    for case, by_way in peaks.items():
        accumulation = case[2]
        for way in ("every",) if accumulation > 1 else ("every", "defer", "default"):
            if by_way[way] > by_way["stock"] * 1.002:
                found.append(f"{case}, {way}: {by_way[way]:.2f} MiB, stock {by_way['stock']:.2f} MiB")
    return found
