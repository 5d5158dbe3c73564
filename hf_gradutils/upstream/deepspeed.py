"""Facts about DeepSpeed (0.19.8): its engine's settings, and the faults of its fp16.

DeepSpeed is imported by accelerate, and only where it is used; here it is seen through its engine.
"""

import contextlib
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

CHECKED = "0.19.8"
"""The oldest version that is supported. Before it, ZeRO in float32 takes steps that are not finite."""

ENGINE_ATTRIBUTES = (
    "autotp_size",
    "backward",
    "basic_optimizer",
    "bfloat16_enabled",
    "communication_data_type",
    "enable_backward_allreduce",
    "fp16_enabled",
    "get_data_types",
    "get_global_grad_norm",
    "global_rank",
    "global_samples",
    "global_steps",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "has_moe_layers",
    "is_deepcompile_enabled",
    "is_gradient_accumulation_boundary",
    "lr_scheduler",
    "managed_gradient_accumulation",
    "micro_steps",
    "module",
    "monitor",
    "optimizer",
    "pipeline_parallelism",
    "seq_data_parallel_group",
    "sequence_parallel_size",
    "set_gradient_accumulation_boundary",
    "step",
    "torch_autocast_dtype",
    "torch_autocast_enabled",
    "torch_autocast_z0_gradscaler",
    "tput_timer",
    "train_micro_batch_size_per_gpu",
    "was_step_applied",
    "zenflow",
    "zero_compute_grad_norm",
    "zero_contiguous_gradients",
    "zero_grad",
    "zero_optimization_stage",
    "zero_quantized_gradients",
    "zero_quantized_weights",
    "zero_reduce_bucket_size",
    "zero_reduce_scatter",
)
"""Of ``deepspeed.DeepSpeedEngine``; none has an underscore."""

OPTIMIZER_ATTRIBUTES = (
    "clear_backward_seen_flag",
    "custom_loss_scaler",
    "dynamic_loss_scale",
    "external_loss_scale",
    "loss_scale",
)
"""Of ZeRO's optimizers."""


def engine_of(accelerator: Any) -> Any:
    """The engine that accelerate has made to train a model; None without one, and for inference."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return wrapped.engine if wrapped is not None and is_engine(wrapped.engine) else None


def is_engine(model: object) -> bool:
    """True for DeepSpeed's wrapper around a model that it trains."""
    module = sys.modules.get("deepspeed")
    return module is not None and isinstance(model, module.DeepSpeedEngine) and bool(model.basic_optimizer)


def steps_on_grad(engine: Any) -> bool:
    """True if a plain optimizer of torch steps on ``.grad``: stage 0 in float32. DeepSpeed then looks at no norm."""
    return bool(engine.optimizer is engine.basic_optimizer)


def version_before_checked() -> str:
    """The version of DeepSpeed, if it is older than :data:`CHECKED`; else empty."""
    installed = metadata.version("deepspeed")
    return installed if Version(installed) < Version(CHECKED) else ""


def num_ranks(engine: Any) -> int:
    """The ranks that the engine averages over."""
    return dist.get_world_size(engine.seq_data_parallel_group)


def num_averaged(engine: Any) -> int:
    """The number by which the engine divides the sum of all ranks' gradients.

    Under sequence parallelism that is the number of groups that share rows, but at stage 3 the number of ranks, unless
    it all-reduces. Held by ``tests/deepspeed/test_ulysses.py``.
    """
    if engine.zero_optimization_stage() == 3 and not _all_reduces(engine):
        return num_ranks(engine)
    return num_ranks(engine) // int(engine.sequence_parallel_size)


def _all_reduces(engine: Any) -> bool:
    """True if stage 3 all-reduces gradients, those of parameters that fit its bucket."""
    return engine.zero_contiguous_gradients() and not engine.zero_reduce_scatter()


def divides_by_several(engine: Any) -> bool:
    """True if the engine divides gradients of some parameters by another number than others."""
    is_split = int(engine.sequence_parallel_size) > 1 and engine.zero_optimization_stage() == 3 and _all_reduces(engine)
    bucket = engine.zero_reduce_bucket_size()
    return is_split and any(_num_elements(parameter) > bucket for parameter in engine.module.parameters())


def _num_elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def hands_out_shards(loader: Any) -> bool:
    """True if a loader is DeepSpeed's, which cuts rows of another between ranks."""
    theirs = sys.modules.get("deepspeed.runtime.sequence_parallel.ulysses_sp")
    return theirs is not None and isinstance(loader, theirs.UlyssesSPDataLoaderAdapter)


def add_up_from_here(engine: Any) -> None:
    """Let ZeRO-3 add the next backward to those before, also if its forward went past the engine.

    It notes in the engine's forward that a micro-batch has ended, and would else write over the gradients so far.
    """
    note = getattr(engine.optimizer, "clear_backward_seen_flag", None)
    if note is not None:
        note()


def scale_adapts(engine: Any) -> bool:
    """True if fp16's loss scale adapts itself, so that an overflow now and then is normal."""
    return bool(getattr(engine.optimizer, "dynamic_loss_scale", False))


def scale_is_fixed(engine: Any) -> bool:
    """True if fp16's loss scale stays as the configuration has it."""
    return bool(engine.fp16_enabled()) and not scale_adapts(engine)


