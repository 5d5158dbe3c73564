"""Checks that shares are those of the loss: on two halves of the first batch, and on micro-batches in training."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from hf_gradutils._collectives import add_up, all_reduce_, find_largest, world_domain
from hf_gradutils._devices import on_device
from hf_gradutils._precision import rounding_of
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import cut_after, tolerance_for
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows, with_own_tensors

if TYPE_CHECKING:
    from hf_gradutils.trainer._shares import Seen, Shares

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
    rounding = rounding_of(trainer.accelerator, trainer.model)
    largest = _IN_TRAINING * tolerance_for(rounding) * max(abs(loss), abs(together)) + rounding
    is_wrong = math.isfinite(loss) and not abs(loss - together) <= largest
    domain = world_domain()
    if num_ranks := add_up(domain, wrong=is_wrong)["wrong"]:
        raise LossUnitError(
            f"the loss of a micro-batch in training is {loss:.9g}, and {together:.9g} by the formula of its head, on "
            f"{num_ranks:.0f} of {domain.num_ranks} ranks: the model adds a term that its share does not have, perhaps "
            "in training only, or with a weight that has grown from 0. Say what your own loss is made of, by "
            "whole_batch_loss=WholeBatchLoss(…) or a compute_loss that returns [(loss, count), …]; "
            "check_loss_unit=False takes the mean of the micro-batches' losses, which is another loss"
        )


def check_counted(counted: Tensor, totals: Tensor) -> None:
    """Check on all ranks that a window's micro-batches had the targets that were counted before its first forward.

    Args:
        counted: Of each term, in this rank's micro-batches; shape (terms,).
        totals: As they were added up over all ranks.

    Collectives: one all-reduce. Host syncs: one.

    Raises:
        LossUnitError: they had not.
    """
    counted = all_reduce_(world_domain(), on_device(counted.double(), totals.device).clone())
    if not torch.allclose(counted, totals, rtol=1e-9, atol=1e-6):
        raise LossUnitError(
            f"the terms of this step are means over {counted.tolist()} targets, but {totals.tolist()} were counted in "
            "its batches before the first forward, by which they are divided: let the collator change labels, and not "
            "compute_loss or training_step"
        )


def check_shares(shares: "Shares", model: nn.Module, batch: Any, *, num_blocks: int, rounding: float) -> None:
    """Check that two halves of a batch make up its loss, on all ranks together; without gradients.

    Where it cannot be cut: that what it contributes makes up its loss.

    Collectives: those of three forwards, an all-gather and an all-reduce. Host syncs: four.

    Raises:
        LossUnitError: they do not on some rank.
    """
    domain = world_domain()
    is_cut = shares.can_be_cut and is_divisible(batch, num_blocks=num_blocks)
    num_rows = count_rows(batch, num_blocks=num_blocks) if is_cut else 0
    num_rows = -int(find_largest(domain, fewest=-num_rows)["fewest"])
    loss, whole = shares.look(model, with_own_tensors(batch))
    parts = [whole]
    if num_rows > 1:
        of_both = cut_after(take_rows(batch, 0, num_rows, num_blocks=num_blocks), num_rows // 2, num_blocks=num_blocks)
        loss, _ = shares.look(model, with_own_tensors(of_both.whole))
        parts = [shares.look(model, with_own_tensors(part))[1] for part in (of_both.first, of_both.second)]
    together, own = float(shares.combine(parts).detach()), float(loss.detach())
    largest = tolerance_for(rounding) * max(abs(own), abs(together)) + rounding
    is_wrong = math.isfinite(own) and not abs(together - own) <= largest
    if num_ranks := add_up(domain, wrong=is_wrong)["wrong"]:
        raise LossUnitError(
            f"the loss of a batch is {own:.9g}, and {together:.9g} when it is put together from two halves, on "
            f"{num_ranks:.0f} of {domain.num_ranks} ranks: what a row contributes depends on the rows beside it, "
            "or the loss is not the one that the head is known for. "
            "check_loss_unit=False takes the mean of the micro-batches' losses, which is another loss"
        )


def counter_of_shares(counter: TargetCounter, batch: Any) -> TargetCounter:
    """The counter for the report, of which shares do not depend: the user's, or rows, or else micro-batches."""
    if counter.is_default:
        counter = TargetCounter("rows")
    try:
        counter(batch)
    except TargetCountError:
        return TargetCounter(count=lambda batch: torch.tensor(find_batch_size(batch) or 1))
    return counter
