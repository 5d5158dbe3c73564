"""Ranks of a check that go on together: values of rank 0, and errors of one rank, which all raise."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hf_gradutils.errors import InvarianceError

T = TypeVar("T")


def from_first_rank(value: T) -> T:
    """The value of rank 0. Collectives: one broadcast of objects."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def on_any_rank(word: bool) -> bool:
    """True if it is on one rank. Collectives: one gather of objects."""
    words = [word]
    if dist.is_initialized():
        words *= dist.get_world_size()
        dist.all_gather_object(words, word)
    return any(words)


def on_all_ranks(action: Callable[[], T]) -> T:
    """Call a function on every rank; if it raises on one, all raise, so that none waits for another that has left.

    Args:
        action: Without collectives.

    Collectives: one gather of words.
    """
    result: Any = None
    raised: Exception | None = None
    try:
        result = action()
    except Exception as error:
        raised = error
    words = [_words(raised)]
    if dist.is_initialized():
        words *= dist.get_world_size()
        dist.all_gather_object(words, _words(raised))
    if raised is not None:
        raise raised
    for rank, word in enumerate(words):
        if word:
            raise InvarianceError(f"the check has stopped on rank {rank}: {word}")
    return result  # type: ignore[no-any-return]


def of_first_rank(action: Callable[[], T]) -> T:
    """What a function returns on rank 0, for all ranks; what cannot be pickled each rank makes by itself.

    Collectives: one broadcast of objects and two gathers of words.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    made: list[T] = []
    content: bytes | None = None

    def make() -> None:
        nonlocal content
        if dist.get_rank() == 0:
            made.append(action())
            try:
                content = pickle.dumps(made[0])
            except Exception:  # a lambda or a handle in it, of which every library has an error of its own
                content = None

    on_all_ranks(make)
    content = from_first_rank(content)
    return on_all_ranks(lambda: made[0] if made else action() if content is None else pickle.loads(content))


def _words(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
