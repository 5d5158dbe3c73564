"""One micro-batch, from where the loop draws it to its last backward."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.errors import InvalidArgumentError


@dataclass(eq=False, slots=True)
class MicroBatch:
    """What is said of one micro-batch before its ``backward``, and what happens in it."""

    is_padding: bool = False
    """It stands in for one that this rank does not have: it is trained with and counts for nothing."""
    num_targets: Tensor | None = None
    """What its loss is a mean over, on this rank; shape ()."""
    weight: Tensor | None = None
    """What turns the loss into the sum over its targets; shape ()."""
    divisor: Tensor | None = None
    """What a Trainer hands to loss functions before the targets can be counted; filled in place."""
    ended: list[Any] = field(default_factory=list)
    """Windows that were closed in it: another loss would come too late for them."""
    retained: list[Any] = field(default_factory=list)
    """Windows for which a backward has kept its graph for another one."""

    def count(self, num_targets: Tensor, weight: Tensor) -> None:
        """Say how many targets it has, and what turns its loss into the sum over them."""
        self.num_targets, self.weight = num_targets, weight
        if self.divisor is not None:
            self.divisor.copy_(num_targets.clamp(min=1))

    def check_one_loss(self, window: object, *, retains_graph: bool) -> None:
        """Raise InvalidArgumentError where a backward would count targets twice, or too late."""
        if window in self.ended:
            raise InvalidArgumentError(
                "expected one loss per model in a micro-batch, got another one after the optimizer step; if they train "
                "different models, say which: accelerator.backward(loss, num_targets, model=discriminator)"
            )
        if window in self.retained:
            raise InvalidArgumentError(
                "expected one loss per model in a micro-batch, got another one on a graph that was retained; add the "
                "terms and call backward once, or say which models each trains: backward(loss, num_targets, model=…)"
            )
        if retains_graph:
            self.retained.append(window)


def as_number(num_targets: Tensor | int, device: torch.device) -> Tensor:
    """A count as a tensor of shape (). InvalidArgumentError if it is not one number ≥ 0."""
    if isinstance(num_targets, Tensor) and num_targets.numel() == 1:
        return num_targets.detach().reshape(())
    if isinstance(num_targets, int | float) and not isinstance(num_targets, bool) and num_targets >= 0:
        return torch.full((), float(num_targets), dtype=torch.float64, device=device)
    got = f"a tensor of shape {tuple(num_targets.shape)}" if isinstance(num_targets, Tensor) else repr(num_targets)
    raise InvalidArgumentError(
        f"num_targets must be one number ≥ 0, what the loss is a mean over on this rank, got {got}; for labels of "
        "causal language modelling: (labels[:, 1:] != -100).sum()"
    )
