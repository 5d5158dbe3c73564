"""What repairs a Trainer or a loop whose gradient is wrong."""

from typing import Any

from hf_gradutils.accelerator import WholeBatchLoss
from hf_gradutils.invariance._stock import Backwards
from hf_gradutils.targets.known_heads import whole_batch_head
from hf_gradutils.targets.sentence_losses import kind_of, losses_of
from hf_gradutils.targets.several_means import several_means_of
from hf_gradutils.upstream.torch import has_users_hook_after_accumulation
from hf_gradutils.upstream.transformers import head_of

_CLOSE = 1e-3
_OURS = "use hf_gradutils.GradUtilsTrainer, or GradUtilsTrainerMixin in front of it"
_OTHER_FORMS = (
    "a loss that compares all rows of the batch (contrastive) is a WholeBatchLoss(embed, loss, parameters), and one "
    "that adds means over different targets is a list [(loss, count), …]"
)
_IS_ANOTHER = "but it is not the one that hf_gradutils knows: does a subclass or a loss of yours change it?"
_NOT_ATTACHED = (
    "what the loss reads besides the rows of the batch (a temperature, a bias) gets a wrong gradient or none: let "
    "WholeBatchLoss(parameters=lambda model: (…,)) return the parameters themselves, not detached, and freeze those "
    "that are not to be trained"
)
_OTHER_COUNT = "the count of a term is not the number of targets that its loss is a mean over"
_NOT_THESE_ROWS = (
    "WholeBatchLoss.embed must return all that the loss reads of each row, and its loss must not depend on anything "
    "else but what parameters=… returns"
)


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
    if trainer.whole_batch_loss is not None:
        return f"{_NOT_THESE_ROWS}; {_NOT_ATTACHED}"
    reason = no_mean(trainer)
    if reason and not plugin.check_loss_unit:
        return f"{reason}, which check_loss_unit=False takes for a mean; leave that out. Of your own, {_OTHER_FORMS}"
    if trainer._unit.num_terms:
        return _OTHER_COUNT
    if plugin.check_loss_unit and reason:
        return f"{reason}, {_IS_ANOTHER}"
    if plugin.aux == "exact":
        return (
            "with aux='exact' the router loss must be that of the head, which label smoothing, a loss function or a "
            "compute_loss of your own may leave out or compute by itself; leave out one of the two"
        )
    if factor is not None and both > 1 and abs(factor * both - 1) < _CLOSE:
        return f"training_step calls accelerator.backward {both} times; add the losses up and call backward once"
    if factor == 1:
        return "let training_step return the loss that it passes to accelerator.backward, detached"
    named = [] if plugin.loss_unit == "auto" else [f"loss_unit={plugin.loss_unit!r}"]
    named += [] if plugin.count_targets is None else ["count_targets=…"]
    if named:
        return f"leave out GradUtilsPlugin({', '.join(named)}), or set it to what the loss is a mean over"
    if factor:
        return (
            "something multiplies or divides the loss by a number of ranks or micro-batches; let compute_loss return "
            "the micro-batch's own mean, and training_step pass that to accelerator.backward"
        )
    unit = "set GradUtilsPlugin(loss_unit=… or count_targets=…) to what the loss is a mean over"
    return f"{unit}; {_OTHER_FORMS}{_hooks(trainer)}"


def advice_for_stock(trainer: Any, factor: float | None, backwards: Backwards) -> str:
    """The fix for any other Trainer; arguments as :func:`advice_for_ours`."""
    name, num_ranks = type(trainer).__name__, trainer.accelerator.num_processes
    if reason := no_mean(trainer):
        return f"{reason}, and {name} takes the mean of the losses of single micro-batches and ranks instead; {_OURS}"
    if num_ranks > 1 and factor is not None and abs(factor * num_ranks - 1) < _CLOSE:
        return (
            "gradients are averaged over ranks; multiply the loss by self.accelerator.num_processes in compute_loss, "
            "where it is divided by num_items_in_batch"
        )
    fix = f"{name} does not divide by the targets of all micro-batches and ranks here; {_OURS}"
    return f"{fix}; {_not_past_accelerate(backwards)}" if backwards.plain else f"{fix}{_hooks(trainer)}"


def advice_if_few_are_wrong(trainer: Any, *, is_ours: bool) -> str:
    """The fix if the gradients of a few parameters are wrong; empty if nothing is known of such a loss."""
    if getattr(trainer, "whole_batch_loss", None) is not None:
        return _NOT_ATTACHED
    reason = no_mean(trainer)
    if reason and is_ours:
        return f"{reason}, {_IS_ANOTHER}"
    return f"{reason}; {_OURS}" if reason else ""


def advice_for_loop(loss: object, *, has_terms: bool, is_ours: bool) -> str:
    """The fix for a loop with an Accelerator.

    Args:
        loss: Its ``loss_and_targets``.
        has_terms: That returns several (loss, count).
        is_ours: The Accelerator is.
    """
    if isinstance(loss, WholeBatchLoss):
        if is_ours:
            return f"{_NOT_THESE_ROWS}; {_NOT_ATTACHED}"
        return (
            "accelerate's Accelerator compares the rows of single micro-batches and ranks; use "
            "hf_gradutils.GradUtilsAccelerator and backward_whole_batch(loss, batches)"
        )
    if is_ours and has_terms:
        return _OTHER_COUNT
    if is_ours:
        return f"num_targets is not the number of targets that the loss is a mean over; {_OTHER_FORMS}"
    how = "start_window([num_targets, …]) and backward([(loss, num_targets), …])"
    return (
        "accelerate's Accelerator does not weight micro-batches by their targets; use "
        f"hf_gradutils.GradUtilsAccelerator and {how if has_terms else 'backward(loss, num_targets=…)'}"
    )


def advice_for_torch(loss: object) -> str:
    """The fix for a loop of plain torch."""
    if isinstance(loss, WholeBatchLoss):
        return (
            "compute the loss from the rows of all micro-batches and ranks, as "
            "hf_gradutils.GradUtilsAccelerator.backward_whole_batch does in two passes"
        )
    return "divide gradients at the window's end by the targets that the losses are means over"


def advice_if_few_of_loop(loss: object) -> str:
    """As :func:`advice_if_few_are_wrong`."""
    return _NOT_ATTACHED if isinstance(loss, WholeBatchLoss) else ""


def no_mean(trainer: Any) -> str:
    """What the loss of a known head is instead of a mean over targets; empty if it is one, or not the head's."""
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return ""
    for loss in losses_of(trainer).values():
        if kind_of(loss) == "whole":
            return f"{type(loss).__name__} is a loss of the whole batch, exact in two passes"
    head = head_of(trainer)
    if whole_batch_head(head) is not None:
        return f"the loss of {type(head).__name__} is one of the whole batch, exact in two passes"
    if several_means_of(head) is not None:
        return f"the loss of {type(head).__name__} adds means over different targets, which need a weight each"
    return ""


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
