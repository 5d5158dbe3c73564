"""The loss of one process and the whole batch, for each form in which a loop or a Trainer says what its loss is."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_gradutils.accelerator import WholeBatchLoss
from hf_gradutils.targets.known_heads import whole_batch_head
from hf_gradutils.targets.several_means import several_means_of
from hf_gradutils.targets.terms import Terms, is_terms, sum_of_terms

LossAndTargets: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Tensor | int] | Terms]
"""(model, batch) → its own mean loss and its number of targets, or a list of several such terms."""


def loss_of_batch(loss: LossAndTargets | WholeBatchLoss, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch that is the whole one, of a model without wrappers; shape ()."""
    if isinstance(loss, WholeBatchLoss):
        return loss_of_rows(loss, model, batch)
    return split_terms(loss(model, batch))[0]


def split_terms(result: Any) -> tuple[Tensor, Any]:
    """The loss and the number of targets of ``loss_and_targets``; the sum and all numbers if it has several terms."""
    if not is_terms(result):
        loss, num_targets = result
        return loss, num_targets
    losses = [loss.reshape(()) for loss, _ in result]
    counts = torch.stack([torch.as_tensor(n, dtype=torch.float64).reshape(()).to(losses[0].device) for _, n in result])
    return sum_of_terms(losses, counts), counts


def loss_of_rows(loss: WholeBatchLoss, model: nn.Module, batch: Any) -> Tensor:
    """A ``WholeBatchLoss`` of one batch. Its parameters get their gradient even where they come detached."""
    whole = without_adapters(model)
    rows, parameters = loss.rows_of(model, batch, whole)
    trained = {_place(p): p for p in whole.parameters() if p.requires_grad}
    attached = tuple(value if value.requires_grad else trained.get(_place(value), value) for value in parameters)
    with torch.autocast(rows[0].device.type, enabled=False):
        return loss.of_rows(rows, attached)


def is_of_whole_batch(head: nn.Module) -> bool:
    """True if the loss of a head compares what all rows of the batch have, so that shares of it need two passes."""
    return whole_batch_head(head) is not None


def has_several_means(head: nn.Module) -> bool:
    """True if the loss of a head adds means over different targets."""
    return several_means_of(head) is not None


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside peft's."""
    inside: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inside


def _place(value: Tensor) -> tuple[int, torch.Size]:
    return value.data_ptr(), value.shape
