"""The targets that a loss is a mean over, counted in a batch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor

from hf_gradutils._devices import on_device
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.targets.rows import count_rows, describe, entries_of, with_entries

LossUnit: TypeAlias = Literal[
    "auto", "rows", "tokens", "shifted_tokens", "answers", "masked_patches", "attended_tokens", "boxes", "sum"
]
"""The unit that the model's loss averages over:

- ``rows``: the samples of the batch;
- ``tokens``: labels that are not -100 (or not the value that the head ignores: 255 in segmentation);
- ``shifted_tokens``: the same without position 0 of each row, which causal heads never predict; one class a row (1-D
  labels) is a target wherever it stands;
- ``answers``: rows whose start and end position lie within the sequence;
- ``masked_patches``: the patches that ``bool_masked_pos`` marks;
- ``attended_tokens``: positions that the attention mask keeps;
- ``boxes``: boxes in ``labels``, a list with one ``{"class_labels": …}`` for each row;
- ``sum``: nothing: the loss is a sum over rows, so that gradients add up and are not divided;
- ``auto``: the unit of a known head; else ``answers`` or ``rows`` without labels, ``rows`` for floating-point labels,
  ``shifted_tokens`` for labels of two or more dimensions under a head that shifts, ``tokens`` otherwise.
"""

CountTargets: TypeAlias = Callable[[Any], Tensor]
"""Batch → number of targets, shape ()."""

IGNORE_INDEX = -100
"""The label that transformers' losses skip."""

_HOW_TO_COUNT = "name the unit with loss_unit='rows', or pass count_targets=lambda batch: <0-d tensor>"


@dataclass(frozen=True, slots=True)
class TargetCounter:
    """Counts the targets of a batch of the model's inputs. Collectives: none. Host syncs: none."""

    loss_unit: LossUnit = "auto"
    count: CountTargets | None = None
    """The user's own count; replaces the unit."""
    head_shifts: bool | None = None
    """Under ``auto``: position 0 of each row is no target. None: not asked, because no batch so far could tell."""
    ignore_index: int = IGNORE_INDEX
    """The label of ``tokens`` that is no target."""

    def __post_init__(self) -> None:
        if self.loss_unit not in get_args(LossUnit):
            raise InvalidArgumentError(f"loss_unit must be one of {get_args(LossUnit)}, got {self.loss_unit!r}")
        if self.count is not None and not callable(self.count):
            raise InvalidArgumentError(f"count_targets must be a function of a batch, got {self.count!r}")

    def __call__(self, batch: Any) -> Tensor:
        """Targets of one micro-batch: a mapping, or what the user's count takes.

        Returns:
            Shape (), on the device of the counted tensor (CPU for rows). NaN if an answer has only one end in the
            sequence: the loss is then a mean of two means over different numbers of rows.

        Raises:
            TargetCountError: the batch has no tensor that the unit counts, or the user's count is not one number.
        """
        if self.count is not None:
            num_targets = torch.as_tensor(self.count(batch))
            if num_targets.numel() != 1:
                raise TargetCountError(f"count_targets must return one number, got shape {tuple(num_targets.shape)}")
            return num_targets.reshape(())
        entries = entries_of(batch)
        if not entries:
            raise TargetCountError(f"nothing can be counted in {describe(batch)}; {_HOW_TO_COUNT}")
        return self._count(entries, self._resolve(entries))

    def weight(self, num_targets: Tensor) -> Tensor:
        """Factor that turns the micro-batch's loss into the sum over its targets; mostly their number."""
        if self.count is None and self.loss_unit == "boxes":
            # Detection divides by at least 1: an image without boxes still has a loss.
            return num_targets.clamp(min=1)
        return torch.ones_like(num_targets) if self.is_sum else num_targets

    @property
    def is_default(self) -> bool:
        """True if the user has set neither a unit nor a count."""
        return self.count is None and self.loss_unit == "auto"

    @property
    def is_sum(self) -> bool:
        """True if gradients of micro-batches add up to that of the whole batch."""
        return self.count is None and self.loss_unit == "sum"

    def depends_on_shift(self, batch: Any) -> bool:
        """True if ``head_shifts`` changes the count of such a batch."""
        return self.is_default and _may_shift(entries_of(batch))

    def _resolve(self, batch: Mapping[str, Any]) -> LossUnit:
        labels = batch.get("labels")
        if self.loss_unit != "auto":
            return self.loss_unit
        if labels is None and "shift_labels" not in batch:
            return "answers" if "start_positions" in batch and "end_positions" in batch else "rows"
        if "shift_labels" in batch or is_class_labels(labels):
            return "shifted_tokens" if self.head_shifts and _may_shift(batch) else "tokens"
        if isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() > 0:
            return "rows"
        raise TargetCountError(
            f"labels must be a tensor of integers (classes, -100 to skip) or floats (one target a row), got "
            f"{describe({'labels': labels})}; {_HOW_TO_COUNT}"
        )

    def _count(self, batch: Mapping[str, Any], unit: LossUnit) -> Tensor:
        if unit in ("rows", "sum"):
            return torch.tensor(count_rows(batch))
        if unit == "answers":
            return _count_answers(batch)
        if unit == "masked_patches":
            return _require(batch, "bool_masked_pos", unit).sum()
        if unit == "attended_tokens":
            mask = batch.get("attention_mask")
            return torch.tensor(_require(batch, "labels", unit).numel()) if mask is None else mask.sum()
        labels = labels_of(batch)
        if unit == "boxes":
            if not isinstance(labels, list | tuple):
                raise TargetCountError(f"boxes are counted in a list of dicts, got {describe({'labels': labels})}")
            return torch.tensor(sum(len(row["class_labels"]) for row in labels))
        if not is_class_labels(labels):
            raise TargetCountError(
                f"{unit} are counted in integer labels, got {describe({'labels': labels})}; {_HOW_TO_COUNT}"
            )
        if unit == "shifted_tokens" and _may_shift(batch):
            labels = labels[..., 1:]
        return labels.ne(self.ignore_index).sum()


