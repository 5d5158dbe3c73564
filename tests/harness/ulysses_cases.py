"""Trainings under DeepSpeed's sequence parallelism (Ulysses) on CPU: two ranks share each row."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig

from tests.harness.deepspeed_cases import Trained, config, train, use_cpu
from tests.harness.head_rows import LENGTH
from tests.harness.trainer_cases import NUM_SAMPLES, Rows, make_data

HEAD = "llama causal"
SIZE = 2
"""Ranks that share each row."""
IN_ORDER = {"train_sampling_strategy": "sequential"}


def make_rows(num_samples: int = NUM_SAMPLES, *, prompt: int = 0, seed: int = 5) -> Rows:
    """Ragged rows with the positions that DeepSpeed wants; labels of a prompt's tokens are no targets."""
    rows = make_data(HEAD, num_samples, seed=seed)
    for row in rows:
        row["position_ids"] = torch.arange(LENGTH)
        row["labels"][:prompt] = -100
    return rows


@contextlib.contextmanager
def sharing_rows() -> Iterator[None]:
    """Several trainings in one process: DeepSpeed replaces transformers' attention, and makes its groups, for good."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    use_cpu()
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo")
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        parallel_state_sp._release_sequence_parallel_groups()


def train_shards(
    stage: int,
    accumulation: int = 1,
    *,
    data: Any = None,
    arguments: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    evaluates: bool = False,
    **kwargs: Any,
) -> Trained:
    """One optimizer step over all the data; ``accumulation`` micro-batches, each of which two ranks share.

    ``evaluates``: the metrics of an evaluation are kept as ``evaluation``.
    """
    data = make_rows() if data is None else data
    options = sharing_options(len(data) * SIZE // (accumulation * dist.get_world_size()))
    with sharing_rows():
        done = train(
            HEAD,
            accumulation,
            settings=config(stage, **(settings or {})),
            data=data,
            arguments=options | (arguments or {}),
            **kwargs,
        )
        if evaluates:
            done.evaluation = done.trainer.evaluate()
        return done


def sharing_options(num_rows: int) -> dict[str, Any]:
    """Arguments of a Trainer whose ranks share rows in twos."""
    return {"parallelism_config": sharing_config(), "per_device_train_batch_size": num_rows}


def sharing_config() -> ParallelismConfig:
    return ParallelismConfig(
        sp_size=SIZE,
        sp_backend="deepspeed",
        sp_handler=DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa"),
        dp_shard_size=dist.get_world_size() // SIZE,
    )
