"""Losses of several means: Σ of terms, each a mean over targets of its own.

    gradient of the whole batch = Σ over micro-batches m and terms k of  d(n[m])[k] / d(Σn)[k] · ∇term[m, k]

with n[m] the targets of micro-batch m and d(n) what the head divides the terms by, mostly n itself. All n must be known
before the backward.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from hf_gradutils.targets.whole_batch import Tensors, not_watched

Terms: TypeAlias = Sequence[tuple[Tensor, Tensor | int]]
"""(loss, number of targets that it is a mean over) of each term."""


def is_terms(value: object) -> TypeGuard[Terms]:
    """True for a list of (loss, number of targets)."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(term, list | tuple) and len(term) == 2 for term in value)
        and all(isinstance(loss, Tensor) and loss.numel() == 1 for loss, _ in value)
    )


def _targets_themselves(counts: Tensor) -> Tensor:
    return counts


@dataclass(frozen=True, slots=True)
class SeveralMeans:
    """A head's loss that is a sum of means over different targets."""

    counts: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    """(head, batch) → the targets (or their weights) that each term is a mean over; shape (terms,), float64. Host
    syncs: none."""
    terms: Callable[[nn.Module, Mapping[str, Any], Any], Tensors]
    """(head, inputs of its forward, outputs) → the terms, shape () each, whose sum is the outputs' loss. A term without
    targets is finite, and so is its gradient. Called when the forward ends, within ``watching``; differentiable."""
    watching: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = not_watched
    """Head → the context of a forward, where outputs do not have all terms."""
    divisors: Callable[[Tensor], Tensor] = _targets_themselves
    """Counts, of a micro-batch or of the whole batch → what the head divides each term by; shape (terms,)."""
    counts_boxes: bool = False
    """The forward has to run in ``without_accelerate_state``: the head would divide by boxes of all ranks."""

    def weights(self, counts: Tensor, of_whole_batch: Tensor) -> Tensor:
        """Weight a micro-batch's terms so that those of all micro-batches and ranks add up to the whole batch's loss.

        Args:
            counts: Of the micro-batch.
            of_whole_batch: The sum of the counts of all micro-batches and ranks.

        Returns:
            Shape (terms,), float64; 0 for a term without any target. Host syncs: none.
        """
        return shares_of_totals(self.divisors(counts), self.divisors(of_whole_batch))


def shares_of_totals(counts: Tensor, totals: Tensor) -> Tensor:
    """n/N of each term; 0 for a term without any target."""
    return (counts / totals).where(totals > 0, 0.0)


def add_terms(terms: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ weight·term, shape (), in at least float32; a term of weight 0 is left out, also where it is 0/0."""
    parts = []
    for term, weight in zip(terms, weights, strict=True):
        wide = term if term.dtype in (torch.float32, torch.float64) else term.float()
        parts.append(wide.masked_fill(weight.to(wide.device) == 0, 0.0) * weight.to(wide.device, wide.dtype))
    return torch.stack(parts).sum()
