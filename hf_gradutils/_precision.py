"""The precision of a model's arithmetic: float32 or better, or rounded."""

import torch
from accelerate import Accelerator
from torch import nn


def uses_exact_arithmetic(accelerator: Accelerator, model: nn.Module) -> bool:
    """True if a loss does not depend on the composition of its batch, up to float32 rounding."""
    return accelerator.mixed_precision == "no" and is_exact_in_itself(model, accelerator.device)


def rounding_of(accelerator: Accelerator, model: nn.Module) -> float:
    """The distance from 1 to the next number of the coarsest dtype that the model computes in; 0 from float32 on."""
    if uses_exact_arithmetic(accelerator, model):
        return 0.0
    is_bf16 = accelerator.mixed_precision == "bf16" or any(p.dtype == torch.bfloat16 for p in model.parameters())
    return torch.finfo(torch.bfloat16 if is_bf16 else torch.float16).eps  # TF32 rounds like float16


def is_exact_in_itself(model: nn.Module, device: torch.device) -> bool:
    """True for a model in float32 or float64 whose products are not rounded, without regard to autocast."""
    if not all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()):
        return False
    # TF32 and bf16 round products, by default those of convolutions on CUDA. Read per operation: torch's older flag for
    # matrix products raises once TF32 was switched on by the newer one, as TrainingArguments(tf32=True) does.
    is_cuda = device.type == "cuda"
    backend = torch.backends.cudnn if is_cuda else torch.backends.mkldnn
    operations = [torch.backends.cuda.matmul if is_cuda else backend.matmul]
    for kinds, operation in ((_CONVOLUTIONS, backend.conv), (nn.RNNBase, backend.rnn)):
        if any(isinstance(module, kinds) for module in model.modules()):
            operations.append(operation)
    return all(operation.fp32_precision in ("none", "ieee") for operation in operations)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
