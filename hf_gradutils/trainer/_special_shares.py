"""Shares of a mixture's router loss, of DPO with several losses, and of a ``WholeBatchLoss``."""

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradutils._devices import widened
from hf_gradutils.accelerator import MicroBatch, WholeBatchLoss, num_averaged
from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets import trl_terms
from hf_gradutils.targets.router_losses import add_coefficient, own_router_loss
from hf_gradutils.targets.terms import shares_of_totals
from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead
from hf_gradutils.trainer._means import MeanShares
from hf_gradutils.trainer._overrides import is_users
from hf_gradutils.trainer._shares import Seen, TwoPassShares, WholeBatchShares

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit


class RouterShares(WholeBatchShares):
    """Shares of a mixture's router loss, beside a loss that stays the mean over its own targets."""

    why = "aux='exact' counts the tokens of each expert in the whole batch, in a first pass without gradients"
    gives_share = False
    compares_passes = False
    """Rounding may send a token to another expert in the second pass."""

    def __init__(self, trainer: Any, unit: "LossUnit", of_head: WholeBatchHead):
        super().__init__(trainer, unit, of_head)
        if is_users(trainer, "training_step"):
            raise LossUnitError("aux='exact' is not done with a training_step of your own; leave out one of the two")

    def _own(self, head: nn.Module, outputs: Any) -> Tensor:
        own = own_router_loss(head, outputs)
        return torch.zeros(()) if own is None else own

    def _share(self, micro_batch: MicroBatch, seen: Seen, outputs: Any) -> Tensor:
        head, loss = self._unit.head, outputs["loss"]
        own = own_router_loss(head, outputs)
        if own is None:
            raise LossUnitError(
                f"{type(head).__name__} has computed a router loss before, and none now; keep output_router_logits"
            )
        if micro_batch.is_divided:
            raise LossUnitError(
                "aux='exact' is not done with a compute_loss of your own that divides by num_items_in_batch; let it "
                "return the mean over its micro-batch"
            )
        count, own_weight = micro_batch.num_targets, micro_batch.own_weight
        assert count is not None
        assert own_weight is not None
        windows = self._trainer.accelerator.windows
        window = windows.of_loss(self._trainer.model_wrapped)
        # The weight that the loss gets, which the router loss is not to have.
        weight = window.sums.share(own_weight.double()) / num_averaged(windows, window)
        exact = self.share_of_rows(micro_batch, seen)
        exact = exact / weight.to(exact.device, exact.dtype)
        if "aux_loss" in outputs:
            outputs["aux_loss"] = exact  # to which trl's trainers look
        coefficient = add_coefficient(head)
        rest = (loss - coefficient * own).masked_fill((count == 0).to(loss.device), 0.0)
        return rest + coefficient * exact


class DpoShares(MeanShares):
    """Shares of a loss of trl's ``DPOTrainer`` that adds means over pairs and over tokens."""

    why = "the loss adds means over pairs and over tokens, which have a weight each"
    is_result = True
    evaluates_terms = False
    """Terms would take a forward each; pairs count."""

    def counts(self, batch: Any) -> Tensor:
        return trl_terms.dpo_counts(self._trainer, batch)

    def in_loss(self, inputs: Any, micro_batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        counts = self.counts(inputs).to(self.totals.device)
        self.count(counts * (not micro_batch.is_padding))
        return trl_terms.dpo_shares(self._trainer, shares_of_totals(counts, self.totals))

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        counts = self.counts(batch)

        def loss(ratios: Tensor) -> Tensor:
            with trl_terms.dpo_shares(self._trainer, ratios):
                value: Tensor = self._loss_of(model, batch)
                return value

        terms = tuple(loss(one) for one in torch.eye(len(counts), device=counts.device))
        return torch.stack(terms).sum(), (terms, counts.unbind())


class UsersShares(TwoPassShares):
    """Shares of a ``WholeBatchLoss``."""

    def __init__(self, trainer: Any, unit: "LossUnit", loss: WholeBatchLoss):
        super().__init__(trainer, unit)
        self._loss = loss

    def loss_of_rows(self, rows: Tensors, shared: Tensors) -> Tensor:
        return self._loss.of_rows(tuple(map(widened, rows)), tuple(map(widened, shared)))

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        with self._trainer.compute_loss_context_manager():
            seen = self._loss.rows_of(model, batch, self._unit.head)
        with torch.autocast(seen[0][0].device.type, enabled=False):
            return self.loss_of_rows(*seen), seen

    def loss_of(self, model: nn.Module, inputs: Any, micro_batch: MicroBatch | None) -> tuple[Tensor, Tensors]:
        """The loss of a batch and its rows: the share in training, else the loss as if there were no others."""
        if micro_batch is None or not (micro_batch.gives_share and torch.is_grad_enabled()):
            loss, (rows, _) = self.look(model, inputs)
            return loss, rows
        seen = self._loss.rows_of(model, inputs, self._unit.head)
        if self._num_windows == 1 and micro_batch.index == 0:
            self.passes.check_reads_rows_only(*seen)
        return micro_batch.give(self.share_of_rows(micro_batch, seen)), seen[0]


@torch.no_grad()
def predict_rows(trainer: Any, model: nn.Module, inputs: Any, loss_only: bool) -> tuple[Tensor, Any, None]:
    """The loss of an evaluation's batch, its rows in place of logits, and no labels."""
    inputs = trainer._prepare_inputs(inputs)
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    return loss.detach(), None if loss_only else outputs["embeddings"], None


def users_loss(
    trainer: Any, unit: "LossUnit", model: nn.Module, inputs: Any, micro_batch: MicroBatch | None
) -> tuple[Tensor, Tensors]:
    """A ``WholeBatchLoss`` and the rows of a batch, as :meth:`UsersShares.loss_of`."""
    shares = unit.shares
    if not isinstance(shares, UsersShares):
        shares = UsersShares(trainer, unit, trainer.whole_batch_loss)
    return shares.loss_of(model, inputs, micro_batch)
