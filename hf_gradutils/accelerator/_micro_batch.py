"""The record of one micro-batch, from where the loop draws it to its last backward."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.upstream.torch import is_multiple, is_multiple_of_node

logger = logging.getLogger("hf_gradutils.trainer")


@dataclass(eq=False, slots=True)
class Division:
    """Does a ``training_step`` of the user's divide its loss by the number of micro-batches, as with transformers?"""

    num_micro_batches: int
    may_divide: bool
    """It reads the number of micro-batches."""
    num_ranks: int = 1
    """Which it may multiply by, where the model divides by a count."""
    warns: bool = False
    """Say so, if nothing tells."""
    of_backward: float | None = None
    """What undoes it in the loss passed to ``backward``; None until a loss has told."""
    of_result: float | None = None
    """The same of the loss that the step returns."""
    asks_backward: bool = True
    """The next loss is asked; until one tells, what was found before holds."""
    asks_result: bool = True
    """The same of the loss that the step returns."""

    def look_again(self) -> None:
        """Ask the next losses again: the step may divide by other numbers than before."""
        self.asks_backward = self.asks_result = True

    def ask_backward(self, computed: Tensor | None, loss: Tensor, number: float, *, warns: bool) -> None:
        """Set :attr:`of_backward`, if the loss of any rank tells. Arguments as in :meth:`ask`.

        Collectives: one all-reduce over all ranks, whose steps reach it in the same micro-batch. Host syncs: three.

        Raises:
            InvalidArgumentError: the step reads the number of micro-batches, and nothing has told if it divides by it;
                on all ranks.
        """
        own = math.nan if computed is None else self.ask(computed, loss, number)
        ranks = add_up(
            world_domain(),
            loss.device,
            undivided=own == 1.0,
            divided=own == number,
            neither=own is not None and math.isnan(own),
        )
        if not any(ranks.values()):
            return
        self.asks_backward = False
        if bool(ranks["undivided"]) != bool(ranks["divided"]):
            factor = 1.0 if ranks["undivided"] else number
        elif self.of_backward is not None:
            return
        elif self.may_divide:
            raise InvalidArgumentError(_CANNOT_TELL)
        else:
            factor = 1.0
            if warns:
                logger.warning(_TAKEN_AS_MEAN)
        if self.warns and self.of_backward not in (None, factor):
            logger.warning(_STEP_CHANGED)
        self.of_backward = factor

    def ask(self, computed: Tensor, loss: Tensor, number: float) -> float | None:
        """The factor between a loss and the one that was computed: 1, ``number``, or NaN if there is no such.

        None if that one is 0. Host syncs: two.
        """
        before, after = float(computed.detach().mean()), float(loss.detach().mean())
        if not (before and math.isfinite(before)):
            return None
        # Of several terms others may be 0 now, and what looks like a division is the weight of one.
        is_the_whole = self.may_divide or not loss.requires_grad or is_multiple(loss, computed)
        for factor in (1.0, number) if is_the_whole else (1.0,):
            if math.isclose(after * factor, before, rel_tol=1e-2):
                return factor
        return math.nan


