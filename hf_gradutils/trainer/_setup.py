"""A Trainer's Accelerator, and settings with which it cannot be exact."""

import logging
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets import trl, trl_generating
from hf_gradutils.trainer._ulysses import check_sequence_parallel

logger = logging.getLogger("hf_gradutils.trainer")


def adopt_accelerator(trainer: Any) -> None:
    """Turn the Accelerator that a Trainer, or an override around ours, has made into a ``GradUtilsAccelerator``."""
    if not isinstance(trainer.accelerator, GradUtilsAccelerator):
        num_micro_batches = trainer.args.gradient_accumulation_steps
        GradUtilsAccelerator.adopt(trainer.accelerator, trainer.grad_plugin, num_micro_batches=num_micro_batches)


def check_setup(trainer: Any) -> None:
    """Raise InvalidArgumentError for a set-up that scales, batches or clips by itself, or a setting in two places."""
    if not trainer.args.max_grad_norm >= 0:
        raise InvalidArgumentError(
            f"max_grad_norm must be > 0, got {trainer.args.max_grad_norm}; 0 measures the norm without clipping"
        )
    if trainer.args.n_gpu > 1:
        raise InvalidArgumentError(
            f"one process cannot train on {trainer.args.n_gpu} GPUs; start it with `accelerate launch --num_processes "
            f"{trainer.args.n_gpu}`, or with CUDA_VISIBLE_DEVICES=0 for one GPU"
        )
    check_sequence_parallel(trainer)
    if trainer.is_deepspeed_enabled and trainer.optimizer is not None and trainer.is_world_process_zero():
        logger.warning(
            "transformers makes another optimizer under DeepSpeed, by optim and learning_rate, in place of the one "
            "that was passed; override create_optimizer instead"
        )
    if trainer.accelerator.distributed_type == DistributedType.XLA:
        raise InvalidArgumentError(
            "XLA reduces gradients in its own step, so they cannot be made exact; use transformers.Trainer there"
        )
    if reason := trl.why_not_exact(trainer):
        name = trl.trl_name(trainer)
        raise InvalidArgumentError(
            f"{name} {reason}, so it cannot be made exact; use it without GradUtilsTrainerMixin in front, or one of "
            f"{', '.join(trl.EXACT)} with it"
        )
    trl_generating.check_options(trainer)
    if named := trainer.grad_plugin.accumulation_settings():
        raise InvalidArgumentError(
            f"GradUtilsPlugin({', '.join(named)}) has no effect in a Trainer; set TrainingArguments("
            "gradient_accumulation_steps=…, accelerator_config={'gradient_accumulation_kwargs': {…}}) instead"
        )


def check_nothing_reads_gradients(trainer: Any) -> None:
    """Raise InvalidArgumentError for a callback that would see gradients before the optimizer has scaled them."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step:
            raise InvalidArgumentError(
                f"with fold_into_optimizer=True {type(callback).__name__}.on_pre_optimizer_step would see gradients "
                "that are not scaled yet; leave out one of the two"
            )
