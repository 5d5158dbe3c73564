"""Leave no trace of losses that are computed besides training: no log entries, callbacks, counters or gradients.

What user code keeps is restored where that is cheap: attributes of the Trainer, of its state and of objects and modules
of the user's own; the contents of built-in containers; small tensors and arrays; the model's buffers. Parameters and
data are never copied.
"""

import contextlib
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils._pretended_world import Variable
from hf_gradutils._undisturbed import is_plain, kept_buffers
from hf_gradutils.sync import discard_deferred

_NAMES = """
    accelerate bitsandbytes builtins collections datasets functools hf_gradutils numpy peft tokenizers torch torchvision
    transformers trl types typing
"""
LIBRARIES = frozenset(_NAMES.split())
"""Their objects are left alone: they keep what belongs together in several places."""
_SMALL, _ALL = 2**20, 2**24
"""Elements of a tensor or array up to which it is restored, and of all of them together."""
_MOST_ENTRIES = 2**14
"""Entries of a container up to which its contents are restored: more are data."""
_DATA = ("train_dataset", "eval_dataset")
_DRAWING = ("dataset", "collate_fn")
"""Of a loader."""
_DEPTH = 4
_FEW = 64
"""Parts of a data set or collator up to which each is looked at."""
_LEFT_ALONE = (type, torch.optim.Optimizer, torch.utils.data.Dataset)
_IN_MODULES = frozenset(("_parameters", "_modules", "_buffers", "training"))


