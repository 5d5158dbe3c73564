"""Lets user code read another number of ranks than there are."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from accelerate import PartialState


@dataclass(frozen=True, eq=False, slots=True)
class Variable:
    """A variable of the user's."""

    name: str
    value: Any
    """When it was found."""
    get: Callable[[], Any]
    put: Callable[[Any], None]


_MISSING = object()


@contextlib.contextmanager
def pretending(accelerator: Any, args: Any, num_ranks: int, kept: Sequence[Variable] = ()) -> Iterator[None]:
    """Let all that user code may ask for the number of ranks answer ``num_ranks``.

    A loss that multiplies by the number of ranks, as the stock Trainer asks for, is then the loss for that many. Asked
    are the Accelerator, its state, ``TrainingArguments``, ``dist.get_world_size()`` and WORLD_SIZE; torch's collectives
    ask the group, and go on with all ranks.

    Args:
        accelerator: An Accelerator; others of its class read the same number.
        args: ``TrainingArguments``; likewise.
        num_ranks: What to pretend.
        kept: What user code has read before: numbers of ranks, or ``dist.get_world_size`` itself.

    Collectives: none.
    """
    true_size = dist.get_world_size if dist.is_available() else lambda group=None: 1

    def world_size(group: Any = None) -> int:
        return num_ranks if group is None else true_size(group)

    number = property(lambda _: num_ranks)
    with (
        _entry(PartialState._shared_state, "num_processes", num_ranks),
        _entry(os.environ, "WORLD_SIZE", str(num_ranks)),
        _replaced(type(accelerator), "num_processes", number),
        _replaced(type(args), "world_size", number),
        _replaced(dist, "get_world_size", world_size),
        replaced(kept, lambda value: world_size if value is true_size else num_ranks),
    ):
        yield


@contextlib.contextmanager
def replaced(kept: Sequence[Variable], other: Callable[[Any], Any]) -> Iterator[None]:
    """Let variables that are still what they were when found have other values: ``other`` of their own."""
    undo: list[tuple[Variable, Any, Any]] = []
    try:
        for variable in kept:
            value = variable.get()
            if type(value) is type(variable.value) and value == variable.value:
                variable.put(pretended := other(value))
                undo.append((variable, value, pretended))
        yield
    finally:
        for variable, value, pretended in undo:
            if variable.get() is pretended:  # else user code has set it meanwhile
                variable.put(value)


@contextlib.contextmanager
def _entry(mapping: Any, name: str, value: Any) -> Iterator[None]:
    """Set an entry that is there."""
    if name not in mapping:
        yield
        return
    before, mapping[name] = mapping[name], value
    try:
        yield
    finally:
        mapping[name] = before


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class or module; afterwards it is as before, inherited if it was."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "scatter"),
    *("reduce_scatter_tensor", "send", "recv", "batch_isend_irecv"),
)
_OF_WRAPPERS = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel", "hf_gradutils")


@contextlib.contextmanager
def collectives_noted() -> Iterator[list[str]]:
    """Note the collectives that user code calls; those of DDP and FSDP are not."""
    noted: list[str] = []

    def noting(name: str) -> Any:
        call = getattr(dist, name)

        def noted_call(*args: Any, **kwargs: Any) -> Any:
            if not str(sys._getframe(1).f_globals.get("__name__")).startswith(_OF_WRAPPERS):
                noted.append(name)
            return call(*args, **kwargs)

        return noted_call

    with contextlib.ExitStack() as stack:
        for name in _COLLECTIVES if dist.is_available() and dist.is_initialized() else ():
            stack.enter_context(_replaced(dist, name, noting(name)))
        yield noted
