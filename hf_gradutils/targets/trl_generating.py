"""The trainers of trl that generate what they train on: reinforcement learning, and distillation on the student's text.

GRPO and RLOO make their micro-batches in ``_prepare_inputs``: generation, rewards, a buffer and counters advance with
each call. So no question may be put to their losses, and the unit comes from this table (trl 1.16):

    grpo, sapo, dr_grpo, luspo, RLOO    a mean over rows
    bnpo                                a mean over the unmasked tokens of the micro-batch
    dapo, cispo, vespo                  a sum over tokens, divided by a micro-batch's even share of the tokens that were
                                        generated together

With that share as its count, a micro-batch of the last kind adds its plain sum, and the step is divided by all shares.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.targets.counter import CountTargets, TargetCounter
from hf_gradutils.targets.trl import trl_name
from hf_gradutils.upstream.trl import TRL_ENTROPY_BONUS, join_step_time

GENERATING = ("GRPOTrainer", "RLOOTrainer")
"""Trainers that make their own micro-batches."""

MEANS_OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")
MEANS_OVER_TOKENS = ("bnpo",)
SHARES_OF_TOKENS = ("dapo", "cispo", "vespo")
"""``GRPOConfig.loss_type`` by what it divides by."""

_TINY = 2.0**-40
"""The count of a micro-batch without tokens, whose loss is 0: a step without any has a gradient of 0, not an error."""


def makes_batches(trainer: object) -> bool:
    """True for a trainer whose ``_prepare_inputs`` generates, so that nothing but training may call it."""
    return trl_name(trainer) in GENERATING


def check_options(trainer: Any) -> None:
    """Raise InvalidArgumentError for a loss that no weight of its micro-batches makes that of the whole step."""
    if trl_name(trainer) != "GRPOTrainer":
        return
    loss_type, accumulation = trainer.loss_type, trainer.args.gradient_accumulation_steps
    if loss_type not in (*MEANS_OVER_ROWS, *MEANS_OVER_TOKENS, *SHARES_OF_TOKENS):
        raise InvalidArgumentError(f"GRPOTrainer with loss_type={loss_type!r} is not known to take a mean")
    if trainer.top_entropy_quantile < 1 and accumulation > 1:
        raise InvalidArgumentError(
            f"GRPOTrainer with top_entropy_quantile={trainer.top_entropy_quantile} chooses tokens by a quantile of "
            "their own micro-batch, so a smaller micro-batch is another loss; set gradient_accumulation_steps=1 (ranks "
            "share their quantile) or top_entropy_quantile=1.0, or train without GradUtilsTrainerMixin in front"
        )
    is_split = accumulation > 1 or trainer.accelerator.num_processes > 1
    same_tokens = loss_type in MEANS_OVER_TOKENS and trainer.top_entropy_quantile == 1
    if getattr(trainer, TRL_ENTROPY_BONUS, False) and is_split and not same_tokens:
        raise InvalidArgumentError(
            f"GRPOTrainer with an entropy bonus adds a mean over the tokens of the micro-batch to loss_type="
            f"{loss_type!r}, which divides by something else, so one weight cannot make both exact; set "
            "loss_type='bnpo' with top_entropy_quantile=1.0, or entropy_coef=0.0 and use_adaptive_entropy=False, or "
            "train without GradUtilsTrainerMixin in front"
        )


def counter_of(trainer: Any) -> TargetCounter:
    """The count of what a trainer's own loss divides by, in what its ``_prepare_inputs`` returns."""
    loss_type = trainer.loss_type if trl_name(trainer) == "GRPOTrainer" else "grpo"
    num_parts = int(trainer.args.steps_per_generation)
    if loss_type in MEANS_OVER_ROWS:
        return TargetCounter(count=_RowCount(num_parts))
    if loss_type in MEANS_OVER_TOKENS:
        return TargetCounter(count=_counts_prepared(_count_tokens))
    return TargetCounter(count=_counts_prepared(_ShareCount(num_parts * int(trainer.accelerator.num_processes))))


def targets_per_micro_batch(trainer: Any) -> float:
    """About how many targets a micro-batch has."""
    num_rows = float(trainer.args.per_device_train_batch_size)
    is_by_rows = isinstance(counter_of(trainer).count, _RowCount)
    return num_rows if is_by_rows else num_rows * (trainer.max_completion_length or 1)


@dataclasses.dataclass(frozen=True)
class _RowCount:
    num_parts: int

    def __call__(self, batch: Any) -> Tensor:
        # Before it is prepared: all prompts of a generation.
        is_prepared = isinstance(batch, Mapping)
        return torch.tensor(len(batch["completion_mask"]) if is_prepared else len(batch) // self.num_parts)


def _count_tokens(batch: Mapping[str, Any]) -> Tensor:
    mask, tools = batch["completion_mask"], batch.get("tool_mask")
    num_tokens: Tensor = (mask if tools is None else mask * tools).sum()
    return num_tokens.double().clamp(min=_TINY)


@dataclasses.dataclass(frozen=True)
class _ShareCount:
    num_parts: int
    """Micro-batches of all ranks that were generated together."""

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        num_tokens: Tensor = batch["num_items_in_batch"].double()
        return num_tokens.clamp(min=1) / self.num_parts


def _counts_prepared(count: CountTargets) -> CountTargets:
    def counted(batch: Any) -> Tensor:
        if not isinstance(batch, Mapping):
            raise TargetCountError("the tokens of a batch of prompts are not known before they are generated")
        return count(batch)

    return counted


def why_not_counted_first(trainer: Any) -> str:
    """The reason why the targets of a window are unknown before its first forward; empty if they are known."""
    name, remedy = trl_name(trainer), ""
    if name == "GRPOTrainer" and trainer.loss_type not in MEANS_OVER_ROWS:
        remedy = f"use a loss_type that is a mean over rows ({', '.join(MEANS_OVER_ROWS)})"
    elif name == "GKDTrainer" and is_on_policy(trainer):
        remedy = "set lmbda=0.0 and seq_kd=False"
    if not remedy:
        return ""
    return (
        f"targets must be counted before a window's first forward (DeepSpeed, counts='first' or code that reads "
        f"gradients in the backward), but {name} generates them in each micro-batch; {remedy}, or do without the former"
    )


def is_on_policy(trainer: Any) -> bool:
    """True if a distillation may replace the answers of the data by generated ones."""
    return bool(trainer.lmbda > 0 or trainer.seq_kd)


def why_not_compared(trainer: Any) -> str:
    """The reason why a check of invariance cannot cut and compare a trainer's batches; empty if it can."""
    if not makes_batches(trainer):
        return ""
    return (
        f"{trl_name(trainer)} generates its batches and compares rewards within groups, so its samples cannot be "
        "cut up and trained again; the unit of its loss is known from a table"
    )


def off_policy(trainer: Any) -> dict[str, Any]:
    """Attributes with which a distillation trains on the answers of the data, which can be compared."""
    return {"lmbda": 0.0, "seq_kd": False} if trl_name(trainer) == "GKDTrainer" else {}


def join_step_times(trainer: Any) -> None:
    """Undo that a micro-batch which ends no window has logged a ``step_time``, as each is its own window to trl."""
    if makes_batches(trainer) and not trainer.accelerator.sync_gradients:
        join_step_time(trainer)
