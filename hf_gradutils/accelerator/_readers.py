"""What reads gradients before their window has ended."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from hf_gradutils.accelerator._optimizer import innermost
from hf_gradutils.upstream.torch import backward_hooks


def reader_of_gradients(model: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    """What reads gradients in the backward, in words; empty if nothing does.

    Hooks on parameters and modules are found, those on activations are not.
    """
    for optimizer in optimizers:
        if hasattr(innermost(optimizer), "fused_backward"):
            return f"{type(innermost(optimizer)).__name__} steps in the backward"
    name = next((name for name, _ in backward_hooks(model)), None)
    return "" if name is None else f"a hook on {name} reads gradients in the backward"
