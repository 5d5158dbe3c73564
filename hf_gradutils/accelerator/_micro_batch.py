"""The record of one micro-batch, from where the loop draws it to its last backward."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import InvalidArgumentError


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
    ended: list[Any] = field(default_factory=list)
    """Windows that were closed in it; another loss is too late for them."""
    retained: list[Any] = field(default_factory=list)
    """Windows for which a backward has retained its graph."""

    def count(self, num_targets: Tensor, weight: Tensor) -> None:
        """Set the number of targets and the weight, and fill the divisor."""
        self.num_targets, self.weight = num_targets, weight
        if self.divisor is not None:
            self.divisor.copy_(num_targets.clamp(min=1))

    def check_one_loss(self, window: object, *, retains_graph: bool) -> None:
        """Raise InvalidArgumentError if a backward would count targets twice, or too late."""
        if window in self.ended:
            raise InvalidArgumentError(
                "a second loss for the same model in one micro-batch, after the optimizer step; if the losses train "
                "different models, say which: accelerator.backward(loss, num_targets, model=discriminator)"
            )
        if window in self.retained:
            raise InvalidArgumentError(
                "a second loss for the same model in one micro-batch, on a retained graph; add the terms and call "
                "backward once, or say which models each trains: backward(loss, num_targets, model=…)"
            )
        if retains_graph:
            self.retained.append(window)


def as_number(num_targets: Tensor | int, device: torch.device) -> Tensor:
    """Return a count as a tensor of shape (). InvalidArgumentError if it is not one number ≥ 0."""
    if isinstance(num_targets, Tensor) and num_targets.numel() == 1:
        return num_targets.detach().reshape(())
    if isinstance(num_targets, int | float) and not isinstance(num_targets, bool) and num_targets >= 0:
        return torch.full((), float(num_targets), dtype=torch.float64, device=device)
    got = f"a tensor of shape {tuple(num_targets.shape)}" if isinstance(num_targets, Tensor) else repr(num_targets)
    raise InvalidArgumentError(
        f"num_targets must be one number ≥ 0, the targets that the loss is a mean over on this rank, got {got}; for "
        "labels of causal language modelling: (labels[:, 1:] != -100).sum()"
    )
