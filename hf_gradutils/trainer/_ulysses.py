"""Sequence parallelism by DeepSpeed (Ulysses): a rank's micro-batch is its shard of each row.

    loader      DeepSpeed shifts the labels of whole rows, and hands each rank its part of the rows and ``shift_labels``
    loss        the mean over the shard's own targets, where stock Trainer takes the mean over those of all shards
    weight      the shard's targets over the window's, as of any micro-batch

In training attention runs over whole rows. A loss that is asked for in evaluation mode takes its shard for the row.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils._collectives import add_up, gather_objects, world_domain
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets.counter import IGNORE_INDEX
from hf_gradutils.targets.probe import LossOf, loss_ignores_first_position
from hf_gradutils.targets.rows import entries_of, with_entries

_UNITS = ("auto", "tokens", "shifted_tokens")


def is_on(trainer: Any) -> bool:
    """True if the ranks of a group share each row."""
    return bool(trainer.get_sp_size() > 1)


def check_sequence_parallel(trainer: Any) -> None:
    """Raise InvalidArgumentError for a loss that shards of rows cannot have."""
    if not is_on(trainer):
        return
    if trainer.compute_loss_func is not None:
        raise InvalidArgumentError(
            "compute_loss_func takes the labels of whole rows, and with sequence parallelism transformers does not "
            "call it; override compute_loss, and return the mean over inputs['shift_labels'] of this rank's shard"
        )
    unit = trainer.grad_plugin.counter().loss_unit
    if trainer.grad_plugin.counter().count is None and unit not in _UNITS:
        raise InvalidArgumentError(
            f"loss_unit={unit!r}: with sequence parallelism a row's tokens are on several ranks, so that only a mean "
            "over tokens can be put together; leave it out"
        )


def check_lengths(trainer: Any, num_batches: int) -> None:
    """Raise InvalidArgumentError if ranks that share rows have unequally many batches. One gather over all ranks."""
    if not is_on(trainer):
        return
    size, numbers = trainer.get_sp_size(), gather_objects(world_domain(), num_batches)
    groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    if any(len(set(group)) > 1 for group in groups):
        raise InvalidArgumentError(
            f"ranks that share rows must have equally many batches, got {numbers} with sp_size={size}: the others "
            "would wait for ever; keep even_batches=True, or set dataloader_drop_last=True"
        )


def check_resumes(trainer: Any, num_batches: int) -> None:
    """Raise InvalidArgumentError where a checkpoint in the middle of an epoch asks to skip shards of rows."""
    if num_batches and is_on(trainer):
        raise InvalidArgumentError(
            f"the checkpoint is from the middle of an epoch, but with sequence parallelism transformers cannot skip "
            f"the {num_batches} batches that it has trained; set ignore_data_skip=True, or save at the end of epochs"
        )


@contextlib.contextmanager
def as_own_shard(trainer: Any, inputs: Any) -> Iterator[Any]:
    """The context of the loss of a shard, as that of any batch. Yields its inputs, with the labels for the model.

    Stock Trainer adds them as well, and takes the loss out of the mean of all shards, without label smoothing.
    """
    config = trainer.accelerator.parallelism_config
    if not is_on(trainer) or not isinstance(inputs, Mapping) or "shift_labels" not in inputs:
        yield inputs
        return
    backend, config.sp_backend = config.sp_backend, None
    try:
        yield inputs if "labels" in inputs else with_entries(inputs, {"labels": inputs["shift_labels"]})
    finally:
        config.sp_backend = backend


def check_head(loss_of: LossOf, batch: Any, *, may_fail: bool) -> bool:
    """Ask the model about its labels: returns True if it shifts those of whole rows.

    DeepSpeed shifts labels for every model. So it must shift by itself where they are not, and must look at
    ``shift_labels`` alone where they are.

    Args:
        loss_of: Batch → the loss that the model returns.
        batch: A shard.
        may_fail: The model may return no loss, because code of the user's computes it.

    Collectives: one all-reduce over all ranks, after four forwards on each. Host syncs: as many.

    Raises:
        InvalidArgumentError: on all ranks, if the model of one does not.
    """
    labels = entries_of(batch)["shift_labels"].clamp(min=0)
    of_rows = {name: value for name, value in entries_of(batch).items() if name != "shift_labels"}
    shifts = loss_ignores_first_position(loss_of, {**of_rows, "labels": labels})
    takes = _takes_shift_labels(loss_of, batch, labels)
    ranks = add_up(
        world_domain(),
        shifting_not=shifts is False or (shifts is None and not may_fail),
        taking_not=takes is False or (takes is None and not may_fail),
    )
    if ranks["shifting_not"] or ranks["taking_not"]:
        what = "does not shift its labels, but" if ranks["shifting_not"] else "does not take shift_labels, and"
        raise InvalidArgumentError(
            f"the model {what} with sequence parallelism DeepSpeed shifts them before it cuts the rows; only a causal "
            "language model whose loss takes shift_labels (as transformers' ForCausalLMLoss) can be trained so"
        )
    return True


def _takes_shift_labels(loss_of: LossOf, batch: Any, labels: Tensor) -> bool | None:
    """True if shifted labels replace the others; None if the model fails. Two forwards."""
    nothing = torch.full_like(labels, IGNORE_INDEX)
    given = ({"labels": own, "shift_labels": labels} for own in (labels, nothing))
    try:
        with_labels, without = (float(loss_of(with_entries(batch, entries))) for entries in given)
    except torch.AcceleratorError:
        raise
    except Exception:  # whatever a model raises that returns no loss
        return None
    return math.isfinite(without) and with_labels == without


def rows_loader(trainer: Any, loader: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The loader of a data set's rows, and what makes a batch of them one as it is trained on."""
    if not is_on(trainer) or not hasattr(loader, "of_rows"):
        return loader, lambda batch: batch
    return loader.of_rows, lambda batch: part_of_rows(batch, trainer.get_sp_size())


def part_of_rows(batch: Any, num_parts: int) -> Any:
    """Of each row the part with the most targets, with its labels shifted: a shard, the same on every rank."""
    entries = dict(entries_of(batch))
    shifted = nn.functional.pad(entries.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
    length = max(shifted.shape[1] // num_parts, 1)
    parts = shifted[:, : length * num_parts].ne(IGNORE_INDEX).reshape(len(shifted), -1, length)
    places = parts.sum(-1).argmax(1, keepdim=True) * length + torch.arange(length, device=shifted.device)
    return {
        name: value.gather(1, places) if isinstance(value, Tensor) and value.shape == shifted.shape else value
        for name, value in (entries | {"shift_labels": shifted}).items()
    }
