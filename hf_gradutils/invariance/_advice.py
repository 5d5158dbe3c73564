"""What repairs a Trainer whose gradient is wrong."""

from typing import Any

from hf_gradutils.invariance._stock import Backwards
from hf_gradutils.upstream.torch import has_users_hook_after_accumulation

_CLOSE = 1e-3


def advice_for_ours(trainer: Any, factor: float | None, backwards: Backwards) -> str:
    """The fix for one of our Trainers.

    Args:
        trainer: Whose gradient is wrong.
        factor: How many times too large the gradient is; 1 if only the loss is wrong, None if it is no multiple.
        backwards: What a micro-batch's ``training_step`` called.
    """
    plugin, both = trainer.grad_plugin, backwards.by_accelerator + backwards.plain
    if backwards.plain:
        return _not_past_accelerate(backwards)
    if factor is not None and both > 1 and abs(factor * both - 1) < _CLOSE:
        return f"training_step calls accelerator.backward {both} times; add the losses up and call backward once"
    if factor == 1:
        return "let training_step return the loss that it passes to accelerator.backward, detached"
    named = [] if plugin.loss_unit == "auto" else [f"loss_unit={plugin.loss_unit!r}"]
    named += [] if plugin.count_targets is None else ["count_targets=…"]
    if named:
        return f"leave out GradUtilsPlugin({', '.join(named)}), or set it to what the loss is a mean over"
    if factor is not None:
        return (
            "something multiplies or divides the loss by a number of ranks or micro-batches; let compute_loss return "
            "the micro-batch's own mean, and training_step pass that to accelerator.backward"
        )
    return f"set GradUtilsPlugin(loss_unit=… or count_targets=…) to what the loss is a mean over{_hooks(trainer)}"


def advice_for_stock(trainer: Any, factor: float | None, backwards: Backwards) -> str:
    """The fix for any other Trainer; arguments as :func:`advice_for_ours`."""
    num_ranks = trainer.accelerator.num_processes
    if num_ranks > 1 and factor is not None and abs(factor * num_ranks - 1) < _CLOSE:
        return (
            "gradients are averaged over ranks; multiply the loss by self.accelerator.num_processes in compute_loss, "
            "where it is divided by num_items_in_batch"
        )
    name = type(trainer).__name__
    fix = (
        f"{name} does not divide by the targets of all micro-batches and ranks here; use "
        "hf_gradutils.GradUtilsTrainer, or GradUtilsTrainerMixin in front of it"
    )
    return f"{fix}; {_not_past_accelerate(backwards)}" if backwards.plain else f"{fix}{_hooks(trainer)}"


def _not_past_accelerate(backwards: Backwards) -> str:
    fix = "call self.accelerator.backward(loss) there"
    if backwards.by_accelerator + backwards.plain > 1:
        fix = "add the losses of a micro-batch up and call self.accelerator.backward(loss) once"
    return f"training_step calls backward on the loss itself, which nothing can weight; {fix}"


def _hooks(trainer: Any) -> str:
    if not any(map(has_users_hook_after_accumulation, trainer.model.parameters())):
        return ""
    return (
        "; or hooks change the gradients of single micro-batches: change those of the whole window, in a callback's "
        "on_pre_optimizer_step"
    )
