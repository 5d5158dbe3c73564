"""Private names of accelerate (1.15)."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

ACCELERATOR_ATTRIBUTES = ("_models", "_optimizers", "_schedulers", "_dataloaders")
"""Private attributes in which an Accelerator keeps its prepared objects; our subclass reads them."""


@contextlib.contextmanager
def sharding_tied_embeddings_together(models: Sequence[nn.Module]) -> Iterator[None]:
    """Let accelerate's FSDP2 (1.15) put all embeddings of a model that share a weight into one group.

    T5, BART and similar models have one as ``shared``, in the encoder and in the decoder. accelerate makes a group of
    the first and leaves the others to the root's group, and torch 2.13 refuses a parameter of two groups.
    """
    from torch.distributed import fsdp

    fully_shard = fsdp.fully_shard  # accelerate imports it where it calls it

    @functools.wraps(fully_shard)
    def together(module: Any, **options: Any) -> Any:
        named = module if isinstance(module, list) else [module]
        weights = [part.weight for part in named if isinstance(part, nn.Embedding)]
        tied = [
            part
            for model in models
            for part in (model.modules() if weights else ())
            if isinstance(part, nn.Embedding) and part not in named and any(part.weight is w for w in weights)
        ]
        return fully_shard([*named, *tied], **options) if tied else fully_shard(module, **options)

    fsdp.fully_shard = together
    try:
        yield
    finally:
        fsdp.fully_shard = fully_shard


@contextlib.contextmanager
def without_accelerate_state() -> Iterator[None]:
    """Let transformers' detection losses divide by this rank's own boxes.

    They average the number over the ranks of accelerate's state, which divides once too often.
    """
    from accelerate import PartialState

    state, PartialState._shared_state = PartialState._shared_state, {}
    try:
        yield
    finally:
        PartialState._shared_state = state


def models_of(accelerator: Any) -> list[nn.Module]:
    """The models that accelerate's Accelerator has prepared."""
    return list(accelerator._models)


def optimizers_of(accelerator: Any) -> list[Any]:
    """The optimizers that accelerate's Accelerator has prepared."""
    return list(accelerator._optimizers)


def schedulers_of(accelerator: Any) -> list[Any]:
    """The schedulers that accelerate's Accelerator has prepared."""
    return list(accelerator._schedulers)


def dataloaders_of(accelerator: Any) -> list[Any]:
    """The loaders that accelerate's Accelerator has prepared."""
    return list(accelerator._dataloaders)
