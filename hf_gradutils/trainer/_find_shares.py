"""The kind of shares that a Trainer's loss needs, if any."""

from typing import TYPE_CHECKING, Any

import torch

from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets import trl_terms
from hf_gradutils.targets.auxiliary_loss import auxiliary_coefficient
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.known_heads import whole_batch_head
from hf_gradutils.targets.router_losses import NO_SUMS, router_loss_of
from hf_gradutils.targets.rows import entries_of
from hf_gradutils.targets.several_means import several_means_of
from hf_gradutils.trainer._given_terms import GivenTerms
from hf_gradutils.trainer._means import TermShares
from hf_gradutils.trainer._overrides import is_users
from hf_gradutils.trainer._sentences import sentence_shares
from hf_gradutils.trainer._shares import Shares, WholeBatchShares
from hf_gradutils.trainer._special_shares import DpoShares, RouterShares, UsersShares

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit
    from hf_gradutils.trainer._questions import TrainerLosses


def find_shares(trainer: Any, unit: "LossUnit", losses: "TrainerLosses", inputs: Any) -> Shares | None:
    """The shares of a Trainer's loss, if it needs them.

    Collectives: those of a forward where code of the user's may return terms, and of another where shares are made.
    """
    unit.num_terms = 0
    if (is_users(trainer, "compute_loss") or trainer.compute_loss_func) and trainer.whole_batch_loss is None:
        before, unit.terms = unit.counter, None
        unit.counter = before or TargetCounter("rows")
        try:
            with losses.asked() as prepare, torch.enable_grad():  # which the loss may need
                losses.given(prepare(inputs), torch.ones((), device=trainer.args.device))
        finally:
            unit.counter = before
        unit.num_terms = len(unit.terms or ())
    shares = _shares_of(trainer, unit, inputs)
    if shares is None:
        return None
    with losses.asked() as prepare:
        return shares if shares.applies(losses.model, prepare(inputs)) else None


def _shares_of(trainer: Any, unit: "LossUnit", batch: Any) -> Shares | None:
    """The shares of a Trainer's loss, if it needs them, as far as its settings and a batch tell."""
    if trainer.whole_batch_loss is not None:
        return UsersShares(trainer, unit, trainer.whole_batch_loss)
    if unit.num_terms:
        return GivenTerms(trainer, unit, unit.num_terms)
    is_smoothed = trainer.label_smoother is not None and "labels" in entries_of(batch)
    is_heads = trainer.compute_loss_func is None and not is_smoothed
    if is_heads and trainer.grad_plugin.aux == "exact":
        if (router := router_loss_of(unit.head)) is not None:
            return RouterShares(trainer, unit, router)
        if auxiliary_coefficient(unit.head):
            name = type(unit.head).__name__
            raise LossUnitError(
                f"aux='exact' is not done for {name}: {NO_SUMS.get(name, 'its router loss is not known')}; leave it out"
            )
    if not trainer.grad_plugin.check_loss_unit:
        return None  # the mean of the micro-batches' losses is wanted
    if trainer.grad_plugin.counter().is_default and trl_terms.has_several_means(trainer):
        return DpoShares(trainer, unit)
    if (sentences := sentence_shares(trainer, unit)) is not None:
        return sentences
    is_the_users = is_users(trainer, "compute_loss") and not trainer.grad_plugin.counter().is_default
    if not is_heads or is_the_users:
        return None
    if (whole_batch := whole_batch_head(unit.head)) is not None:
        return WholeBatchShares(trainer, unit, whole_batch)
    if (several := several_means_of(unit.head)) is not None:
        return TermShares(trainer, unit, several)
    return None
