"""The place of a block in the source, the same on every rank, and the work that is done there."""

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from hf_gradutils.coordination.work import NO_WORK, Work, work_of_body, work_of_call

_WRAPPERS = ("contextlib", "hf_gradutils.coordination.first_rank")
"""Modules whose frames lie between a block and the place where the user enters it."""


class Place(NamedTuple):
    """The name of a block and the work of one passage through it."""

    name: str
    work: Work


class Call(NamedTuple):
    """A call of a decorated function."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_place(frame: FrameType | None, *, name: str | None = None, call: Call | None = None) -> Place:
    """The place of the block that ``frame`` enters, or that its caller does by a context manager made around this.

    Args:
        frame: The frame that enters.
        name: The name that the user gave; it says what the block works on, too.
        call: The call of a decorated function that the block is about.
    """
    if name is not None:
        return Place(name, NO_WORK)
    sites = [] if call is None else [_name_of(call.function)]
    while frame is not None:
        if frame.f_globals.get("__name__") not in _WRAPPERS:  # not ExitStack.enter_context, a decorated function
            sites.append(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}:{frame.f_lineno}")
            if not _makes_a_context(frame):
                break
        frame = frame.f_back
    if call is not None:
        return Place(", called in ".join(sites), work_of_call(*call))
    # Ranks may enter a context manager around the block from different places: these are part of the work.
    name, *callers = sites or ["unknown"]
    return Place(name, NO_WORK if frame is None else work_of_body(frame, callers))


def _name_of(function: Callable[..., Any]) -> str:
    inner = inspect.unwrap(function)
    return f"{inner.__module__}.{getattr(inner, '__qualname__', type(inner).__name__)}"


def _makes_a_context(frame: FrameType) -> bool:
    """True in a method ``__enter__``, and in a generator that ``contextlib.contextmanager`` runs."""
    is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
    caller = frame.f_back
    from_contextlib = caller is not None and caller.f_globals.get("__name__") == "contextlib"
    return frame.f_code.co_name == "__enter__" or bool(is_generator and from_contextlib)
