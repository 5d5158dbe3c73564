"""The windows of the models that an Accelerator trains: one for the models of one loss.

A GAN has two, each with targets of its own; an encoder and a decoder that one loss trains share one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.torch import trained_parameters
from hf_gradutils.window import AccumulationWindow, StepGuard


@dataclass(eq=False)
class ModelWindow:
    """The window of some models, from its first micro-batch to the optimizer step, and then the next one."""

    models: tuple[nn.Module, ...]
    sums: AccumulationWindow
    guard: StepGuard
    num_closed: int = 0
    is_open: bool = False
    """It has micro-batches that no optimizer step has used."""
    is_folded: bool = False
    """The optimizer is still to multiply the gradients."""
    has_scale: bool = False
    """What its sums are scaled by has been chosen."""

    whole: nn.Module = field(init=False)
    """All the models as one."""

    def __post_init__(self) -> None:
        self.whole = _as_one(self.models)

    def start(self, sums: AccumulationWindow) -> None:
        """Begin with other settings."""
        self.sums, self.has_scale, self.is_open = sums, True, False

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return trained_parameters(self.whole)

    def has_float16(self) -> bool:
        """Whether backwards may overflow without a scaler too."""
        return any(p.dtype == torch.float16 for p in self.parameters())

    def is_all(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are all its trained parameters; others that are not trained may be among them."""
        own = self.parameters()
        if len(own) == len(parameters) and all(a is b for a, b in zip(own, parameters, strict=True)):
            return True
        return {id(p) for p in own} == {id(p) for p in parameters if p.requires_grad or p.grad is not None}


OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class ModelWindows:
    """Finds the window that a loss, a parameter or an optimizer belongs to; each is made when it is first asked for.

    Args:
        make: Models → a window of theirs, without micro-batches.
    """

    def __init__(self, make: Callable[[tuple[nn.Module, ...]], ModelWindow]):
        self._make = make
        self._windows: dict[tuple[int, ...], ModelWindow] = {}
        self._optimizers: dict[tuple[int, ...], list[Any]] = {}
        self._holders: dict[tuple[int, ...], nn.Module] = {}

    def __iter__(self) -> Iterator[ModelWindow]:
        return iter(self._windows.values())

    def of_models(self, models: Sequence[nn.Module]) -> ModelWindow:
        """The window of a loss that trains all of these."""
        key = (id(models[0]),) if len(models) == 1 else tuple(sorted({id(model): model for model in models}))
        if key not in self._windows:
            self._windows[key] = self._make(tuple({id(model): model for model in models}.values()))
            self._optimizers.clear()
        return self._windows[key]

    def with_any_of(self, parameters: Iterable[Tensor]) -> list[ModelWindow]:
        """The windows that train at least one of these."""
        wanted = {id(p) for p in parameters}
        return [window for window in self if any(id(p) in wanted for p in window.parameters())]

    def holder_of(
        self, parameters: Sequence[Tensor], models: Sequence[nn.Module]
    ) -> tuple[nn.Module, list[nn.Parameter]]:
        """A module that knows all of these by name, and those that are trained, in its order.

        Args:
            parameters: Of one model, of several, or of none.
            models: Where to look beside the models of windows.
        """
        key = tuple(id(p) for p in parameters)
        if key not in self._holders:
            wanted, found = set(key), []
            for module in (*(window.whole for window in self), *models):
                own = {id(p) for p in module.parameters()}
                if own & wanted:
                    found.append(module)
                    wanted -= own
            self._holders[key] = nn.ParameterList(parameters) if wanted else _as_one(found)
        ids = set(key)
        return self._holders[key], [p for p in trained_parameters(self._holders[key]) if id(p) in ids]

    def optimizers_of(self, window: ModelWindow, optimizers: Sequence[OptimizerT]) -> list[OptimizerT]:
        """Those of the prepared optimizers that step on gradients of a window.

        Raises:
            InvalidArgumentError: one of them also steps on parameters of no model, which no window weighs.
        """
        sizes = (len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
        key = (id(window), len(optimizers), *sizes)
        if key not in self._optimizers:
            own = {id(p) for p in window.parameters()}
            found = [o for o in optimizers if any(id(p) in own for p in _parameters_of(o))]
            known = own.union(*({id(p) for p in other.parameters()} for other in self))
            for optimizer in found:
                _check_all_known(optimizer, known)
            self._optimizers[key] = found
        return self._optimizers[key]


def _as_one(modules: Sequence[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_all_known(optimizer: Optimizer, known: set[int]) -> None:
    strangers = [p for p in _parameters_of(optimizer) if p.grad is not None and id(p) not in known]
    if strangers:
        raise InvalidArgumentError(
            f"expected an optimizer of parameters of the models that the loss trains, got {len(strangers)} more, the "
            f"first of shape {tuple(strangers[0].shape)}, whose gradients nobody would divide by the targets; make "
            "them part of a module and name it: accelerator.accumulate(model, that_module)"
        )
