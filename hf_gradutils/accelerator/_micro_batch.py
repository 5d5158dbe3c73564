"""The record of one micro-batch, from where the loop draws it to its last backward."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import InvalidArgumentError


@dataclass(eq=False, slots=True)
class Division:
    """Does a ``training_step`` of the user's divide its loss by the number of micro-batches, as with transformers?"""

    num_micro_batches: int
    may_divide: bool
    """It reads the number of micro-batches."""
    of_backward: float | None = None
    """What undoes it in the loss passed to ``backward``; None until a loss has told."""
    of_result: float | None = None
    """The same of the loss that the step returns."""

    def ask(self, computed: Tensor, loss: Tensor, *, must_tell: bool) -> float | None:
        """Compare a loss with the one that was computed; the factor between them. A host sync.

        Raises:
            InvalidArgumentError: ``must_tell``, and the loss is neither that one nor its part.
        """
        before, after = float(computed.detach().mean()), float(loss.detach().mean())
        if not (before and math.isfinite(before)):
            return None
        for factor in (1.0, float(self.num_micro_batches)):
            if math.isclose(after * factor, before, rel_tol=1e-2):
                return factor
        if must_tell:
            raise InvalidArgumentError(_CANNOT_TELL)
        return 1.0


_CANNOT_TELL = (
    "training_step reads gradient_accumulation_steps, and it cannot be told whether it divides its loss by it: the "
    "loss is neither that of compute_loss nor its part; divide by self.current_gradient_accumulation_steps instead (1 "
    "here, where each micro-batch is weighted by its targets), or not at all"
)


@dataclass(eq=False, slots=True)
class MicroBatch:
    """A micro-batch's targets, and the windows that its backwards have touched."""

    is_padding: bool = False
    """It stands in for a batch that this rank lacks, and counts for nothing."""
    num_targets: Tensor | None = None
    """Targets that its loss is a mean over, on this rank; shape ()."""
    weight: Tensor | None = None
    """Factor that turns the loss into the sum over its targets; shape ()."""
    divisor: Tensor | None = None
    """The count that a Trainer passes to loss functions before targets can be counted; filled in place."""
    own_weight: Tensor | None = None
    """:attr:`weight`, of a mean."""
    is_given_share: bool = False
    """The Trainer's loop hands over the count of the whole window."""
    has_count: bool = True
    """The latest loss was given a count."""
    is_divided: bool = False
    """The latest loss is one that transformers divides by the count it was given."""
    is_share: bool = False
    """The loss is divided by the targets of the whole window, as with transformers; ``weight`` makes it this rank's."""
    division: Division | None = None
    """Set where a Trainer's step is the user's own: what the step returns is reported, as with transformers."""
    drawn: Any = None
    """The batch as it was drawn; with ``division``."""
    count_late: Callable[[], None] | None = None
    """Counts what was drawn, where the user's own step prepares no inputs."""
    computed: Tensor | None = None
    """The loss as ``compute_loss`` returned it; with ``division``."""
    ended: list[Any] = field(default_factory=list)
    """Windows that were closed in it; another loss is too late for them."""
    averaged: list[Any] = field(default_factory=list)
    """Windows for which DDP would not average another loss of the same forward."""
    counted: dict[Any, Tensor] = field(default_factory=dict)
    """Window → the targets that it counts in this micro-batch: once, however many losses there are."""

    def count(self, num_targets: Tensor, weight: Tensor) -> None:
        """Set the number of targets and the weight, and fill the divisor."""
        self.num_targets, self.weight, self.own_weight = num_targets, weight, weight
        if self.divisor is not None:
            self.divisor.copy_(num_targets.clamp(min=1))

    def count_once(self, window: Any, num_targets: Tensor, *, is_last: bool) -> Tensor:
        """The targets that another loss adds to a window: all of them for the first in this micro-batch, 0 for others.

        ``is_last``: its graph is retained, but DDP would not average the gradient of another loss on it.

        Host syncs: none; for a further loss on a GPU one, in the first window of its models.

        Raises:
            InvalidArgumentError: the window has ended in this micro-batch, its gradients are averaged already, or a
                further loss has another number of targets.
        """
        if window in self.ended:
            raise InvalidArgumentError(
                "a second loss for the same model in one micro-batch, after the optimizer step; if the losses train "
                "different models, say which: accelerator.backward(loss, num_targets, model=discriminator)"
            )
        if window in self.averaged:
            raise InvalidArgumentError(
                "a second loss on a retained graph, which DDP does not average: it averages one backward of each "
                "forward; add the terms and call backward once, or compute each in a forward of its own"
            )
        if is_last:
            self.averaged.append(window)
        if window not in self.counted:
            self.counted[window] = num_targets
            return num_targets
        first = self.counted[window]
        can_look = (first.is_cpu and num_targets.is_cpu) or not window.num_closed
        if first is not num_targets and can_look and float(first) != float(num_targets):
            raise InvalidArgumentError(
                f"two losses of one micro-batch are means over {float(first):g} and {float(num_targets):g} targets; "
                "their gradients add up, as with accelerate, so both must be means over the same targets: add the "
                "terms, or scale a loss over n of m targets by n / m and pass m; if the losses train different models, "
                "say which: backward(loss, num_targets, model=…)"
            )
        return torch.zeros_like(num_targets)

    def undivided(self, loss: Tensor, weight: Tensor) -> Tensor:
        """The weight of a loss that the user's own step may have divided by the number of micro-batches.

        Raises:
            InvalidArgumentError: it cannot be told.
        """
        division = self.division
        # A loss that transformers has divided by the count is divided no more: another factor is a weight.
        if division is None or division.num_micro_batches == 1 or (self.is_divided and self.computed is not None):
            return weight
        if self.computed is not None:
            if division.of_backward is None:
                division.of_backward = division.ask(self.computed, loss, must_tell=division.may_divide)
        elif division.may_divide:
            raise InvalidArgumentError(_CANNOT_TELL)
        return weight * (division.of_backward or 1.0)

    def report(self, window: Any, loss: Tensor) -> None:
        """Report the loss that the user's own step returns."""
        if self.division is None or window.sums.is_empty:
            return
        if self.computed is not None and self.division.of_result is None:
            self.division.of_result = self.division.ask(self.computed, loss, must_tell=False)
        window.sums.report_loss(loss, (self.division.of_result or 1.0) / (self.division.of_backward or 1.0))


def as_number(num_targets: Tensor | int, device: torch.device) -> Tensor:
    """Return a count as a tensor of shape (). InvalidArgumentError if it is not one number ≥ 0."""
    if isinstance(num_targets, Tensor) and num_targets.numel() == 1 and not (num_targets.is_cpu and num_targets < 0):
        return num_targets.detach().reshape(())
    if isinstance(num_targets, int | float) and not isinstance(num_targets, bool) and num_targets >= 0:
        return torch.full((), float(num_targets), dtype=torch.float64, device=device)
    got = repr(num_targets)
    if isinstance(num_targets, Tensor) and num_targets.numel() != 1:
        got = f"a tensor of shape {tuple(num_targets.shape)}"
    raise InvalidArgumentError(
        f"num_targets must be one number ≥ 0, the targets that the loss is a mean over on this rank, got {got}; for "
        "labels of causal language modelling: (labels[:, 1:] != -100).sum()"
    )
