"""A loss function of the user's that returns several terms, each with the number of targets that it is a mean over."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradutils._collectives import all_reduce_, world_domain
from hf_gradutils.accelerator import MicroBatch, split_terms
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets.terms import Terms, is_terms, sum_of_terms
from hf_gradutils.trainer._means import MeanShares
from hf_gradutils.trainer._shares import Seen

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit


class GivenTerms(MeanShares):
    """Shares of a sum of means over different targets.

    Their numbers are known before the first forward if ``count_targets`` returns one for each term; else a first pass
    without gradients counts them, where a window has several micro-batches.
    """

    why = "compute_loss returns several terms, which have a weight each"

    def __init__(self, trainer: Any, unit: "LossUnit", num_terms: int):
        super().__init__(trainer, unit)
        self._num_terms = num_terms
        self._counts_first = False
        self._counts: list[Tensor] = []
        """Of each micro-batch, in the first pass."""

    @property
    def needs_first_pass(self) -> bool:
        return not self._counts_first and self._trainer.args.gradient_accumulation_steps > 1

    def counts(self, batch: Any) -> Tensor:
        count_targets = self._trainer.grad_plugin.count_targets
        if count_targets is None:
            return super().counts(batch)
        counted: Any = count_targets(batch)
        numbers = [torch.as_tensor(number) for number in counted] if isinstance(counted, list | tuple) else [counted]
        counts = torch.stack([torch.as_tensor(number).double() for number in numbers]).reshape(-1)
        self._counts_first = len(counts) == self._num_terms
        return counts if self._counts_first else super().counts(batch)

    def begin(self, totals: Callable[[], Tensor]) -> None:
        super().begin(totals)
        self._counts = []

    def first(self, model: nn.Module, inputs: Any, *, is_padding: bool) -> None:
        _, (_, counts) = self.look(model, inputs)
        self._counts.append(torch.stack(counts) * (not is_padding))

    def end_first(self) -> None:
        self._add_up(torch.stack(self._counts).sum(0))

    def _add_up(self, counts: Tensor) -> None:
        totals = all_reduce_(world_domain(), counts.clone())
        self._totals = lambda: totals

    def applies(self, model: nn.Module, batch: Any) -> bool:
        counted = self.counts(batch).tolist()  # before code of the user's takes labels out
        _, (_, counts) = self.look(model, batch)
        given = [float(count) for count in counts]
        if self._counts_first and counted != given:
            raise LossUnitError(
                f"count_targets counts {counted} targets for the terms of a batch, and compute_loss returns {given} "
                "with them; both must be the numbers that the terms are means over, in one order"
            )
        return True

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        self._unit.terms = None
        loss = one_loss(self._unit, self._loss_of(model, batch))
        if self._unit.terms is None:
            raise LossUnitError("compute_loss has returned several (loss, count) before, and none now")
        return loss, _split(self._unit.terms)

    @contextlib.contextmanager
    def seeing(self, seen: list[Seen]) -> Iterator[None]:
        self._unit.terms = None
        yield
        if self._unit.terms is not None:
            seen.append(_split(self._unit.terms))

    def share_of(self, terms: Terms, micro_batch: MicroBatch) -> Tensor:
        """The share of a micro-batch in the sum of its terms' means over the whole batch."""
        if len(terms) != self._num_terms:
            raise InvalidArgumentError(
                f"compute_loss returns {len(terms)} terms, but {self._num_terms} for the first batch; return as many "
                "for every batch, a term without targets as (loss, 0)"
            )
        seen = _split(terms)
        counts = torch.stack(seen[1]) * (not micro_batch.is_padding)
        if self._counts_first:
            self.count(counts)
        elif not self.needs_first_pass:
            self._add_up(counts)
        return micro_batch.give(self.add(seen, self.totals))


def one_loss(unit: "LossUnit", result: Any, micro_batch: MicroBatch | None = None) -> Any:
    """Make one loss of several (loss, count): the share in training, else their sum. Others are left as they are."""
    terms, *outputs = result if isinstance(result, tuple) and not is_terms(result) else (result,)
    if not is_terms(terms):
        return result
    unit.terms = terms
    is_trained = micro_batch is not None and torch.is_grad_enabled() and unit.is_split
    if is_trained and isinstance(unit.shares, GivenTerms):
        assert micro_batch is not None
        loss = unit.shares.share_of(terms, micro_batch)
        unit.terms = None  # which holds their graph
    elif is_trained:
        raise InvalidArgumentError(
            f"compute_loss returns {len(terms)} (loss, count), but one loss for the first batch; return as many terms "
            "for every batch, those that are not trained yet as (loss, 0)"
        )
    else:
        loss = sum_of_terms(*split_terms(terms))
    return (loss, *outputs) if outputs else loss


def _split(terms: Terms) -> Seen:
    losses, counts = split_terms(terms)
    return tuple(losses), counts.unbind()