class Snapshot:
    """What user code may change while a loss is computed."""

    def __init__(self, trainer: Any, model: nn.Module):
        self.has_gradients = False
        """A loss was computed with autograd, and may have left gradients."""
        self._undo: list[Callable[[], Any]] = []
        self._seen: set[int] = {id(vars(trainer).get(name)) for name in _DATA}
        self._drawing: set[int] = set()
        self._room = _ALL
        undo, buffers = kept_buffers(model)
        self._undo.append(undo)
        self._seen.update(map(id, buffers))
        self._keep_attributes(vars(trainer), _DEPTH)
        self._keep_attributes(vars(trainer.state), _DEPTH)
        self._keep_attributes(vars(trainer.control), 0)
        loader = trainer.callback_handler.train_dataloader
        drawing = (trainer.data_collator, trainer.train_dataset, *(getattr(loader, x, None) for x in _DRAWING))
        for value in drawing:
            self._keep_generators(value, _DEPTH)
        for module in model.modules():
            self._keep_module(module)

    def keep_numbers(self, variables: Iterable[Variable]) -> None:
        """Keep counters outside of the Trainer."""

        def restore(counters: list[Variable]) -> None:
            for counter in counters:
                if counter.get() != counter.value:
                    counter.put(counter.value)

        self._undo.append(functools.partial(restore, [v for v in variables if type(v.value) in (int, float)]))

    def restore(self) -> None:
        """Put everything back; may be called again."""
        for undo in self._undo:
            undo()

    def _keep_module(self, module: nn.Module) -> None:
        buffers = vars(module)["_buffers"]
        named = dict(buffers)
        self._undo.append(lambda: buffers.update(named))
        for buffer in module.buffers(recurse=False):
            self._keep(buffer, 0)
        if _is_the_users(module) and id(module) not in self._seen:
            self._seen.add(id(module))
            attributes = {k: v for k, v in vars(module).items() if k not in _IN_MODULES and "_hooks" not in k}
            # Not what a first forward sets up, which may be more than an attribute.
            numbers = {k: v for k, v in attributes.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            self._undo.append(lambda: vars(module).update(numbers))
            for value in attributes.values():
                self._keep(value, 1)

    def _keep_attributes(self, attributes: dict[str, Any], depth: int) -> None:
        before = dict(attributes)

        def restore() -> None:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)

        self._undo.append(restore)
        for value in before.values():
            self._keep(value, depth)

    def _keep(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth < 0:
            return
        if isinstance(value, list | dict | set | deque):
            self._seen.add(id(value))
            self._keep_container(value, depth)
        elif isinstance(value, Tensor):
            if is_plain(value) and self._has_room(value.numel()):
                self._keep_tensor(value)
        elif type(value).__name__ == "ndarray":
            if value.flags.writeable and self._has_room(value.size):
                copied = value.copy()
                self._undo.append(lambda: value.__setitem__(..., copied))
        elif (undo := _undo_of_generator(value)) is not None:
            self._undo.append(undo)
        elif isinstance(value, nn.Module):
            for module in value.modules() if _is_the_users(value) and depth else ():
                self._keep_module(module)
        elif depth and _is_the_users(value) and hasattr(value, "__dict__") and not isinstance(value, _LEFT_ALONE):
            self._seen.add(id(value))
            self._keep_attributes(vars(value), depth - 1)

    def _keep_generators(self, value: Any, depth: int) -> None:
        """Keep the random numbers to come of a data set or collator, of any library, and of what is in it."""
        if id(value) in self._drawing:
            return
        self._drawing.add(id(value))
        if (undo := _undo_of_generator(value)) is not None:
            self._undo.append(undo)
        elif depth:
            parts = value if isinstance(value, list | tuple) else _attributes(value).values()
            for part in parts if len(parts) <= _FEW else ():
                self._keep_generators(part, depth - 1)

    def _has_room(self, num_elements: int) -> bool:
        if num_elements > min(_SMALL, self._room):
            return False
        self._room -= num_elements
        return True

    def _keep_container(self, value: Any, depth: int) -> None:
        if len(value) > _MOST_ENTRIES:
            return
        before: Any = dict(value) if isinstance(value, dict) else list(value)

        def restore() -> None:
            now: Any = dict(value) if isinstance(value, dict) else list(value)
            if _are_identical(now, before):
                return
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(before)

        self._undo.append(restore)
        for entry in before.values() if isinstance(before, dict) else before:
            self._keep(entry, depth - 1)

    def _keep_tensor(self, tensor: Tensor) -> None:
        self._seen.add(id(tensor))
        copied, version = tensor.detach().clone(), tensor._version

        @torch.no_grad()
        def restore() -> None:
            nonlocal version
            if tensor._version != version:
                tensor.copy_(copied)
                version = tensor._version

        self._undo.append(restore)


@contextlib.contextmanager
def without_trace(trainer: Any, model: nn.Module, variables: Iterable[Variable]) -> Iterator[Snapshot]:
    """No log entries and no callbacks inside; afterwards everything is as before, gradients too.

    Args:
        trainer: The Trainer.
        model: As it trains it, with wrappers.
        variables: Globals and the like of the user's code, of which numbers are put back.

    Yields:
        The state to go back to between two losses.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(trainer, "log", lambda *_, **__: None))
        stack.enter_context(_replaced(trainer.accelerator, "log", lambda *_, **__: None))
        stack.enter_context(
            _replaced(trainer.callback_handler, "call_event", lambda _, args, state, control, **__: control)
        )
        snapshot = Snapshot(trainer, model)
        snapshot.keep_numbers(variables)
        try:
            yield snapshot
        finally:
            snapshot.restore()
            if snapshot.has_gradients:
                discard_deferred(model)
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = function
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(before)


def _attributes(value: object) -> dict[str, Any]:
    try:
        return vars(value)
    except TypeError:  # it has none
        return {}


def _undo_of_generator(value: Any) -> Callable[[], Any] | None:
    """What gives a generator of torch, numpy or Python the state it has now; None for other values."""
    if isinstance(value, torch.Generator):
        states = value.get_state()
        return lambda: value.set_state(states)
    if isinstance(value, random.Random):
        pythons = value.getstate()
        return lambda: value.setstate(pythons)
    if (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(value, numpy.random.Generator):
            numpys = value.bit_generator.state
            return lambda: setattr(value.bit_generator, "state", numpys)
        if isinstance(value, numpy.random.RandomState):
            olds = value.get_state()
            return lambda: value.set_state(olds)
    return None


def _is_the_users(value: object) -> bool:
    """True if the user has written a part of its class; ``fully_shard`` derives a class of torch's from a module's."""
    return any(base.__module__.partition(".")[0] not in LIBRARIES for base in value.__class__.__mro__)


def _are_identical(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[name] is b[name] for name in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
