"""What the loss of a user's ``compute_loss`` or loss function is a mean over, found out by asking it.

The contract of transformers is a sum over targets, divided by ``num_items_in_batch`` and, since ranks are averaged,
multiplied by their number. Others return the mean of their own micro-batch, whole or divided by the number of
micro-batches. The factors are the same for every batch, so no comparison of batches shows them; how the loss changes
with each number does.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_gradutils._collectives import gather_objects, world_domain
from hf_gradutils._pretended_world import collectives_noted, pretending
from hf_gradutils._undisturbed import random_states_kept

logger = logging.getLogger("hf_gradutils.trainer")


@dataclass(frozen=True, slots=True)
class LossContract:
    """How a loss becomes the mean over the targets of its own micro-batch."""

    divides: bool = False
    """It is a sum divided by the count it is given: given that of the whole window, a share of the window's mean."""
    factor: float = 1.0
    """What turns it, given its own count, into the mean over its own targets."""
    is_asked_alone: bool = False
    """Its terms differ: it is that mean if it is told its own count, one rank and one micro-batch."""
    is_known: bool = True
    """False if the loss was 0 or not finite when it was asked."""
    communicates: bool = False
    """It has collectives of its own, which need the true number of ranks."""
    is_surprising: bool = False
    """Its terms differ, and not as transformers' contract has it."""


@contextlib.contextmanager
def as_if_alone(trainer: Any, *, communicates: bool) -> Iterator[None]:
    """Let the user's code read that this micro-batch is the whole batch: one micro-batch, one data rank.

    ``communicates``: it reads the true number of ranks, because its collectives need that.
    """
    args, num_ranks = trainer.args, trainer.get_tp_size()
    before, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
    try:
        with contextlib.nullcontext() if communicates else pretending(trainer.accelerator, args, num_ranks):
            yield
    finally:
        args.gradient_accumulation_steps = before


def ask_loss(
    trainer: Any,
    loss_of: Callable[[Tensor], Tensor],
    models_own: Callable[[], Tensor],
    count: Tensor,
    *,
    is_undivided: bool,
) -> LossContract:
    """Find out how a loss depends on the count, the number of ranks and of micro-batches; the same on all ranks.

    Args:
        trainer: Asked for these numbers.
        loss_of: ``num_items_in_batch`` → the loss of this rank's first batch.
        models_own: The same as the model computes it: shows a number of ranks that the user's code has read before.
        count: This rank's targets, shape (), at least 1.
        is_undivided: transformers does not divide such a loss by the number of micro-batches.

    Collectives: one gather of objects over all ranks; each computes five losses. Host syncs: one a loss.
    """
    num_micro_batches = trainer.args.gradient_accumulation_steps
    num_ranks = trainer.accelerator.num_processes // trainer.get_tp_size()

    def ask(factor: float = 1.0) -> float:
        with random_states_kept(trainer.args.device):
            return float(loss_of(count * factor).detach().mean())

    counted = num_ranks if trainer.args.average_tokens_across_devices else 1
    with collectives_noted() as noted:
        own = ask()
    halved, in_window, communicates = ask(2.0), ask(float(num_micro_batches * counted)), bool(noted)
    try:
        with as_if_alone(trainer, communicates=communicates):
            alone = ask()
    except Exception:  # it needs the true numbers, on all ranks alike
        alone = own
    try:
        with random_states_kept(trainer.args.device):
            models = float(models_own().detach().mean())
    except Exception:  # the model may have no loss, on all ranks alike
        models = math.nan
    answer = _judge(own, halved, in_window * num_micro_batches, alone, models, num_ranks, num_micro_batches)
    if answer == LossContract() and is_undivided and _equal(own * num_micro_batches, models):
        # transformers would not divide it any more: a number of micro-batches that was read before.
        answer = LossContract(factor=float(num_micro_batches))
    answer = answer and replace(answer, communicates=communicates)
    answers = {answer for answer in gather_objects(world_domain(), answer) if answer is not None}
    if not answers:
        return LossContract(is_known=False)
    contract = answers.pop() if len(answers) == 1 else LossContract(is_asked_alone=True, communicates=communicates)
    if contract.is_surprising and trainer.is_world_process_zero():
        logger.warning(
            "some terms of the loss are divided by num_items_in_batch, by the number of ranks or of micro-batches, and "
            "others are not; each is taken as the mean over its own micro-batch. See docs/custom.md"
        )
    return contract


def _judge(
    own: float, halved: float, window: float, alone: float, models: float, num_ranks: int, num_micro_batches: int
) -> LossContract | None:
    """The contract that explains these losses; None if they are 0 or not finite.

    Args:
        own: Given its own count.
        halved: Given twice that.
        window: Of a window of equal micro-batches on all ranks, by transformers' contract.
        alone: Given its own count, one rank and one micro-batch.
        models: The model's own; NaN if unknown.
        num_ranks: With data of their own.
        num_micro_batches: In a window.
    """
    if not (own and alone and math.isfinite(own + halved + window + alone)):
        return None
    is_mean, divides = _equal(own, halved), _equal(own, 2 * halved)
    if not (is_mean or divides):
        return LossContract(is_asked_alone=True, is_surprising=not _equal(window, alone))
    if divides and num_ranks > 1 and _equal(own / num_ranks, models):
        return LossContract(divides=True, factor=1 / num_ranks)  # a number of ranks that was read before
    for factor in (1.0, 1 / num_ranks, float(num_micro_batches), num_micro_batches / num_ranks):
        if _equal(own * factor, alone):
            return LossContract(divides=divides, factor=factor)
    return LossContract(is_asked_alone=True, is_surprising=True)


def _equal(a: float, b: float) -> bool:
    """The two differ by the rounding of half precision at most; factors in question are 2 and more."""
    return math.isclose(a, b, rel_tol=1e-4)
