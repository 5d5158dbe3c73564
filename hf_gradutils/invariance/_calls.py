"""Lets what a Trainer keeps besides its model call a copy of the model: losses of one's own, above all.

A loss that calls the wrapped model on rank 0 alone would wait for the other ranks in its backward.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_gradutils.upstream.torch import calls_redirected

_WRAPPED = ("module", "_orig_mod")
"""Attributes in which wrappers keep what they wrap."""


@contextlib.contextmanager
def calling_copy(trainer: Any, whole: nn.Module) -> Iterator[None]:
    """Let the losses of a Trainer call a copy of the model that it trains, and wherever else the model is called.

    Losses that share parameters with the model are copied, so that they share those of the copy. The caller restores
    the attributes of the Trainer.

    Args:
        trainer: Whose ``model`` and ``model_wrapped`` are those that are trained.
        whole: The copy, without wrappers.
    """
    inside = _chain(trainer.model_wrapped)[-1]
    trained = {id(m): m for m in (*_chain(trainer.model_wrapped), *_chain(trainer.model))}
    pairs = [(wrapper, whole) for wrapper in trained.values()]
    old_modules, new_modules = list(inside.modules()), list(whole.modules())
    if [type(m).__name__ for m in old_modules] == [type(m).__name__ for m in new_modules]:
        pairs += [(old, new) for old, new in zip(old_modules, new_modules, strict=True) if id(old) not in trained]
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for name, value in list(vars(trainer).items()):
        if isinstance(value, nn.Module) and id(value) not in trained:
            if _shares(value, inside, trained):
                value = vars(trainer)[name] = _copy_of(value, pairs, inside, whole)
            places += _places(value, trained)
        for part in value.values() if isinstance(value, dict) else ():
            places += _places(part, trained) if isinstance(part, nn.Module) else []
    for part, name, _ in places:
        setattr(part, name, whole)
    try:
        with calls_redirected(pairs):
            yield
    finally:
        for part, name, child in places:
            setattr(part, name, child)


def _chain(model: Any) -> list[nn.Module]:
    """A model and what is inside of its wrappers."""
    chain = [model]
    while inside := [vars(chain[-1])["_modules"][name] for name in _WRAPPED if name in vars(chain[-1])["_modules"]]:
        if len(vars(chain[-1])["_modules"]) > 1:  # a model that happens to have such a child
            break
        chain.append(inside[0])
    return chain


def _places(module: nn.Module, trained: Mapping[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(part, name, child) wherever a module keeps the trained model or its wrapper."""
    if id(module) in trained:
        return []
    found = [(module, name, child) for name, child in module.named_children() if id(child) in trained]
    return found + [p for child in module.children() for p in _places(child, trained)]


def _shares(loss: nn.Module, inside: nn.Module, trained: Mapping[int, nn.Module]) -> bool:
    """True if a loss has parameters of the model outside of the model."""
    of_model = {id(p) for p in inside.parameters()}
    parts, own = [loss], set[int]()
    while parts:
        part = parts.pop()
        own |= {id(p) for p in part.parameters(recurse=False)}
        parts += [child for child in part.children() if id(child) not in trained]
    return bool(own & of_model)


def _copy_of(loss: nn.Module, pairs: list[tuple[nn.Module, nn.Module]], inside: nn.Module, whole: nn.Module) -> Any:
    memo: dict[int, Any] = {id(old): new for old, new in pairs}
    memo |= {id(old): new for old, new in zip(inside.parameters(), whole.parameters(), strict=True)}
    made = copy.deepcopy(loss, memo)
    return made.to(torch.float64) if next(whole.parameters()).dtype == torch.float64 else made
