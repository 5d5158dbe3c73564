"""The modes of a model in a check: those of the training where that draws no random numbers, else evaluation.

A training sets them in every micro-batch; in a check such calls of ``model.train`` lead back to the check's modes.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_gradutils._undisturbed import BATCH_NORMS
from hf_gradutils.gradients.names import unwrapped_name

Modes: TypeAlias = Mapping[nn.Module, bool]


def modes_of_trainer(model: nn.Module) -> Modes:
    """The modes that ``model.train()`` sets, as a Trainer calls it; a class may keep some of its modules out of it."""
    before = _modes(model)
    model.train()
    try:
        return _modes(model)
    finally:
        _set(before)


def modes_of_loop(model: nn.Module) -> Modes:
    """The modes as the loop has set them; those of ``model.train()`` if it has not yet."""
    return _modes(model) if model.training else modes_of_trainer(model)


def uses_batch_statistics(modes: Modes) -> bool:
    """True if a batch normalisation with running statistics trains, which the check leaves at these."""
    return any(is_training and _is_left_out(module) for module, is_training in modes.items())


def train_as(model: nn.Module, modes: Modes) -> None:
    """Train from now on, within :func:`staying_in_mode`, in these modes; batch normalisations stay in evaluation."""
    check = {module: is_training and not _is_left_out(module) for module, is_training in modes.items()}
    _set(check)
    for stay in _stays(model):
        stay.modes = {module: check[module] for module in stay.model.modules() if module in check}


def train_copy_as(whole: nn.Module, model: nn.Module) -> None:
    """Let the copy of a model, or one built anew, train as that one does now, in :func:`staying_in_mode`."""
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    by_name = {unwrapped_name(name): module.training for name, module in inside.named_modules()}
    train_as(whole, {module: by_name.get(name, True) for name, module in whole.named_modules()})


def trains(model: nn.Module) -> bool:
    """True after :func:`train_as`."""
    return any(stay.modes is not None for stay in _stays(model))


def evaluate(model: nn.Module, modes: Modes) -> None:
    """Go back to these modes of evaluation and stay there."""
    _set(modes)
    for stay in _stays(model):
        stay.modes = None


def modes_now(model: nn.Module) -> Modes:
    """The modes of all modules."""
    return _modes(model)


@contextlib.contextmanager
def with_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode, which questions to a loss may leave for a while, within :func:`staying_in_mode`."""
    modes = _modes(model)
    staying = [(module, vars(module).pop("train")) for module in modes if isinstance(vars(module).get("train"), _Stay)]
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, train in staying:
            vars(module)["train"] = train
        _set(modes)


@contextlib.contextmanager
def staying_in_mode(model: nn.Module) -> Iterator[None]:
    """Ignore ``model.train()``, which a Trainer calls in every micro-batch, or lead it to :func:`train_as`."""
    if "train" in vars(model):  # a model that nothing wraps is inside itself
        yield
        return
    vars(model)["train"] = _Stay(model)
    try:
        yield
    finally:
        del vars(model)["train"]


class _Stay:
    """Takes the place of ``model.train`` and changes nothing, or sets the modes of the check."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modes: Modes | None = None

    def __call__(self, mode: bool = True) -> nn.Module:
        if self.modes is not None and mode:
            _set(self.modes)
        elif self.modes is not None:  # a question to a loss, or a generation, which comes back
            type(self.model).train(self.model, False)
        return self.model

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Stay":
        return _Stay(copy.deepcopy(self.model, memo))


def _is_left_out(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and module.running_mean is not None


def _stays(model: nn.Module) -> list[_Stay]:
    found = [vars(m).get("train") for m in (model, extract_model_from_parallel(model, keep_torch_compile=False))]
    return [stay for stay in found if isinstance(stay, _Stay)]


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _set(modes: Modes) -> None:
    for module, training in modes.items():
        module.training = training
