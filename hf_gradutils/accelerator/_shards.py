"""The shards of rows that DeepSpeed's sequence parallelism (Ulysses) hands out, epoch by epoch.

DeepSpeed draws a batch on each rank of a group, and cuts one after the other between them: a batch of whole rows
becomes as many micro-batches as the group has ranks. Attention alone puts the rows together again, without a mask.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_gradutils.accelerator._padding import PaddedShard
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets.counter import IGNORE_INDEX, is_class_labels
from hf_gradutils.targets.rows import describe
from hf_gradutils.upstream.deepspeed import engine_of, hands_out_shards


class ShardingAccelerator(Accelerator):  # type: ignore[misc]
    """Checks the rows that DeepSpeed cuts, and starts over with each epoch."""

    def deepspeed_ulysses_dl_adapter(self, dl: Any, model: Any) -> Any:
        """Like ``Accelerator.deepspeed_ulysses_dl_adapter``, as :class:`ShardLoader`."""
        return self._by_epochs(super().deepspeed_ulysses_dl_adapter(dl, model))

    def _prepare_deepspeed(self, *args: Any) -> tuple[Any, ...]:
        return tuple(self._by_epochs(prepared) for prepared in super()._prepare_deepspeed(*args))

    def _by_epochs(self, prepared: Any) -> Any:
        return ShardLoader(self, prepared) if hands_out_shards(prepared) else prepared


class ShardLoader:
    """A loader of shards.

    DeepSpeed's (0.19.8) has one iterator for all epochs, and the first window of each further one is empty.

    Args:
        accelerator: Has prepared the model.
        shards: DeepSpeed's loader.
    """

    def __init__(self, accelerator: Accelerator, shards: Any):
        self._shards = shards
        self.of_rows = shards.dl
        """The loader of whole rows."""
        self._check = functools.partial(check_rows, accelerator)

    def __len__(self) -> int:
        """Shards of an epoch."""
        return len(self._shards)

    def __iter__(self) -> Iterator[Any]:
        """An epoch. ``end_of_dataloader`` of accelerate's loader becomes true at the last shard, not before.

        Collectives: gathers within the group that shares a row, in each batch of whole rows.

        Raises:
            InvalidArgumentError: as :func:`check_rows`; or in ``join_uneven_inputs``.
        """
        rows, shards = self.of_rows, self._shards
        sampler = getattr(rows, "batch_sampler", None)
        if isinstance(sampler, PaddedShard) and not sampler.even_batches:
            raise InvalidArgumentError(
                "join_uneven_inputs(even_batches=False): with sequence parallelism the ranks of a group share each "
                "other's batches, so that padding of one would train the others; leave it out"
            )
        shards.micro_batches.clear()
        shards.iter = map(self._check, rows)
        is_last = False
        for shard in shards:
            is_last = is_last or getattr(rows, "end_of_dataloader", False)
            if is_last:
                rows.end_of_dataloader = not shards.micro_batches
            yield shard


def check_rows(accelerator: Accelerator, batch: Any) -> Any:
    """Return a batch of whole rows if the ranks of a group can train on shards of it as one device would on the rows.

    Host syncs: a few, for tensors that are on a GPU already.

    Raises:
        InvalidArgumentError: labels are not one class for each token; there are fewer rows than in a micro-batch; or
            attention would see what a mask hides, or positions of another document.
    """
    if not isinstance(batch, Mapping):
        return batch  # DeepSpeed says what it needs
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if not (isinstance(tokens, Tensor) and is_class_labels(labels) and labels.shape == tokens.shape):
        raise InvalidArgumentError(
            "sequence parallelism cuts labels along the sequence: they must be one class for each token of input_ids "
            f"(-100 for none), as for a causal language model, got {describe(batch)}"
        )
    engine = engine_of(accelerator)
    num_rows = int(engine.train_micro_batch_size_per_gpu())
    if len(tokens) != num_rows:
        raise InvalidArgumentError(
            f"with sequence parallelism each batch must have the {num_rows} rows of a micro-batch, got {len(tokens)}; "
            "set dataloader_drop_last=True (drop_last=True for a loader), or keep even_batches=True"
        )
    is_flash = accelerator.parallelism_config.sp_handler.sp_attn_implementation not in (None, "sdpa")
    hidden, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(hidden, Tensor) and hidden.shape == tokens.shape:
        _check_no_targets_after(
            labels,
            hidden[:, :-1].eq(0) & hidden[:, 1:].ne(0),
            "the attention mask hides tokens in front of others, but DeepSpeed's sequence parallelism attends without "
            "a mask; pad rows on the right",
        )
    if not is_flash and isinstance(positions, Tensor) and positions.shape == tokens.shape:
        _check_no_targets_after(
            labels,
            positions[:, 1:] <= positions[:, :-1],
            "position_ids start anew within a row, as in packed rows, but with sdpa DeepSpeed's sequence parallelism "
            "attends to the whole row; use flash attention, or one document in each row",
        )
    longest = None if is_flash else _attention_window(engine.module)
    if longest is not None and tokens.shape[1] > longest:
        raise InvalidArgumentError(
            f"layers of the model attend to {longest} tokens, but with sdpa DeepSpeed's sequence parallelism attends "
            f"to all {tokens.shape[1]} of a row; use flash attention, or rows of at most {longest} tokens"
        )
    return batch


def _check_no_targets_after(labels: Tensor, is_start: Tensor, why: str) -> None:
    """Raise InvalidArgumentError if targets follow a start; shape (rows, tokens − 1), from the second token on."""
    has_started = is_start.to(torch.int64).cumsum(1).ne(0)
    if bool((has_started & labels[:, 1:].ne(IGNORE_INDEX)).any()):
        raise InvalidArgumentError(why)


def _attention_window(model: Any) -> int | None:
    """The fewest tokens that a layer attends to; None if all layers attend to all tokens."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    of_kinds = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    windows = [getattr(config, name, None) for kind, name in of_kinds.items() if kind in kinds]
    return min((int(window) for window in windows if window), default=None)
