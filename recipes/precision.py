"""The precision in which FSDP2 adds up gradients, which no launcher's configuration can say."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy


def keep_sums_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 sum gradients, and hand out the loss, in float32; to be called before the model is prepared.

    Under ``mixed_precision: bf16`` accelerate 1.15 has FSDP2 do both in bfloat16, whose 8 bits leave little of a sum
    over many ranks and micro-batches, and round the loss (6.40625) and with it the weight that a micro-batch's gradient
    gets. DDP under autocast has float32 gradients and losses anyway.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2:
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=torch.float32)
