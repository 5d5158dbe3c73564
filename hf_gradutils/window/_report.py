"""The report of an accumulation window: its loss, its targets and the norms of its gradient."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradutils._collectives import Domain
from hf_gradutils.gradients.total_norm import Norms

FEWEST = 1e-12
"""Divisor of a window without targets, whose gradients are zero with any finite one."""


class Totals(NamedTuple):
    """Sums over micro-batches, and over ranks once they are reduced. Each shape (), float64."""

    num_targets: Tensor
    """Σ n/K."""
    loss: Tensor
    """Σ n·L/K."""
    ranks_with_data: Tensor | None = None
    """Ranks that have batches for another window; None without ``has_data_left``."""


@dataclass(frozen=True, slots=True)
class WindowReport:
    """Loss, targets and norms of one optimizer step.

    Tensors on the device, float64; properties are computed on access, and wait for the device only when they are read.
    """

    grad_norm: Tensor
    """Shape (): norm of the exact mean gradient before clipping."""
    multiplier: Tensor
    """Shape (): factor by which the gradients were, or are still to be, multiplied."""
    micro_batch_losses: list[Tensor]
    """This rank's own mean losses, in order."""
    domain: Domain
    """The ranks that trained."""
    _norms: Norms | None
    """None if an engine has measured the total alone, and its gradients are gone."""
    _totals: Totals
    _divisor: Tensor
    """Σ n/K / R: divisor that turns a norm of ``.grad`` into one of the mean gradient."""
    _loss_scale: float
    _num_replicas: int
    _is_sum: bool

    @property
    def mean_multiplier(self) -> Tensor:
        """The part of :attr:`multiplier` that makes gradients the mean, without clipping; shape ()."""
        return self._divisor.reciprocal()

    @property
    def loss(self) -> Tensor:
        """Σ n·L / Σ n over micro-batches and data ranks, shape (); 0 for a window without targets."""
        count = self._totals.num_targets
        if self._is_sum:
            count = torch.full_like(count, self._num_replicas / self._loss_scale)
        return self._totals.loss / count.clamp(min=FEWEST)

    @property
    def num_targets(self) -> Tensor:
        """Σ n over micro-batches and data ranks, shape (); a tensor-parallel replica counts once."""
        return self._totals.num_targets * (self._loss_scale / self._num_replicas)

    @property
    def num_ranks_with_data(self) -> Tensor:
        """Ranks that have batches for another window, shape (); only with ``has_data_left``."""
        assert self._totals.ranks_with_data is not None
        return self._totals.ranks_with_data

    @property
    def is_finite(self) -> Tensor:
        """True if every element of the gradient on every rank is finite; shape (), bool, the same on all ranks."""
        return self.grad_norm.isfinite()

    @property
    def group_norms(self) -> dict[str, Tensor]:
        """Norm group → norm of its part of the exact mean gradient before clipping, shape ()."""
        assert self._norms is not None
        return {group: norm / self._divisor for group, norm in self._norms.of_groups().items()}

    def nonfinite_parameters(self) -> list[str]:
        """Names of this rank's parameters whose gradients are not finite, as far as they are known. A host sync."""
        return [] if self._norms is None else self._norms.nonfinite_parameters()
