"""Peak memory of the Trainer's batches: ours fetches one ahead, the stock Trainer the whole window."""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from benchmarks.performance.gpu import clock
from benchmarks.performance.gpu.clock import mib
from benchmarks.performance.gpu.memory import DEADLINE_S
from benchmarks.performance.gpu.part import Part
from benchmarks.trainings import SETTINGS, TRAINERS, silence
from tests.harness.cuda_ranks import one_gpu
from tests.harness.ranks import run_ranks

NUM_STEPS = 3


@dataclass(frozen=True)
class Images:
    """The data; a batch of it is large beside the model."""

    num_rows: int = 16
    """Of one micro-batch."""
    side: int = 512

    @property
    def batch_bytes(self) -> int:
        """Of one micro-batch."""
        return self.num_rows * 3 * self.side**2 * 4

    def __str__(self) -> str:
        return f"{self.num_rows} images of 3 × {self.side} × {self.side} per micro-batch ({mib(self.batch_bytes)})"

    def make(self, num_rows: int) -> list[dict[str, Any]]:
        """Rows that share one image: on the host it is not the memory that is measured."""
        image = torch.rand(3, self.side, self.side, generator=torch.Generator().manual_seed(5))
        return [{"pixel_values": image, "labels": index % 10} for index in range(num_rows)]


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(nn.functional.adaptive_avg_pool2d(pixel_values, 8).flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class _PeakAfterFirst(TrainerCallback):
    """Counts from the end of the first step on: before it, ours asks the loss what it is a mean over."""

    def __init__(self, device: torch.device):
        self._device = device
        self.peak_bytes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            clock.reset_peak(self._device)
        self.peak_bytes = clock.peak_bytes(self._device)


def measure(device: torch.device, images: Images, accumulation: int) -> Part:
    """A table of both Trainers: bytes, which are their values, and in batches."""
    found = Part("", "peak", "in batches")
    for name in TRAINERS:
        peak = clock.attempt(functools.partial(_of_rank, device, name, images, accumulation), device)
        if isinstance(peak, str):
            found.add(name, peak)
            found.faults += [f"{name}, accumulation {accumulation}: {peak}"] if name == "ours" else []
            continue
        found.values[name] = peak
        found.add(name, mib(peak), f"{peak / images.batch_bytes:.1f}")
    return found


def _of_rank(device: torch.device, name: str, images: Images, accumulation: int) -> int:
    """In a process of its own, which no launcher has started."""
    env = one_gpu() | dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    arguments = (device.type, name, images, accumulation)
    with silence():
        return run_ranks(_on_rank, 1, *arguments, init=False, env=env, deadline_s=DEADLINE_S)[0]


def _on_rank(device_type: str, name: str, images: Images, accumulation: int) -> int:
    logging.disable(logging.WARNING)
    watch = _PeakAfterFirst(torch.device(device_type))
    trainer = TRAINERS[name](
        model=_Classifier(),
        args=TrainingArguments(
            **SETTINGS,
            use_cpu=device_type == "cpu",
            per_device_train_batch_size=images.num_rows,
            gradient_accumulation_steps=accumulation,
            max_steps=NUM_STEPS,
            optim="adamw_torch_fused",
            logging_strategy="no",
        ),
        train_dataset=images.make(NUM_STEPS * accumulation * images.num_rows),
        callbacks=[watch],
    )
    trainer.train()
    assert trainer.state.global_step == NUM_STEPS
    return watch.peak_bytes
