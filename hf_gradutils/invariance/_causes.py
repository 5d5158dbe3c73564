"""Why the gradient of a stock Trainer is wrong, in a few words, and what makes it exact."""

from typing import Any

from transformers import Trainer

from hf_gradutils.invariance._advice import no_mean
from hf_gradutils.upstream.transformers import head_of

_CLOSE = 1e-3
_ABOUT = 1.4
"""How far a gradient of means over different targets is from the factor that multiplies it."""


def fix_for_stock(trainer: Any) -> str:
    """What makes the training of a stock Trainer exact."""
    name = type(trainer).__name__
    fix = f"hf-gradutils run <your program and its arguments>, or hf_gradutils.exact({name}) in place of {name}"
    if not _has_own_loss(trainer):
        return fix
    return (
        f"{fix}; if the loss is a weighted mean, as with class weights, "
        f"exact({name}, grad_plugin=GradUtilsPlugin(count_targets=…)) with the sum of the weights"
    )


def cause_in_stock(trainer: Any, scale: float, num_parts: int, num_ranks: int) -> str:
    """The cause of a wrong gradient; empty if nothing is known.

    Args:
        trainer: Not one of ours.
        scale: The multiple of the right gradient that is next to it.
        num_parts: Micro-batches of each rank.
        num_ranks: Ranks with rows of their own.
    """
    if reason := no_mean(trainer):
        return reason.partition(", ")[0]
    if num_ranks > 1 and abs(scale * num_ranks - 1) < _CLOSE:
        return f"it is averaged over {num_ranks} ranks, and the loss is a sum or divided by all targets already"
    if num_parts > 1 and abs(scale * num_parts - 1) < _CLOSE:
        return f"it is divided by {num_parts} micro-batches, and the loss is a sum or divided by all targets already"
    num_all = num_parts * num_ranks
    if any(n > 1 and 1 / _ABOUT < scale / n < _ABOUT for n in (num_all, num_parts)):
        return f"{_loss_of(trainer)} ignores num_items_in_batch" if _gets_count(trainer) else ""
    if num_all > 1 and 1 / _ABOUT < scale < _ABOUT:
        return f"the mean of the losses of {num_all} micro-batches is not the loss of one batch"
    return ""


def _has_own_loss(trainer: Any) -> bool:
    return trainer.compute_loss_func is not None or type(trainer).compute_loss is not Trainer.compute_loss


def _gets_count(trainer: Any) -> bool:
    return bool(trainer.model_accepts_loss_kwargs) or trainer.compute_loss_func is not None


def _loss_of(trainer: Any) -> str:
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    if _has_own_loss(trainer):
        return f"compute_loss of {type(trainer).__name__}"
    return f"the forward of {type(head_of(trainer)).__name__}"
