"""Private names of accelerate (1.15), and one of transformers' detection losses."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState
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


_ASKING_TORCH = ("loss_lw_detr", "loss_rf_detr")
"""Modules of transformers' losses that ask torch, with this function, if there are other ranks."""
_IS_SPREAD = "_is_torch_distributed_initialized"


@contextlib.contextmanager
def without_accelerate_state() -> Iterator[None]:
    """Let transformers' detection losses divide by this rank's own boxes.

    They average the number over the ranks of accelerate's state, or of torch, which divides once too often.
    """
    state, PartialState._shared_state = PartialState._shared_state, {}
    try:
        with contextlib.ExitStack() as stack:
            for module in (sys.modules.get(f"transformers.loss.{name}") for name in _ASKING_TORCH):
                if (is_spread := vars(module or object).get(_IS_SPREAD)) is not None:
                    stack.callback(setattr, module, _IS_SPREAD, is_spread)
                    setattr(module, _IS_SPREAD, lambda: False)
            yield
    finally:
        PartialState._shared_state = state


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """Let accelerate's state be that of one process: it does not communicate."""
    alone = {"num_processes": 1, "process_index": 0, "local_process_index": 0, "distributed_type": DistributedType.NO}
    alone_prepared = alone | {"parallelism_config": None, "device_mesh": None}
    with contextlib.ExitStack() as stack:
        for state, values in ((PartialState, alone), (AcceleratorState, alone_prepared)):
            shared = state._shared_state
            if shared:
                stack.callback(shared.update, {name: shared[name] for name in values if name in shared})
                shared.update(values)
        yield


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
