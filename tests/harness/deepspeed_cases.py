"""Trainings of some optimizer steps under DeepSpeed, on CPU, and what they did to the weights."""

import contextlib
import copy
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_gradutils import GradUtilsTrainer
from tests.harness.heads import HEADS
from tests.harness.trainer_cases import NUM_SAMPLES, make_data, make_model, reset_accelerate

LEARNING_RATE = 1.0
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def use_cpu() -> None:
    """Let DeepSpeed run on CPU, without compiling its shared-memory communication, which takes minutes."""
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fp16_on_cpu() -> None:
    """Let DeepSpeed compute in fp16 with torch's own kernels, which it does not know of."""
    use_cpu()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def reset() -> None:
    """Several trainings in one process."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    reset_accelerate()


def config(stage: int, **more: Any) -> dict[str, Any]:
    """A configuration of DeepSpeed for a Trainer; ``zero`` adds to its part about ZeRO."""
    zero = more.pop("zero", {})
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage} | zero,
        "zero_force_ds_cpu_optimizer": False,
    } | more


def reference(
    head: str, windows: list[Any], *, rate: float = LEARNING_RATE, clip: float | None = None
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Steps of SGD on one process in float64, one a window.

    Returns:
        The weights' change over the rate, negated; the losses; and the norms before clipping.
    """
    model = make_model(head).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses, norms = [], []
    for rows in windows:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in HEADS[head].collate(rows).items()}
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: (before[name] - p.detach()) / rate for name, p in model.named_parameters()}, losses, norms


@dataclass
class Trained:
    """What a training has done."""

    trainer: Any
    change: dict[str, Tensor]
    """Name → the weights' change over the learning rate, negated: the gradient, after one step of SGD."""

    @property
    def log(self) -> list[dict[str, float]]:
        return self.trainer.state.log_history


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name → the whole parameter in float64, of ZeRO's shards and in its master precision. Collectives: gathers."""
    import deepspeed

    weights = {}
    for name, p in model.named_parameters():
        is_half = p.requires_grad and p.dtype in HALF.values()
        master = deepspeed.utils.safe_get_full_fp32_param(p) if is_half else None
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            weights[name] = (p if master is None else master).detach().double().clone()
    return weights


def train(
    head: str,
    accumulation: int = 1,
    *,
    settings: dict[str, Any],
    trainer_class: type[Trainer] = GradUtilsTrainer,
    model: nn.Module | None = None,
    data: Any = None,
    arguments: dict[str, Any] | None = None,
    resume: str | None = None,
    **kwargs: Any,
) -> Trained:
    """One optimizer step of SGD over all the data, by default, on the ranks there are."""
    use_cpu()
    reset()
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    data = make_data(head) if data is None else data
    num_rows = len(data) if hasattr(data, "__len__") else NUM_SAMPLES
    model = make_model(head) if model is None else model
    half = next((dtype for name, dtype in HALF.items() if settings.get(name, {}).get("enabled")), torch.float32)
    before = {name: p.detach().to(half).double() for name, p in model.named_parameters()}  # it rounds them first
    options: dict[str, Any] = {
        "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-tests"),
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": max(1, num_rows // (accumulation * num_ranks)),
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "deepspeed": copy.deepcopy(settings),
    }
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**options | (arguments or {})),
        train_dataset=data,
        **{"data_collator": HEADS[head].collate} | kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    assert trainer.model_wrapped.zero_optimization_stage() == settings["zero_optimization"]["stage"]
    rate = (arguments or {}).get("learning_rate", LEARNING_RATE)
    after = whole_weights(trainer.model)
    return Trained(trainer, {name: (before[name] - after[name]) / rate for name in after})
