"""Losses of sentence-transformers in two halves: the rows that a micro-batch embeds, and the loss of given rows.

Nothing of a loss is written again. To embed, it runs as it is and the outputs of its encoders are noted. To compute the
loss of other rows, it runs once more, with encoders that return these in the same order. Losses that embed in pieces
and keep gradients have a method for the second half, and are asked for it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.targets.sentence_losses import innermost
from hf_gradutils.upstream import sentence_transformers as upstream
from hf_gradutils.upstream.sentence_transformers import (
    CACHED_EMBEDDING,
    CACHED_LOSS,
    COMPONENTS,
    EMBEDDING,
    GATHERS,
    RETOKENIZES,
    columns_apart,
    encoders_in,
    parts_of,
    unwrapped,
    with_attribute,
)


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a loss has embedded of a batch."""

    rows: tuple[Tensor, ...]
    """Embeddings in the order in which the loss asks for them."""
    num_columns: int
    num_layers: int | None
    """Of the encoder, if the loss goes through them."""


def embed(loss: Any, model: nn.Module, features: Sequence[Mapping[str, Any]], labels: Tensor | None) -> Embedded:
    """Embed a batch as a loss does; ``model`` is the trained one, with its wrappers."""
    features = list(features)
    if is_cached(loss):
        return Embedded(tuple(_embed_whole(innermost(loss), model, features)), len(features), None)
    rows: list[Tensor] = []
    layers: list[int | None] = []

    def noting(encoder: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            rows.append(outputs[EMBEDDING])
            layers.append(upstream.num_layers_seen(encoder))
            return outputs

        return note

    with _trains(loss, model), alone(loss), columns_apart(), _forwards(loss, noting):
        loss(features, labels)
    return Embedded(tuple(rows), len(features), layers[0])


def loss_of(
    loss: Any, embedded: Embedded, labels: Tensor | None, shared: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of embedded rows, shape (), and its components if it has names for them.

    Args:
        loss: The loss.
        embedded: Rows, of any number of batches.
        labels: Of these rows.
        shared: Values of :func:`shared_parameters`.
    """
    if is_cached(loss):
        return _cached_loss_of(loss, embedded, labels, shared)
    features: list[dict[str, Any]] = [{} for _ in range(embedded.num_columns)]
    with (
        _played(loss, embedded),
        alone(loss),
        with_attribute(loss, RETOKENIZES, False),  # there are no tokens
        columns_apart(),
        _sharing(loss, shared),
    ):
        return _as_one(loss(features, labels))


def is_cached(loss: Any) -> bool:
    """True for a loss that embeds in pieces, twice, and keeps gradients between."""
    return bool(getattr(innermost(loss), "uses_gradient_cache", False)) and hasattr(innermost(loss), CACHED_LOSS)


def shared_parameters(loss: nn.Module) -> list[nn.Parameter]:
    """Trained parameters that a loss reads beside embeddings."""
    return [p for *_, p in _parameters_of_parts(loss)]


def put_model(loss: nn.Module, model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Let a loss call this model, with or without wrappers, wherever it keeps it; returns what was there."""
    whole = unwrapped(model)
    found = [(part, name, child) for part, name, child in encoders_in(loss) if unwrapped(child) is whole]
    for part, name, _ in found:
        setattr(part, name, model)
    return found


def alone(loss: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let a loss compare the rows of this rank only."""
    return with_attribute(loss, GATHERS, False)


# ---- Losses that embed in pieces ----


def _embed_whole(core: Any, model: nn.Module, features: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
    """Rows of each column, and then those of the guide, if there is one."""
    copies = [dict(column) for column in features]
    with _trains(core, model):
        rows = [core.model(column)[EMBEDDING] for column in features]
    yield from rows
    if not hasattr(core, "guide"):
        return

    def blank(encoder: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *_, **__: {EMBEDDING: rows[0][:0]}) if encoder is unwrapped(model) else forward

    for column in copies:
        with _trains(core, unwrapped(model)), _forwards(core, blank):
            _, of_guide, _ = getattr(core, CACHED_EMBEDDING)(
                column, 0, len(rows[0]), with_grad=False, copy_random_state=False
            )
        yield of_guide


def _cached_loss_of(
    loss: Any, embedded: Embedded, labels: Tensor | None, shared: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    core, needs_grad = innermost(loss), torch.is_grad_enabled()
    leaves = [rows.detach().requires_grad_() if needs_grad else rows for rows in embedded.rows]
    values = [value.detach().requires_grad_() if needs_grad else value for value in shared]
    columns = [[rows] for rows in leaves]
    of_guide = columns[embedded.num_columns :]
    second: Any = of_guide or labels  # the method's other argument
    with alone(loss), _sharing(loss, values):
        # It runs its own backwards, piece by piece, so that the matrix of scores is never whole.
        options = {"with_backward": True} if needs_grad else {}
        value = getattr(core, CACHED_LOSS)(columns[: embedded.num_columns], second, **options)
    components = {name: torch.as_tensor(part) for name, part in getattr(core, COMPONENTS, {}).items()}
    if needs_grad:
        pairs = zip((*embedded.rows, *shared), (*leaves, *values), strict=True)
        inner = torch.stack([(own * leaf.grad).sum() for own, leaf in pairs if leaf.grad is not None]).sum()
        value = inner + (value - inner).detach()
    return value, components


# ---- Contexts of a loss ----


@contextlib.contextmanager
def _trains(loss: nn.Module, model: nn.Module) -> Iterator[None]:
    before = put_model(loss, model)
    try:
        yield
    finally:
        for part, name, child in before:
            setattr(part, name, child)


@contextlib.contextmanager
def _played(loss: nn.Module, embedded: Embedded) -> Iterator[None]:
    """Encoders that return rows in their order: copies without hooks, because wrappers may move parameters in these."""
    rows = iter(embedded.rows)

    def played(encoder: nn.Module) -> nn.Module:
        player: nn.Module = object.__new__(type(encoder))
        vars(player).update({name: _unhooked(name, value) for name, value in vars(encoder).items()})

        def play(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            upstream.pretend_layers(player, embedded.num_layers)
            return {EMBEDDING: next(rows)}

        player.forward = play
        return player

    found = encoders_in(loss)
    players = {id(encoder): played(encoder) for encoder in (unwrapped(child) for *_, child in found)}
    for part, name, child in found:
        setattr(part, name, players[id(unwrapped(child))])
    try:
        yield
    finally:
        for part, name, child in found:
            setattr(part, name, child)


def _unhooked(name: str, value: Any) -> Any:
    return type(value)() if name.endswith("_hooks") and isinstance(value, dict) else value


@contextlib.contextmanager
def _forwards(
    loss: nn.Module, instead: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward of each encoder in a loss, given the encoder and that forward."""
    encoders = {id(encoder): encoder for encoder in (unwrapped(child) for *_, child in encoders_in(loss))}
    before = [(encoder, vars(encoder).get("forward")) for encoder in encoders.values()]
    for encoder, _ in before:
        encoder.forward = instead(encoder, encoder.forward)
    try:
        yield
    finally:
        for encoder, own in before:
            del vars(encoder)["forward"]
            if own is not None:
                encoder.forward = own


@contextlib.contextmanager
def _sharing(loss: nn.Module, values: Sequence[Tensor]) -> Iterator[None]:
    """Let a loss read these values in place of its own parameters."""
    places = list(_parameters_of_parts(loss))
    for (part, name, _), value in zip(places, values, strict=True):
        part._parameters[name] = value  # type: ignore[assignment] # it is read only
    try:
        yield
    finally:
        for part, name, parameter in places:
            part._parameters[name] = parameter


def _parameters_of_parts(loss: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for part in parts_of(loss):
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield part, name, parameter


def _as_one(value: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, or the sum of its components, as the library adds them."""
    if not isinstance(value, Mapping):
        return value, {}
    return torch.stack(list(value.values())).sum(), {name: part.detach() for name, part in value.items()}
