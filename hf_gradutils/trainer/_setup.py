"""Settings that a Trainer cannot be exact with."""

from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets import trl


def check_setup(trainer: Any) -> None:
    """Raise InvalidArgumentError for a set-up that scales, batches or clips by itself, or settings in two places."""
    if not trainer.args.max_grad_norm >= 0:
        raise InvalidArgumentError(
            f"max_grad_norm must be > 0, got {trainer.args.max_grad_norm}; 0 measures the norm without clipping"
        )
    if trainer.args.n_gpu > 1:
        raise InvalidArgumentError(
            f"expected one process per GPU, got one process for {trainer.args.n_gpu}; start it with `accelerate "
            f"launch --num_processes {trainer.args.n_gpu}`, or with CUDA_VISIBLE_DEVICES=0 for one GPU"
        )
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED or trainer.get_sp_size() > 1:
        raise InvalidArgumentError(
            "expected DDP, FSDP2, tensor or context parallelism, got DeepSpeed, whose engine scales and clips "
            "gradients itself; use FSDP2 (fsdp=True, fsdp_config={'version': 2}), which shards what ZeRO-3 shards"
        )
    if trainer.accelerator.distributed_type == DistributedType.XLA:
        raise InvalidArgumentError(
            "expected CPU or a device that torch drives itself, got XLA, which reduces gradients in its own step; "
            "use transformers.Trainer there"
        )
    if reason := trl.why_not_exact(trainer):
        name = trl.trl_name(trainer)
        raise InvalidArgumentError(
            f"expected of trl's trainers one of {', '.join(trl.EXACT)}, got {name}, which {reason}; use {name} by "
            "itself, without GradUtilsTrainerMixin in front"
        )
    if named := trainer.grad_plugin.accumulation_settings():
        raise InvalidArgumentError(
            f"expected accumulation to be set in TrainingArguments, got GradUtilsPlugin({', '.join(named)}); use "
            "gradient_accumulation_steps, or accelerator_config={'gradient_accumulation_kwargs': {…}}"
        )


def check_nothing_reads_gradients(trainer: Any) -> None:
    """Raise InvalidArgumentError for a callback that would see gradients before the optimizer has scaled them."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step:
            raise InvalidArgumentError(
                "expected no callback before the optimizer step with fold_into_optimizer=True, because gradients "
                f"are not scaled yet then, got {type(callback).__name__}.on_pre_optimizer_step; leave out one"
            )
