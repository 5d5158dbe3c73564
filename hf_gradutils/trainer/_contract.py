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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_gradutils._collectives import add_up, gather_objects, world_domain
from hf_gradutils._pretended_world import collectives_noted, pretending, replaced
from hf_gradutils._undisturbed import random_states_kept
from hf_gradutils.trainer._kept import KeptNumbers, divides_by_literal, kept_numbers

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
    is_doubtful: bool = field(default=False, compare=False)
    """Its source divides by a literal that equals the number of micro-batches, and nothing tells if it means that."""
    kept: KeptNumbers = field(default=KeptNumbers(), compare=False)
    """With ``is_asked_alone``: the numbers read before that it depends on."""


@contextlib.contextmanager
def as_if_alone(trainer: Any, kept: KeptNumbers, *, communicates: bool) -> Iterator[None]:
    """Let the user's code read that this micro-batch is the whole batch: one micro-batch, one data rank.

    ``kept``: where it has read these numbers before. ``communicates``: it reads the true number of ranks, because its
    collectives need that.
    """
    args, before = trainer.args, trainer.args.gradient_accumulation_steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(kept.micro_batches, lambda _: 1))
        if not communicates:
            stack.enter_context(pretending(trainer.accelerator, args, trainer.get_tp_size(), kept.ranks))
        args.gradient_accumulation_steps = 1
        stack.callback(setattr, args, "gradient_accumulation_steps", before)
        yield


