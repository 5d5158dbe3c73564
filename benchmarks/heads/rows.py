"""Random rows with ragged targets for a tiny model of any head, found by trying what its forward takes."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.heads.inputs import MakeRow, Row, inputs_of
from benchmarks.heads.labels import labels_of

ROWS_TO_TRY = 3


def collate(rows: list[Row]) -> dict[str, Any]:
    """Rows → batch: tensors stacked, but lists of what detectors want per image, and flags once."""
    batch = {name: _join(name, [row[name] for row in rows]) for name in rows[0]}
    if "sampled_negative_indices" in batch:  # frames of a row, counted from the first one of the batch
        indices = batch["sampled_negative_indices"]
        batch["sampled_negative_indices"] = indices + len(indices[0]) * torch.arange(len(indices))[:, None, None]
    return batch


def _join(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], Tensor) and name not in ("mask_labels", "class_labels"):
        return torch.stack(values)
    return values[0] if isinstance(values[0], bool) else values


class NoBatchError(ValueError):
    """No batch made the head return a loss."""


class NoLossError(NoBatchError):
    """The head runs, but returns none."""


_SAYS_SO = re.compile(r"KeyError\('loss'\)|is not trainable|does not support training")


def find_rows(model: nn.Module) -> tuple[MakeRow, str]:
    """Find a maker of rows that the model returns a loss for, and the names of their parts.

    Raises:
        NoBatchError: with the error that the likeliest batch ended in.
    """
    failures: list[NoBatchError] = []
    for make_row in _candidates(model):
        generator = torch.Generator().manual_seed(1)
        try:
            batch = collate([make_row(generator) for _ in range(ROWS_TO_TRY)])
            with torch.no_grad():
                outputs = model(**batch)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise NoLossError(f"no loss, got {type(loss).__name__}")
            if not loss.isfinite().all():
                raise NoBatchError("the loss is not finite")
        except MemoryError:
            raise
        except Exception as error:
            has_no_loss = isinstance(error, NoLossError | NotImplementedError) or _SAYS_SO.search(repr(error))
            failures.append((NoLossError if has_no_loss else NoBatchError)(f"{type(error).__name__}: {error}"))
            continue
        return make_row, ", ".join(batch)
    unknown = NoBatchError("its inputs are unknown")
    raise max(failures, key=lambda failure: isinstance(failure, NoLossError), default=unknown)


def _candidates(model: nn.Module) -> Iterator[MakeRow]:
    parameters = inspect.signature(type(model).forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    for labels in labels_of(model, set(parameters)):
        for inputs in inputs_of(model, set(parameters), required - {"self"}):
            yield lambda g, inputs=inputs, labels=labels: _both(g, inputs, labels)


def _both(generator: Generator, inputs: MakeRow, labels: MakeRow) -> Row:
    row = inputs(generator)
    return row | labels(generator) if "labels" not in row else row
