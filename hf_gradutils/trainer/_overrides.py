"""Methods that users override, inside or outside of ours."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_KNOWN = ("hf_gradutils", "transformers", "trl")
"""Packages whose overrides are known to call each other."""


def is_users(trainer: Any, name: str) -> bool:
    """True if code of the user's defines a method of the Trainer: a class, the object, or a patch of transformers."""
    return any(not is_transformers(method) for method in definitions(trainer, name))


def names_read(trainer: Any) -> set[str]:
    """Names that the user's own ``training_step`` reads."""
    own = (step for step in definitions(trainer, "training_step") if not is_transformers(step))
    return {name for step in own for name in getattr(step, "__code__", _NO_CODE).co_names}


def is_transformers(method: Any) -> bool:
    """True if a method is that of transformers or trl, or ours."""
    function = getattr(method, "__func__", method)
    # Not its __module__ first: a patch that is wrapped like the original has taken that over.
    module = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None) or ""
    return module.partition(".")[0] in _KNOWN


def definitions(trainer: Any, name: str) -> list[Any]:
    """A method's definitions: those of the classes, and the object's own, also under our wrapper."""
    own = vars(trainer).get(name)
    own = getattr(own, "instead_of", own)
    found = [vars(c)[name] for c in trainer.__class__.__mro__ if name in vars(c)]
    return found if own is None else [*found, own]


_NO_CODE = is_transformers.__code__.replace(co_names=())


@contextlib.contextmanager
def wrapping_overrides(trainer: Any, mixin: type) -> Iterator[None]:
    """Let the Trainer's loop call our wrapper around each method that is overridden outside of ours.

    The wrappers are attributes of the object while a training lasts: they are outermost whatever the base classes.
    """
    attributes = vars(trainer)
    before = {name: attributes[name] for name in _WRAPPERS if name in attributes}
    wrapped = {
        name: _around(trainer, wrapper, getattr(trainer, name), before.get(name))
        for name, wrapper in _WRAPPERS.items()
        if getattr(getattr(trainer, name), "__func__", None) is not getattr(mixin, name)
    }
    attributes.update(wrapped)
    try:
        yield
    finally:
        for name in wrapped:
            attributes.pop(name, None)
        attributes.update(before)


_WRAPPERS = {
    "get_batch_samples": "window_of",
    "training_step": "in_micro_batch",
    "_prepare_inputs": "prepare",
    "compute_loss": "outermost_loss",
}
"""Method of a Trainer → method of its ``OptimizerSteps``, which are made anew for a smaller batch."""


def _around(trainer: Any, wrapper: str, override: Callable[..., Any], instead_of: Any) -> Callable[..., Any]:
    def outermost(*args: Any, **kwargs: Any) -> Any:
        return getattr(trainer._steps, wrapper)(override, *args, **kwargs)

    outermost.instead_of = instead_of  # type: ignore[attr-defined] # the user's own attribute, for checks
    return outermost
