"""Whether a model computes exactly enough to compare two ways of cutting up a batch digit by digit."""

import torch
from accelerate import Accelerator
from torch import nn


def uses_exact_arithmetic(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether a loss is the same however its batch is composed, up to float32 rounding."""
    return accelerator.mixed_precision == "no" and is_exact_in_itself(model, accelerator.device)


def is_exact_in_itself(model: nn.Module, device: torch.device) -> bool:
    """The same for a model that nothing casts on the way."""
    is_wide = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    return is_wide and not _rounds_products(model, device)


def _rounds_products(model: nn.Module, device: torch.device) -> bool:
    """Whether float32 products lose bits (TF32, bf16) in what the model is made of; convolutions do by default on CUDA.

    Asked by operation: torch's older question about matrix products raises once TF32 was switched on the newer way, as
    ``TrainingArguments(tf32=True)`` does.
    """
    is_cuda = device.type == "cuda"
    backend = torch.backends.cudnn if is_cuda else torch.backends.mkldnn
    asked = [torch.backends.cuda.matmul if is_cuda else backend.matmul]
    for kinds, operation in ((_CONVOLUTIONS, backend.conv), (nn.RNNBase, backend.rnn)):
        if any(isinstance(module, kinds) for module in model.modules()):
            asked.append(operation)
    return any(operation.fp32_precision not in ("none", "ieee") for operation in asked)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
