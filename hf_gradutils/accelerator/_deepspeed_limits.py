"""Refusals under DeepSpeed: engines that cannot be made exact, and settings of ours that they do not follow."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from hf_gradutils.accelerator._half_precision import MANY_MICRO_BATCHES
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.deepspeed import (
    CHECKED,
    divides_by_several,
    num_ranks,
    scale_adapts,
    steps_on_grad,
    version_before_checked,
)

logger = logging.getLogger("hf_gradutils.accelerator")


def check_backend(accelerator: Accelerator, options: Mapping[str, Any]) -> None:
    """Raise InvalidArgumentError for a backend that cannot be made exact, or one that accelerate leaves out silently.

    ``options``: with which the Accelerator was made.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise InvalidArgumentError(
            f"{kind.value} scales and clips gradients itself, so they cannot be made exact; use FSDP2 (accelerate "
            "launch --use_fsdp --fsdp_version 2) or DeepSpeed"
        )
    has_plugin = any(options.get(name) is not None for name in ("deepspeed_plugin", "deepspeed_plugins"))
    if has_plugin and kind != DistributedType.DEEPSPEED:
        raise InvalidArgumentError(
            "accelerate leaves out DeepSpeed with cpu=True; call accelerate.PartialState(cpu=True) first, and leave "
            "it out here"
        )


def check_engine(engine: Any) -> None:
    """Raise InvalidArgumentError for an engine that scales, steps or measures in a way that cannot be made exact."""
    if too_old := version_before_checked():
        raise InvalidArgumentError(
            f"DeepSpeed {too_old} steps on gradients that are not finite in float32; pip install 'deepspeed>={CHECKED}'"
        )
    stage = engine.zero_optimization_stage()
    is_split = stage == 3 or engine.sequence_parallel_size > 1
    refused = [
        (
            engine.fp16_enabled() and stage == 0,
            "fp16 at ZeRO stage 0 divides gradients by a loss scale that DeepSpeed (0.19.8) has not multiplied by; use "
            "stage 1, or bf16",
        ),
        (
            engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
            '"torch_autocast" in float16 leaves its loss scale in the norm that is logged, and above stage 0 in the '
            'norm that is clipped (0.19.8); use bfloat16, or "fp16"',
        ),
        (
            engine.gradient_predivide_factor() == num_ranks(engine) > 1 and is_split,
            '"gradient_predivide_factor" is not undone (0.19.8) where it equals the number of ranks, at ZeRO stage 3 '
            "or under sequence parallelism; leave it out",
        ),
        (
            divides_by_several(engine),
            '"reduce_scatter": false under sequence parallelism divides gradients of parameters larger than '
            '"reduce_bucket_size" by another number than others; leave it out',
        ),
        (
            engine.autotp_size() > 1,
            '"autotp_size": its tensor parallelism is not supported; use that of transformers with FSDP2, without '
            "DeepSpeed",
        ),
        (bool(engine.zenflow), '"zenflow" steps on a part of the gradients before the others; leave it out'),
        (
            engine.is_deepcompile_enabled(),
            '"deepcompile" averages gradients inside the compiled graph, which was never checked; leave it out',
        ),
        (
            engine.has_moe_layers,
            "of the experts of its own mixture-of-experts layers each rank knows a part of the norm; use a model of "
            "transformers, whose experts ZeRO shards",
        ),
        (
            engine.pipeline_parallelism,
            "its pipeline runs backwards by itself, without weights for them; use ZeRO without a pipeline",
        ),
        (
            not engine.managed_gradient_accumulation(),
            '"managed_gradient_accumulation": false leaves the averaging over ranks to the step; leave it out',
        ),
        (
            not engine.zero_compute_grad_norm(),
            '"compute_grad_norm": false leaves no norm to log, and none that tells a gradient that is not finite; '
            "leave it out",
        ),
    ]
    for is_so, why in refused:
        if is_so:
            raise InvalidArgumentError(f"DeepSpeed: {why}")


def check_plugin(plugin: GradUtilsPlugin, engine: Any) -> None:
    """Raise InvalidArgumentError for settings of what the engine does by itself, in its own way."""
    takes_nonfinite = engine.bfloat16_enabled() and not getattr(engine.optimizer, "check_grad_overflow", True)
    measures = steps_on_grad(engine)
    clips_itself = not measures or bool(engine.gradient_clipping())
    refused = [
        (plugin.counts == "streamed", "counts='streamed'", "the engine's gradients must be final in the backward"),
        (plugin.sync is not None, f"sync={plugin.sync!r}", "its ZeRO stage says when gradients are communicated"),
        (plugin.fold_into_optimizer, "fold_into_optimizer=True", "it steps on gradients of its own"),
        (
            plugin.accumulate_in_float32 is True,
            "accumulate_in_float32=True",
            'its configuration has "data_types": {"grad_accum_dtype": "fp32"} for that',
        ),
        (plugin.norm_type != 2 and clips_itself, f"norm_type={plugin.norm_type:g}", "it clips by the 2-norm only"),
        (bool(plugin.ownership) and clips_itself, "ownership", "it measures all parameters alike"),
        (
            plugin.grad_norm_groups is not None and not measures,
            "grad_norm_groups",
            "its gradients are gone once it has stepped",
        ),
        (
            plugin.on_nonfinite == "ignore" and not (measures or takes_nonfinite or scale_adapts(engine)),
            "on_nonfinite='ignore'",
            "it leaves out such a step whatever is set; 'skip' counts them",
        ),
        (
            plugin.on_nonfinite != "ignore" and takes_nonfinite,
            f"on_nonfinite={plugin.on_nonfinite!r}",
            "\"check_grad_overflow\": false takes steps that are not finite; leave that out, or set 'ignore'",
        ),
    ]
    for is_so, setting, why in refused:
        if is_so:
            raise InvalidArgumentError(f"{setting} has no effect under DeepSpeed: {why}")


def warn_of_rounding(engine: Any) -> None:
    """Say what rounds gradients more than the model's own precision."""
    if engine.global_rank:
        return
    model_dtype, sum_dtype = engine.get_data_types()
    if engine.communication_data_type.itemsize < model_dtype.itemsize:
        logger.warning(
            "DeepSpeed rounds gradients to %s when ranks are averaged (communication_data_type): an error of some 2e-3",
            engine.communication_data_type,
        )
    for name in ("zero_quantized_gradients", "zero_quantized_weights"):
        if getattr(engine, name)():
            logger.warning("DeepSpeed rounds to integers of 8 bits or less when ranks communicate (%s)", name)
    if sum_dtype.itemsize < model_dtype.itemsize:
        logger.warning("DeepSpeed rounds the gradient of each micro-batch to %s (grad_accum_dtype)", sum_dtype)
    elif sum_dtype.itemsize < 4 and engine.gradient_accumulation_steps() >= MANY_MICRO_BATCHES:
        logger.warning(
            'DeepSpeed adds up %d micro-batches in %s; set "data_types": {"grad_accum_dtype": "fp32"}',
            engine.gradient_accumulation_steps(),
            sum_dtype,
        )
