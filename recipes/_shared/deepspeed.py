"""DeepSpeed, where the launcher's configuration chooses it."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from accelerate.utils import DeepSpeedPlugin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from _shared.errors import UserError
from hf_gradutils import GradUtilsAccelerator

SET_TWICE = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
}
"""Key of DeepSpeed's configuration → the recipe's argument."""


def uses_deepspeed() -> bool:
    """Return True if the launcher's configuration, or a Trainer's argument, has chosen DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def precision_flags() -> list[str]:
    """Return the launcher's precision as a flag: under DeepSpeed a Trainer takes it from its arguments only."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return [f"--{precision}=true"] if uses_deepspeed() and precision in ("bf16", "fp16") else []


def match_deepspeed(plugin: DeepSpeedPlugin, training: Any) -> DeepSpeedPlugin:
    """Write the recipe's numbers into DeepSpeed's configuration; UserError if it has another one."""
    config = plugin.deepspeed_config
    for key, name in SET_TWICE.items():
        value, own = config.get(key, "auto"), getattr(training, name)
        if value not in ("auto", own):
            raise UserError(
                f"DeepSpeed's configuration has {key}: {value}, but {name} is {own}; write {key}: auto there, or pass "
                f"--{name} {value}"
            )
        config[key] = own
    # Under ZeRO 3: without it the recipes could not save the model as one file.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return plugin


def loads_on_all_ranks() -> bool:
    """Return True under ZeRO 3: each rank keeps its shard while the model is made, and all have to take part."""
    return is_deepspeed_zero3_enabled()


def counted_first(
    accelerator: GradUtilsAccelerator, loader: Iterable[Any], num_steps: int, count: Callable[[Any], Any]
) -> Iterator[Any]:
    """Yield a loader's batches; before those of a window, the Accelerator is told how many targets they have."""
    batches = iter(loader)
    while window := list(islice(batches, num_steps)):
        accelerator.start_window(sum(count(batch) for batch in window), num_micro_batches=len(window))
        yield from window