def ask_loss(
    trainer: Any,
    loss_of: Callable[[Tensor], Tensor],
    models_own: Callable[[], Tensor],
    is_models_multiple: Callable[[], bool],
    count: Tensor,
    *,
    is_undivided: bool,
) -> LossContract:
    """Find out how a loss depends on the count, the number of ranks and of micro-batches; the same on all ranks.

    Args:
        trainer: Asked for these numbers.
        loss_of: ``num_items_in_batch`` → the loss of this rank's first batch.
        models_own: The same as the model computes it: shows a number of ranks that the user's code has read before.
        is_models_multiple: Is the loss the model's own times constants, without other terms?
        count: This rank's targets, shape (), at least 1.
        is_undivided: transformers does not divide such a loss by the number of micro-batches.

    Collectives: one gather of objects and one sum over all ranks; each computes five losses. Where terms differ,
    another gather, and a sum and a loss for each number that was read before. Host syncs: one a loss.
    """
    num_micro_batches = trainer.args.gradient_accumulation_steps
    num_ranks = trainer.accelerator.num_processes // trainer.get_tp_size()

    coarsest = torch.float32

    def number(loss: Tensor) -> float:
        nonlocal coarsest
        coarsest = max(coarsest, loss.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return float(loss.detach().mean())

    def ask(factor: float = 1.0) -> float:
        with random_states_kept(trainer.args.device):
            return number(loss_of(count * factor))

    counted = num_ranks if trainer.args.average_tokens_across_devices else 1
    with collectives_noted() as noted:
        own = ask()
    halved, in_window, communicates = ask(2.0), ask(float(num_micro_batches * counted)), bool(noted)
    kept = kept_numbers(trainer)

    def ask_alone(kept: KeptNumbers) -> float:
        with as_if_alone(trainer, kept, communicates=communicates):
            return ask()

    try:
        alone = ask_alone(kept)
    except Exception:  # it needs the true numbers, on all ranks alike
        alone = own
    try:
        with random_states_kept(trainer.args.device):
            models = number(models_own())
    except Exception:  # the model may have no loss, on all ranks alike
        models = math.nan
    equal = partial(math.isclose, rel_tol=max(1e-4, 3 * torch.finfo(coarsest).eps))
    window = in_window * num_micro_batches
    answer = _judge(own, halved, window, alone, models, num_ranks, num_micro_batches, equal)
    # transformers would not divide it any more: is it by a number of micro-batches that was read before?
    may_divide = answer == LossContract() and is_undivided and num_micro_batches > 1 and not equal(own, models)
    looks_divided = may_divide and equal(own * num_micro_batches, models)
    if add_up(world_domain(), divided=looks_divided)["divided"] and is_models_multiple() and looks_divided:
        answer = LossContract(factor=float(num_micro_batches))
    elif may_divide and divides_by_literal(trainer, num_micro_batches):
        answer = LossContract(is_doubtful=True)
    answer = answer and replace(answer, communicates=communicates)
    answers = [answer for answer in gather_objects(world_domain(), answer) if answer is not None]
    if not answers:
        return LossContract(is_known=False)
    is_doubtful = any(answer.is_doubtful for answer in answers)
    contract = answers[0]
    if len(set(answers)) > 1:
        contract = LossContract(is_asked_alone=True, communicates=communicates)
    if contract.is_asked_alone:
        kept = _with_effect(kept, lambda kept: equal(ask_alone(kept), alone))
        return replace(contract, kept=kept)
    return replace(contract, is_doubtful=is_doubtful)


def _with_effect(kept: KeptNumbers, is_same: Callable[[KeptNumbers], bool]) -> KeptNumbers:
    """Leave out what does not change the loss on any rank. Collectives: one gather of objects, and a sum a name."""
    for name in sorted(set().union(*gather_objects(world_domain(), kept.names))):
        others = kept.without(name)
        try:
            changes = not is_same(others)
        except Exception:  # it needs them all, or the true numbers
            changes = True
        if not add_up(world_domain(), changes=changes)["changes"]:
            kept = others
    return kept


_TERMS_DIFFER = (
    "some terms of the loss are divided by num_items_in_batch, by the number of ranks or of micro-batches, and others "
    "are not; each is taken as the mean over its own micro-batch. See docs/custom.md"
)
_LITERAL = (
    "the loss is divided by a literal in its source that equals gradient_accumulation_steps, and nothing tells if it "
    "stands for that: it is taken as a weight of the loss. Divide by self.args.gradient_accumulation_steps instead, or "
    "not at all. See docs/custom.md"
)
_LOSS_CHANGED = (
    "after %s optimizer steps the loss is divided by other numbers than before (num_items_in_batch, ranks or "
    "micro-batches). They are undone from here on; steps since the loss was asked last, after %s, may be off by such a "
    "factor. See docs/custom.md"
)


def warn_of(contract: LossContract) -> None:
    """Say what is doubtful about a contract."""
    if contract.is_surprising:
        logger.warning(_TERMS_DIFFER)
    if contract.is_doubtful:
        logger.warning(_LITERAL)


def warn_of_change(before: LossContract, now: LossContract, num_steps: int, asked_last: int) -> None:
    """Say that a loss has another contract than before, if its gradient differs by that."""
    if (before.divides, before.factor, before.is_asked_alone) != (now.divides, now.factor, now.is_asked_alone):
        logger.warning(_LOSS_CHANGED, num_steps, asked_last)


def _judge(
    own: float,
    halved: float,
    window: float,
    alone: float,
    models: float,
    num_ranks: int,
    num_micro_batches: int,
    equal: Callable[[float, float], bool],
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
        equal: Two losses differ by their rounding at most; factors in question are 2 and more.
    """
    if not (own and alone and math.isfinite(own + halved + window + alone)):
        return None
    is_mean, divides = equal(own, halved), equal(own, 2 * halved)
    if not (is_mean or divides):
        return LossContract(is_asked_alone=True, is_surprising=not equal(window, alone))
    if divides and num_ranks > 1 and equal(own / num_ranks, models):
        return LossContract(divides=True, factor=1 / num_ranks)  # a number of ranks that was read before
    for factor in (1.0, 1 / num_ranks, float(num_micro_batches), num_micro_batches / num_ranks):
        if equal(own * factor, alone):
            return LossContract(divides=divides, factor=factor)
    return LossContract(is_asked_alone=True, is_surprising=True)
