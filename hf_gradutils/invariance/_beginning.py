"""Callbacks of the user's at the beginning of a training, which then relies on them; their changes are put back."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_gradutils.errors import InvarianceError
from hf_gradutils.invariance._agreement import on_all_ranks, on_any_rank
from hf_gradutils.invariance._as_before import attributes_kept, plain_attributes_kept

_OF_LIBRARIES = ("transformers", "sentence_transformers", "trl", "hf_gradutils")
"""Their callbacks show, write and schedule, and change nothing that the gradient of the first step depends on."""
_TRACKERS = "transformers.integrations"


def users_callbacks(callbacks: Sequence[Any]) -> list[Any]:
    """Those with an ``on_train_begin`` of the user's, but for classes of his that extend a tracker."""
    return [callback for callback in callbacks if _begins(type(callback))]


@contextlib.contextmanager
def begun(model: nn.Module, callbacks: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Call ``on_train_begin`` of callbacks, as a Trainer does; afterwards, what it has changed is as before.

    That is: attributes of its arguments, weights, which weights are trained, hooks, plain attributes of modules.
    Attributes of the callbacks, which they may change before, are the caller's to keep.

    Args:
        model: As it trains.
        callbacks: To call; with none, nothing is done.
        args: The Trainer's arguments, state and control.
        kwargs: What else a callback gets.

    Collectives: two gathers of words, and those of the callbacks. Memory: a copy of the weights on the CPU.

    Raises:
        InvarianceError: one has raised, on any rank.
    """
    if not on_any_rank(bool(callbacks)):
        yield
        return

    def call() -> None:
        settings, state, control = args
        for callback in callbacks:
            try:
                control = callback.on_train_begin(settings, state, control, **kwargs) or control
            except Exception as error:
                raise InvarianceError(
                    f"on_train_begin of {type(callback).__name__}, which the check calls because the training may rely "
                    f"on it, has raised {type(error).__name__}: {error}"
                ) from error

    with attributes_kept(*args), plain_attributes_kept(model), _weights_kept(model):
        before = {place: set(hooks) for place, hooks in _hooks(model).items()}
        added: list[tuple[dict[Any, Any], Any]] = []
        try:
            try:
                on_all_ranks(call)
            finally:
                for place, hooks in _hooks(model).items():
                    added += [(hooks, key) for key in set(hooks) - before.get(place, set())]
            yield
        finally:
            for hooks, key in added:
                hooks.pop(key, None)


@contextlib.contextmanager
def training_undone(trainer: Any) -> Iterator[None]:
    """Undo what the beginning of a training leaves behind, if it is left by an exception.

    That is: the noise of embeddings (NEFTune), settings in an optimizer of the user's, and the state of a collator, its
    random generators too.
    """
    optimizer = trainer.optimizer  # accelerate gives it new groups
    groups = [] if optimizer is None else optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    collators = [trainer.data_collator] if hasattr(trainer.data_collator, "__dict__") else []
    values = [value for collator in collators for value in vars(collator).values()]
    states = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
    try:
        with attributes_kept(*collators):
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        if (handle := getattr(trainer, "neftune_hook_handle", None)) is not None:
            handle.remove()
        for group, before in zip([] if optimizer is None else optimizer.param_groups, settings, strict=True):
            for name in group.keys() - before.keys() - {"params"}:
                del group[name]
            group.update(before)


@contextlib.contextmanager
def _weights_kept(model: nn.Module) -> Iterator[None]:
    """Weights, and which of them are trained, are as before afterwards; quantized ones stay as they are."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    parts = [_part(tensor) for tensor in (*model.parameters(), *model.buffers()) if _is_plain(tensor)]
    kept = [(part, part.to("cpu", copy=True)) for part in parts]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in kept:
                part.copy_(value)
        for p, flag in flags:
            p.requires_grad_(flag)


def _is_plain(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or type(tensor) in (Tensor, nn.Parameter)


def _part(tensor: Any) -> Tensor:
    """This rank's, with the same memory."""
    part: Tensor = tensor.detach()
    return part.to_local() if isinstance(part, DTensor) else part


def _hooks(model: nn.Module) -> dict[tuple[int, str], dict[Any, Any]]:
    """(Owner, attribute) → the dict in which a module or parameter keeps its hooks, made with the first one."""
    found = {
        (id(module), name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if "_hooks" in name and isinstance(value, dict)
    }
    for parameter in model.parameters():
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(parameter, name, None)
            if isinstance(hooks, dict):
                found[id(parameter), name] = hooks
    return found


def _begins(kind: type) -> bool:
    owner = next((c for c in kind.__mro__ if "on_train_begin" in vars(c)), TrainerCallback)
    if owner.__module__.partition(".")[0] in _OF_LIBRARIES:
        return False
    return not any(c.__module__.startswith(_TRACKERS) for c in kind.__mro__)
