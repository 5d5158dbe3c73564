"""Checks that shares are those of the loss: on two halves of the first batch, and on micro-batches in training."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from hf_gradutils._collectives import add_up, find_largest, world_domain
from hf_gradutils._precision import rounding_of
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets import trl
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import cut_after, tolerance_for
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows, with_own_tensors

if TYPE_CHECKING:
    from hf_gradutils.trainer._shares import Seen, Shares

_UNCHECKED = "check_loss_unit=False takes the mean of the micro-batches' losses, which is another loss"
_IN_TRAINING = 10.0
"""Factor of the tolerance where dropout and a temperature make losses larger and coarser."""


@torch.no_grad()
def check_own_loss(trainer: Any, shares: "Shares", own: Tensor, seen: "Seen") -> None:
    """Check on all ranks that a micro-batch's own loss in training is what its share is made from.

    Collectives: one all-reduce. Host syncs: three.

    Raises:
        LossUnitError: it is not, on some rank.
    """
    loss, together = float(own.detach()), float(shares.combine([seen]).detach())
    if where := _where_it_differs(loss, together, rounding_of(trainer.accelerator, trainer.model), _IN_TRAINING):
        raise LossUnitError(
            f"the loss of a micro-batch in training is {loss:.9g}, and {together:.9g} by the formula of its head, "
            f"{where}: the model adds a term that its share does not have, perhaps in training only, or with a weight "
            "that has grown from 0. Say what your own loss is made of, by whole_batch_loss=WholeBatchLoss(…) or a "
            f"compute_loss that returns [(loss, count), …]; {_UNCHECKED}"
        )


def _where_it_differs(loss: float, together: float, rounding: float, times: float = 1.0) -> str:
    """The ranks on which a loss that is finite differs from what is put together; empty if there are none."""
    largest = times * tolerance_for(rounding) * max(abs(loss), abs(together)) + rounding
    domain = world_domain()
    number = add_up(domain, wrong=math.isfinite(loss) and not abs(loss - together) <= largest)["wrong"]
    return f"on {number:.0f} of {domain.num_ranks} ranks" if number else ""


def check_shares(trainer: Any, shares: "Shares", model: nn.Module, batch: Any) -> None:
    """Check that two halves of a batch make up its loss, on all ranks together; without gradients.

    Where it cannot be cut: that what it contributes makes up its loss.

    Collectives: those of three forwards, an all-gather and an all-reduce. Host syncs: four.

    Raises:
        LossUnitError: they do not on some rank.
    """
    num_blocks, rounding = trl.num_blocks(trainer), rounding_of(trainer.accelerator, trainer.model)
    is_cut = shares.can_be_cut and is_divisible(batch, num_blocks=num_blocks)
    num_rows = count_rows(batch, num_blocks=num_blocks) if is_cut else 0
    num_rows = -int(find_largest(world_domain(), fewest=-num_rows)["fewest"])
    if num_rows <= 1:
        loss, whole = shares.look(model, with_own_tensors(batch))
        parts = [whole]
    else:
        of_both = cut_after(take_rows(batch, 0, num_rows, num_blocks=num_blocks), num_rows // 2, num_blocks=num_blocks)
        loss, _ = shares.look(model, with_own_tensors(of_both.whole))
        parts = [shares.look(model, with_own_tensors(part))[1] for part in (of_both.first, of_both.second)]
    together, own = float(shares.combine(parts).detach()), float(loss.detach())
    if where := _where_it_differs(own, together, rounding):
        raise LossUnitError(
            f"the loss of a batch is {own:.9g}, and {together:.9g} when it is put together from two halves, {where}: "
            "what a row contributes depends on the rows beside it, or the loss is not the one that the head is known "
            f"for. {_UNCHECKED}"
        )


def counter_of_shares(trainer: Any, batch: Any) -> TargetCounter:
    """The counter for the report, of which shares do not depend: the user's, pairs, rows, or else micro-batches."""
    counter: TargetCounter = trainer.grad_plugin.counter()
    if counter.is_default:
        counter = TargetCounter(count=trl.count_pairs) if trl.num_blocks(trainer) == 2 else TargetCounter("rows")
    try:
        counter(batch)
    except TargetCountError:
        return TargetCounter(count=lambda batch: torch.tensor(find_batch_size(batch) or 1))
    return counter