_NO_SHARE = (
    "backward was called before the forward of the model, in whose outputs the micro-batch's share of the loss of the "
    "whole batch takes the place of the loss; let training_step or compute_loss call the model that it is given"
)
_OTHER_LOSS = (
    "the loss that comes to backward is not the model's: code of yours adds to it or scales it, but it is the "
    "micro-batch's share of a loss of the whole batch, divided already. Return the model's loss as it is, or say what "
    "your own is made of: whole_batch_loss=WholeBatchLoss(…), or a compute_loss that returns [(loss, count), …]"
)
_CANNOT_TELL = (
    "training_step reads gradient_accumulation_steps, and it cannot be told whether it divides its loss by it: the "
    "loss is neither that of compute_loss nor its part; divide by self.current_gradient_accumulation_steps instead (1 "
    "here, where each micro-batch is weighted by its targets), or not at all"
)
_TAKEN_AS_MEAN = (
    "nothing tells if training_step divides its loss by the number of micro-batches: it is neither the loss of "
    "compute_loss or of the model, nor its part. It is taken as the mean over its micro-batch, undivided; divide by "
    "self.current_gradient_accumulation_steps, which is 1 here, or not at all. See docs/custom.md"
)
_STEP_CHANGED = (
    "training_step divides its loss by another number of micro-batches than before. This is undone from here on; steps "
    "since the loss was looked at last may be off by such a factor. See docs/custom.md"
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
    gives_share: bool = False
    """The loss must be :attr:`share`, which takes the place of the loss in the outputs of the head."""
    share: Tensor | None = None
    """The micro-batch's share in a loss of the whole batch, or of several means."""
    _node: Any = None
    """That has computed the share as it was given."""
    index: int = 0
    """In its window; where shares are made."""
    division: Division | None = None
    """Set where a Trainer's step is the user's own: what the step returns is reported, as with transformers."""
    drawn: Any = None
    """The batch as it was drawn; with ``division``."""
    count_late: Callable[[], None] | None = None
    """Counts what was drawn, where the user's own step prepares no inputs."""
    is_models: bool = False
    """The latest loss is one that the step asked the model for, without ``compute_loss``."""
    has_other_count: bool = False
    """With ``is_models``: the step gave the model another count than the one that it was handed."""
    computed: Tensor | None = None
    """The loss as ``compute_loss`` returned it, or the model where the step asks the model; with ``division``."""
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

    def give(self, share: Tensor) -> Tensor:
        """Set the share, and return it for code of the user's, whose changes in place do not reach :attr:`share`."""
        given = share.clone()
        self.share, self._node = share, given.grad_fn
        return given

    def check_share(self, loss: Tensor, *, looks: bool) -> None:
        """Raise LossUnitError for a loss that is not the share, where it must be. Host syncs: one if it ``looks``."""
        if not self.gives_share or self.is_padding:
            return
        if self.share is None:
            raise LossUnitError(_NO_SHARE)
        is_same = is_multiple_of_node(loss, self._node) if self.share.requires_grad else not loss.requires_grad
        values = loss.detach().to(self.share), self.share.detach()
        if not is_same or (looks and not torch.allclose(*values, rtol=0.0, atol=0.0, equal_nan=True)):
            raise LossUnitError(_OTHER_LOSS)

    def undivided(self, loss: Tensor, weight: Tensor) -> Tensor:
        """The weight of a loss that the user's own step may have divided by the number of micro-batches.

        Raises:
            InvalidArgumentError: it cannot be told.
        """
        division = self.division
        if division is None or self._number == 1:
            return weight
        # A loss that transformers has divided by the count is divided no more: another factor is a weight.
        if self.is_divided and self.computed is not None and not self.is_models:
            return weight
        if division.asks_backward:
            # A step that says how many targets its loss is a mean over knows that it is taken as one.
            division.ask_backward(self.computed, loss, self._number, warns=division.warns and weight is self.weight)
        elif self.computed is None and division.may_divide:
            raise InvalidArgumentError(_CANNOT_TELL)
        return weight * (division.of_backward or 1.0)

    @property
    def _number(self) -> float:
        """What undoes the factor that a step gives its loss as the stock Trainer needs it."""
        assert self.division is not None
        if self.is_models and self.is_divided:
            return 1 / self.division.num_ranks
        return float(self.division.num_micro_batches)

    def report(self, window: Any, loss: Tensor) -> None:
        """Report the loss that the user's own step returns."""
        division = self.division
        if division is None or window.sums.is_empty:
            return
        is_undivided = loss is self.computed  # as of a step that clips, and has returned nothing yet
        if self.computed is not None and division.asks_result and not is_undivided:
            factor = division.ask(self.computed, loss, self._number)
            division.asks_result = factor is None
            if factor is not None and not math.isnan(factor):
                division.of_result = factor
        of_result = 1.0 if is_undivided else division.of_result or 1.0
        window.sums.report_loss(loss, of_result / (division.of_backward or 1.0))


def as_number(num_targets: Tensor | int, device: torch.device) -> Tensor:
    """Return a count as a tensor of shape (). InvalidArgumentError if it is not one number ≥ 0."""
    if isinstance(num_targets, Tensor) and num_targets.numel() == 1 and not (num_targets.is_cpu and num_targets < 0):
        return num_targets.detach().reshape(())
    number: Any = num_targets
    if getattr(number, "ndim", None) == 0:  # of numpy
        number = number.item()
    if isinstance(number, int | float) and not isinstance(number, bool) and number >= 0:
        return torch.full((), float(number), dtype=torch.float64, device=device)
    got = repr(num_targets)
    if isinstance(num_targets, Tensor) and num_targets.numel() != 1:
        got = f"a tensor of shape {tuple(num_targets.shape)}"
    raise InvalidArgumentError(
        f"num_targets must be one number ≥ 0, the targets that the loss is a mean over on this rank, got {got}; for "
        "labels of causal language modelling: (labels[:, 1:] != -100).sum()"
    )


def as_numbers(num_targets: Tensor | int | Sequence[Tensor | int], device: torch.device) -> Tensor:
    """Return one count, or those of several terms, as a tensor of shape (terms,), float64."""
    numbers: Any = num_targets if isinstance(num_targets, list | tuple) else [num_targets]
    return torch.stack([as_number(number, device).double() for number in numbers])