def check_count(num_targets: float) -> None:
    """Raise TargetCountError for NaN, the count of answers with only one end in the sequence."""
    if math.isnan(num_targets):
        raise TargetCountError(
            "some answers have only one end in the sequence: the loss is then a mean of two means over different "
            "numbers of rows; set both positions of such a row to the sequence's length, or accept the mean over rows "
            "with loss_unit='rows', check_loss_unit=False"
        )


def _may_shift(batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    return "shift_labels" not in batch and is_class_labels(labels) and labels.dim() > 1


def _count_answers(batch: Mapping[str, Any]) -> Tensor:
    start, end = (_require(batch, name, "answers") for name in ("start_positions", "end_positions"))
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor):
        return torch.tensor(count_rows(batch))
    # Heads skip an end beyond the sequence; if both ends of each answer agree, the loss is a mean over answers.
    has_start, has_end = start.lt(tokens.shape[1]), end.lt(tokens.shape[1])
    return torch.where((has_start == has_end).all(), has_start.sum().to(torch.float64), math.nan)


def _require(batch: Mapping[str, Any], name: str, unit: LossUnit) -> Tensor:
    value = batch.get(name)
    if not isinstance(value, Tensor):
        raise TargetCountError(f"{unit} are counted in a tensor {name!r}, got {describe(batch)}; {_HOW_TO_COUNT}")
    return value


def with_one_target(batch: Any, num_targets: Tensor) -> Any:
    """Return the batch, with one label of class 0 added if it has no target; of the same type.

    A mean over nothing is 0/0, and its gradient stays NaN under a weight of zero. With one target the backward runs on
    every rank, and the weight 0 removes its gradient. Host syncs: none; the choice is made on the device.
    """
    changed, entries = {}, entries_of(batch)
    for name in ("labels", "shift_labels"):
        labels = entries.get(name)
        if is_class_labels(labels) and labels.numel():
            changed[name] = labels = labels.clone()
            # The last position of the first row: shifted or not, it is predicted from something.
            place = labels[(0,) + (-1,) * (labels.dim() - 1)]
            place.masked_fill_(on_device(num_targets == 0, labels.device), 0)
    return with_entries(batch, changed) if changed else batch


def labels_of(batch: Any) -> Any:
    """The labels of a batch, shifted ones first; None if it has none."""
    entries = entries_of(batch)
    return entries.get("shift_labels", entries.get("labels"))


def is_class_labels(labels: object) -> TypeGuard[Tensor]:
    """True for integers of one dimension or more."""
    return (
        isinstance(labels, Tensor)
        and labels.dim() > 0
        and not labels.is_floating_point()
        and not labels.is_complex()
        and labels.dtype != torch.bool
    )
