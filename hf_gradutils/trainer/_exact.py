"""Any Trainer class, made exact."""

import copyreg
import functools
from typing import Any, TypeVar

from transformers import Trainer

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.trainer._trainer import GradUtilsTrainerMixin

T = TypeVar("T")


def exact(trainer_class: type[T], *, grad_plugin: GradUtilsPlugin | None = None) -> type[T]:
    """Make a Trainer class exact: a subclass with :class:`GradUtilsTrainerMixin` in front.

    It is one class, however often it is asked for; its instances and itself can be pickled. To a type checker
    ``exact(SFTTrainer)`` is a ``type[SFTTrainer]``.

    Args:
        trainer_class: ``transformers.Trainer`` or any subclass. One that is exact already is returned as it is.
        grad_plugin: Settings for its Trainers that are given none.

    Raises:
        InvalidArgumentError: ``trainer_class`` is no Trainer class, or cannot have subclasses.

    Collectives: none.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise InvalidArgumentError(
            f"exact takes a Trainer class, as exact(SFTTrainer), got {trainer_class!r}; a Trainer that exists already "
            "cannot be made exact"
        )
    any_class: Any = trainer_class
    return _exact(any_class) if grad_plugin is None else _with_plugin(any_class, grad_plugin)


@functools.cache
def _exact(trainer_class: Any) -> Any:
    if issubclass(trainer_class, GradUtilsTrainerMixin):
        return trainer_class
    return _subclass(trainer_class, (GradUtilsTrainerMixin, trainer_class), None)


def _with_plugin(trainer_class: Any, plugin: GradUtilsPlugin) -> Any:
    base = _exact(trainer_class)
    made = _WITH_PLUGIN.setdefault(base, [])
    found = next((c for c in made if c.default_plugin == plugin), None)
    if found is None:
        found = _subclass(base, (base,), plugin)
        made.append(found)
    return found


_WITH_PLUGIN: dict[Any, list[Any]] = {}
"""Exact class → its subclasses with settings."""


def _subclass(trainer_class: Any, bases: tuple[Any, ...], plugin: GradUtilsPlugin | None) -> Any:
    original, _ = vars(trainer_class).get("_made_exact", (trainer_class, None))
    name = original.__name__
    namespace = {
        "__module__": original.__module__,
        "__qualname__": f"Exact{name}",
        "__doc__": f"``{name}``, exact (hf_gradutils).\n\n{original.__doc__ or ''}".rstrip(),
        "_made_exact": (original, plugin),
    }
    type_of: Any = type(trainer_class)
    if plugin is not None:
        namespace["default_plugin"] = plugin
    try:
        return _metaclass(type_of)(f"Exact{name}", bases, namespace)
    except TypeError as error:  # an __init_subclass__ that needs arguments, a final class
        raise InvalidArgumentError(f"{name} cannot have an exact subclass: {error}") from error


@functools.cache
def _metaclass(of: Any) -> Any:
    """A metaclass of their own: pickle asks ``_reduce`` about such classes, which no module has under their name."""
    metaclass = type("ExactTrainerType", (of,), {"__module__": __name__})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


def _reduce(made: Any) -> str | tuple[Any, ...]:
    if "_made_exact" not in vars(made):
        return made.__qualname__  # a subclass of a user's, found in its module
    return _restore, made._made_exact


def _restore(trainer_class: Any, plugin: GradUtilsPlugin | None) -> Any:
    return exact(trainer_class, grad_plugin=plugin)
