"""The loss of one process and the whole batch, for each form in which a loop or a Trainer says what its loss is."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_gradutils.accelerator import WholeBatchLoss, split_terms
from hf_gradutils.targets.terms import Terms, is_terms, sum_of_terms
from hf_gradutils.upstream.transformers import without_adapters

LossAndTargets: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Tensor | int] | Terms]
"""(model, batch) → its own mean loss and its number of targets, or a list of several such terms."""


def loss_of_batch(loss: LossAndTargets | WholeBatchLoss, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch that is the whole one, of a model without wrappers; shape ()."""
    if isinstance(loss, WholeBatchLoss):
        return loss_of_rows(loss, model, batch)
    return loss_and_count(loss(model, batch))[0]


def loss_and_count(result: Any) -> tuple[Tensor, Any]:
    """The loss and the number of targets of ``loss_and_targets``; the sum and all numbers if it has several terms."""
    if not is_terms(result):
        loss, num_targets = result
        return loss, num_targets
    losses, counts = split_terms(result)
    return sum_of_terms(losses, counts), counts


def loss_of_rows(loss: WholeBatchLoss, model: nn.Module, batch: Any) -> Tensor:
    """A ``WholeBatchLoss`` of one batch. Its parameters get their gradient even where they come detached."""
    whole = without_adapters(model)
    rows, parameters = loss.rows_of(model, batch, whole)
    trained = {_place(p): p for p in whole.parameters() if p.requires_grad}
    attached = tuple(value if value.requires_grad else trained.get(_place(value), value) for value in parameters)
    with torch.autocast(rows[0].device.type, enabled=False):
        return loss.of_rows(rows, attached)


def _place(value: Tensor) -> tuple[int, torch.Size]:
    return value.data_ptr(), value.shape
