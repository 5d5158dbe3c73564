"""The precision in which FSDP2 adds up gradients, which no launcher's configuration can say."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 sum gradients over ranks and micro-batches in float32; to be called before the model is prepared.

    accelerate 1.15 reduces in the precision of ``mixed_precision``: in bfloat16 with 8 bits, of which little is left
    after a sum over many ranks and micro-batches. DDP under autocast has float32 gradients anyway.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2:
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
