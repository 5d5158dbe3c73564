"""The two hooks on ``transformers.Trainer``: where one is built, and where it trains.

Both hold for subclasses, by whatever name and in whatever order a program imports them.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

Make = Callable[[type[Any]], type[Any]]
"""Class → the class to build in its place, a subclass."""
Start = Callable[[], Any]
BeforeTrain = Callable[[Any, Start], None]
"""(Trainer, start of its training): called before the first training of a Trainer."""

_makes: list[Make] = []
"""The innermost is the last; empty outside of blocks."""
_hooked: "weakref.WeakSet[type[Any]]" = weakref.WeakSet()
"""Classes whose ``__new__`` is ours."""


def hook_new(trainer_class: type[Any], make: Make) -> Callable[[], None]:
    """Let ``make`` choose the class of every Trainer that is built; returns what ends that.

    Python calls the ``__init__`` of the class that ``__new__`` chooses. The hook itself stays, and does nothing:
    CPython cannot take a ``__new__`` out again, ``object.__new__`` would refuse arguments from then on.
    """
    _makes.append(make)
    if trainer_class not in _hooked:
        _hooked.add(trainer_class)

        def new(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            made = _makes[-1](cls) if _makes else cls
            following = super(trainer_class, made).__new__
            return following(made) if following is object.__new__ else following(made, *args, **kwargs)

        trainer_class.__new__ = staticmethod(new)  # type: ignore[assignment]
    return lambda: _makes.remove(make)


def hook_train(trainer_class: type[Any], before: BeforeTrain) -> Callable[[], None]:
    """Call ``before`` when a Trainer is about to train for the first time; returns what takes the hook out."""
    stock = trainer_class.train
    seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(stock)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        def start() -> Any:
            return stock(self, *args, **kwargs)

        if self not in seen:
            before(self, start)
            seen.add(self)  # now: a Trainer that is refused is refused again
        return start()

    trainer_class.train = train

    def take_out() -> None:
        trainer_class.train = stock

    return take_out
