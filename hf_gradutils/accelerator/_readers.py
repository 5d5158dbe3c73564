"""What reads gradients before their window has ended."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_gradutils.accelerator._optimizer import innermost
from hf_gradutils.errors import TargetCountError
from hf_gradutils.upstream.dtensor import local_tensor
from hf_gradutils.upstream.torch import backward_hooks, grads_of


def reader_of_gradients(model: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    """What reads gradients in the backward, in words; empty if nothing does.

    Hooks on parameters and modules are found, those on activations are not.
    """
    for optimizer in optimizers:
        if hasattr(innermost(optimizer), "fused_backward"):
            return f"{type(innermost(optimizer)).__name__} steps in the backward"
    name = next((name for name, _ in backward_hooks(model)), None)
    return "" if name is None else f"a hook on {name} reads gradients in the backward"


def state_of_gradients(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Which gradients there are, and how often each was changed. Host syncs: none."""
    return [(id(g), g._version) for g in grads_of(parameters) if g is not None]


def check_untouched(before: list[tuple[int, int]], parameters: Sequence[Tensor]) -> None:
    """Raise TargetCountError if gradients have changed since a backward, in a window of sums."""
    if before == state_of_gradients(parameters):
        return
    if all(g.isfinite().all() for g in grads_of(parameters) if g is not None):  # others are judged at the window's end
        raise TargetCountError(
            "gradients have changed since accelerator.backward, by a plain loss.backward(), torch's clip_grad_norm_ or "
            "by hand, but until the window ends they are sums over its targets: call accelerator.backward for every "
            "loss and accelerator.clip_grad_norm_, or make them final with GradUtilsPlugin(counts='first')"
        )


def check_weighted(parameters: Iterable[Tensor]) -> None:
    """Raise TargetCountError if any has a gradient; called where no loss of theirs was weighted. A host sync for each.

    Gradients of 0 are torch's, which so makes the state of an optimizer that is resumed.
    """
    if any(bool(local_tensor(g).any()) for g in grads_of(list(parameters)) if g is not None):
        raise TargetCountError(
            "there are gradients that were not made by accelerator.backward, so they are neither weighted nor divided; "
            "call accelerator.backward(loss) in place of loss.backward(), with num_targets=… in a loop of your own"
        )
