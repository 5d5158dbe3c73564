"""Names of sentence-transformers (6.2) that its documentation does not promise."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

LIBRARY = "sentence_transformers"
ENCODER = "BaseModel"
"""Base class of its models."""
EMBEDDING = "sentence_embedding"
"""Entry of a model's outputs that losses read."""
GATHERS = "gather_across_devices"
"""Attribute of losses that compare the rows of all ranks."""
RETOKENIZES = "must_retokenize"
"""Attribute of losses whose guide has another tokenizer."""
CACHED_LOSS = "calculate_loss"
"""Method of losses that embed twice: rows of each column, in pieces → loss."""
CACHED_EMBEDDING = "embed_minibatch"
"""Method of these: one column → embeddings, those of the guide if it has one, random states."""
DECODERS_TOKENIZER = "tokenizer_decoder"
COMPONENTS = "_component_values"
"""Attribute in which ``CachedSpladeLoss`` keeps the parts of its latest loss."""
_IN_PLACE_IN_EVALUATION = "SpladePooling"
"""A module that overwrites its activations in evaluation mode, which no backward survives."""
_MERGING = "sentence_transformers.base.losses.merged_forward"


def is_encoder(module: object) -> bool:
    """True for the models of sentence-transformers."""
    return any(base.__name__ == ENCODER and base.__module__.startswith(LIBRARY) for base in type(module).__mro__)


def cannot_go_back_in_evaluation(module: nn.Module) -> bool:
    """True for a module without dropout that has no backward in evaluation mode."""
    return any(base.__name__ == _IN_PLACE_IN_EVALUATION for base in type(module).__mro__)


def parts_of(loss: nn.Module) -> Iterator[nn.Module]:
    """A loss and the modules inside it, but for encoders and their wrappers."""
    yield loss
    for child in loss.children():
        if not (is_encoder(child) or is_encoder(unwrapped(child))):
            yield from parts_of(child)


def unwrapped(module: Any) -> Any:
    """A module without the wrappers around it."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def encoders_in(loss: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(part of the loss, name, encoder in it), which may be wrapped."""
    return [
        (part, name, child)
        for part in parts_of(loss)
        for name, child in part.named_children()
        if is_encoder(unwrapped(child))
    ]


def columns_apart() -> contextlib.AbstractContextManager[None]:
    """Embed each column in a forward of its own, so that rows of micro-batches follow each other."""
    merging = sys.modules.get(_MERGING)
    return merging.column_merging_disabled() if merging is not None else contextlib.nullcontext()


def num_layers_seen(encoder: nn.Module) -> int | None:
    """Layers of which ``AdaptiveLayerLoss`` has kept the embeddings in the latest forward of a model."""
    return getattr(_decorated(encoder), "num_layers", None)


def pretend_layers(encoder: nn.Module, num_layers: int | None) -> None:
    """Let ``AdaptiveLayerLoss`` find the layers of a forward that has not run."""
    if num_layers is not None and (decorator := _decorated(encoder)) is not None:
        decorator.num_layers = num_layers


def _decorated(encoder: Any) -> Any:
    """What ``AdaptiveLayerLoss`` has put in the place of the first module's forward."""
    first = next(encoder.children(), None)
    forward = vars(first).get("forward") if first is not None else None
    return forward if hasattr(forward, "set_layer_idx") else None


@contextlib.contextmanager
def with_attribute(loss: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a loss, and of those inside, where it has it."""
    having = [(module, vars(module)[name]) for module in parts_of(loss) if name in vars(module)]
    for module, _ in having:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, before in having:
            setattr(module, name, before)