@contextlib.contextmanager
def holding_loss_scale(engine: Any) -> Iterator[None]:
    """Let a step divide by the loss scale of its backwards.

    DeepSpeed (0.19.8) adapts the scale before it divides: a step in which it grows is half as long. The cure can go
    when ``test_control_deepspeed_halves_the_step_in_which_the_loss_scale_grows`` fails.
    """
    optimizer = engine.optimizer
    if not (scale_adapts(engine) and hasattr(optimizer, "custom_loss_scaler")):
        yield
        return
    before = optimizer.custom_loss_scaler, optimizer.external_loss_scale
    optimizer.external_loss_scale, optimizer.custom_loss_scaler = optimizer.loss_scale, True
    try:
        yield
    finally:
        optimizer.custom_loss_scaler, optimizer.external_loss_scale = before


def clipping_is_set(accelerator: Any) -> bool:
    """True if DeepSpeed's configuration says to what norm to clip; called before accelerate says it there itself."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return False
    is_set = isinstance(plugin.deepspeed_config.get("gradient_clipping"), int | float)
    # Accelerators that are made later share the configuration.
    return bool(vars(plugin).setdefault("gradient_clipping_is_set", is_set))


# ---- Gradients and weights, for the check of invariance ----

GRAD_NORM = "_global_grad_norm"
"""Where engine and optimizer keep the norm of the last step."""


def is_partitioned(tensor: Tensor) -> bool:
    """True for a parameter of which ZeRO-3 leaves each rank a part."""
    return hasattr(tensor, "ds_id")


def gathered(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """The context in which a partitioned tensor is whole. Collectives: one gather for that."""
    if not is_partitioned(tensor):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])  # type: ignore[no-any-return]


def full_gradient(parameter: Tensor) -> Tensor | None:
    """The whole gradient of a parameter, after the last backward of a window and before the step.

    Times the loss scale; may be the engine's own tensor. None without one. Collectives: one over all ranks, at ZeRO 1
    to 3.
    """
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)  # type: ignore[no-any-return]


def loss_scale_of(engine: Any) -> float:
    """The number by which a step divides gradients; 1 unless in fp16."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def why_not_measured(engine: Any) -> str:
    """The reason why the engine's gradients cannot be read, or its step not left out; empty if there is none."""
    optimizer = engine.optimizer
    scalers = (engine.torch_autocast_z0_gradscaler, getattr(optimizer, "torch_autocast_gradscaler", None))
    reasons = [
        (engine.autotp_size() > 1, "tensor parallelism of DeepSpeed leaves each rank a part of the gradient"),
        (engine.sequence_parallel_size > 1, "Ulysses cuts sequences up in a loader of its own"),
        (engine.has_moe_layers, "ranks hold different experts in DeepSpeed's own layers"),
        (not engine.enable_backward_allreduce, "DeepSpeed's optimizer averages gradients in its step"),
        (bool(getattr(engine, "zenflow", False)), "ZenFlow steps on parts of the gradient, at times of its own"),
        (bool(getattr(optimizer, "swap_optimizer", False)), "DeepSpeed keeps gradients and optimizer states in files"),
        (any(scalers), "torch_autocast in fp16 scales gradients by a scaler of its own"),
        (engine.is_deepcompile_enabled(), "DeepCompile reduces gradients in compiled code"),
    ]
    return next((why for is_so, why in reasons if is_so), "")


def drop_gradients(engine: Any) -> None:
    """Drop the gradients of a window, also of one that has not ended. Collectives: none."""
    optimizer = engine.optimizer
    engine.zero_grad()
    if not steps_on_grad(engine):
        optimizer.zero_grad()  # at stage 3 the next backward writes over the partitions
    if hasattr(optimizer, "all_grad_tensors"):  # stages 1 and 2, as after an overflow
        optimizer._release_preflattened_grad_buffers()
        for index in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[index] = optimizer.all_grad_tensors[index] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()


def optimizers_in(engine: Any) -> list[Any]:
    """Those of torch that the engine's step calls: with a part offloaded to the CPU there are two."""
    optimizers = (engine.basic_optimizer, getattr(engine.optimizer, "backup_optimizer", None))
    return [optimizer for optimizer in optimizers if optimizer is not None]


def counting_in(engine: Any) -> list[Any]:
    """The objects in whose plain attributes a step counts: engine, optimizer, loss scale, speed."""
    optimizer = engine.optimizer
    scales = (getattr(optimizer, "loss_scaler", None), getattr(optimizer, "loss_scale_config", None))
    return [one for one in (engine, optimizer, *scales, engine.tput_timer) if one is not None]


@contextlib.contextmanager
def without_configuration() -> Iterator[None]:
    """Let transformers build and run models as without DeepSpeed, whose configuration shards what it builds."""
    import transformers.integrations.deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def drop_hooks(model: nn.Module) -> None:
    """Remove the hooks on modules by which an engine follows its model."""
    for module in model.modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
            for key, hook in list(getattr(module, kind).items()):
                if str(getattr(hook, "__module__", "")).startswith("deepspeed."):
                    del getattr(module, kind)[key]
                    for extra in ("_with_kwargs", "_always_called"):
                        getattr(module, f"{kind}{extra}", {}).pop(key, None)
