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

from hf_gradutils._collectives import all_reduce_, world_domain
from hf_gradutils._devices import on_device, widened
from hf_gradutils.errors import InvalidArgumentError
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


def shares_of_totals(counts: Tensor, totals: Tensor) -> Tensor:
    """n/N of each term; 0 for a term without any target."""
    return (counts / totals).where(totals > 0, 0.0)


def add_terms(terms: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ weight·term, shape (), in at least float32; a term of weight 0 is left out, also a cross entropy of 0/0."""
    parts = []
    for term, weight in zip(map(widened, terms), weights, strict=True):
        parts.append(term.masked_fill(weight.to(term.device) == 0, 0.0) * weight.to(term.device, term.dtype))
    return torch.stack(parts).sum()


def sum_of_terms(losses: Sequence[Tensor], counts: Tensor) -> Tensor:
    """The sum of the losses that have targets, shape ()."""
    return add_terms(losses, (counts > 0).double())


def check_counted(counted: Tensor, totals: Tensor) -> None:
    """Check on all ranks that the terms of a window have the targets that were counted before its first backward.

    Args:
        counted: Of each term, in this rank's micro-batches; shape (terms,).
        totals: As they were added up over all ranks.

    Collectives: one all-reduce. Host syncs: one.

    Raises:
        InvalidArgumentError: they have not.
    """
    counted = all_reduce_(world_domain(), on_device(counted.double(), totals.device).clone())
    if not torch.allclose(counted, totals, rtol=1e-9, atol=1e-6):
        raise InvalidArgumentError(
            f"the terms of this step are means over {counted.tolist()} targets, but {totals.tolist()} were counted "
            "before its first backward, by which they are divided: let the collator change labels, and not the step; "
            "start_window and count_targets take the numbers of the terms in their order"
        )
