"""The windows of the models that an Accelerator trains: one per loss.

A GAN has two, each with its own targets; an encoder and a decoder trained by one loss share one.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.torch import trained_parameters
from hf_gradutils.window import AccumulationWindow, StepGuard


@dataclass(eq=False)
class ModelWindow:
    """The window of the models that one loss trains; reused for every optimizer step."""

    models: tuple[nn.Module, ...]
    sums: AccumulationWindow
    guard: StepGuard
    num_closed: int = 0
    is_open: bool = False
    """It has micro-batches that no optimizer step has used."""
    is_folded: bool = False
    """The optimizer is still to multiply the gradients."""
    has_scale: bool = False
    """The scale of its sums has been chosen."""
    reader: str | None = None
    """What reads gradients in the backward, in words; empty if nothing does, None if not known yet."""
    first: Any = None
    """What watches over its gradients, until the second opens."""
    needs_counts: bool | None = None
    """Each of its windows begins with its counts; None until all ranks have agreed on it."""
    ordered: list[tuple[Any, Any]] = field(default_factory=list)
    """Optimizers and what the latest end has ordered of them."""
    totals: Callable[[], Tensor] | None = None
    """Waits for the targets of each term over all ranks, where they are counted first."""
    counted: Tensor | None = None
    """Targets of each term in its micro-batches so far."""
    is_final: bool = False
    """Gradients of this window are its mean as soon as they are there."""
    is_reduced: bool = False
    """The latest backward has left reduced gradients in ``.grad``."""
    is_bare: bool = False
    """The latest backward was in no context of the Accelerator's."""
    mark: tuple[int, int] | None = None
    """Its first gradient after the latest backward, and how often that was changed."""
    num_changes: int = 0
    """Of its parameters, when the latest micro-batch began; where something reads gradients."""
    whole: nn.Module = field(init=False)
    """All the models as one."""

    def __post_init__(self) -> None:
        self.whole = _as_one(self.models)

    def start(self, sums: AccumulationWindow) -> None:
        """Begin with sums that have their scale."""
        self.sums, self.has_scale, self.is_open = sums, True, False

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return trained_parameters(self.whole)

    def is_all(self, parameters: Sequence[Tensor]) -> bool:
        """True if these are all its trained parameters, and any that are not trained."""
        own = self.parameters()
        if len(own) == len(parameters) and all(a is b for a, b in zip(own, parameters, strict=True)):
            return True
        return {id(p) for p in own} == {id(p) for p in parameters if p.requires_grad or p.grad is not None}


OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class ModelWindows:
    """Finds the windows of models, parameters and optimizers.

    Args:
        make: A method that makes the window of a new loss; of the object that holds this one, so held weakly.
    """

    def __init__(self, make: Callable[[tuple[nn.Module, ...]], ModelWindow]):
        self._make = weakref.WeakMethod(make)
        self._windows: dict[tuple[int, ...], ModelWindow] = {}
        self._optimizers: dict[tuple[int, ...], list[Any]] = {}
        self._holders: dict[tuple[int, ...], nn.Module] = {}

    def __bool__(self) -> bool:
        return bool(self._windows)

    def __iter__(self) -> Iterator[ModelWindow]:
        return iter(self._windows.values())

    def of_models(self, models: Sequence[nn.Module]) -> ModelWindow:
        """The window of a loss that trains all of these."""
        key = (id(models[0]),) if len(models) == 1 else tuple(sorted({id(model): model for model in models}))
        if key not in self._windows:
            make = self._make()
            assert make is not None
            self._windows[key] = make(tuple({id(model): model for model in models}.values()))
            self._optimizers.clear()
        return self._windows[key]

    def sharing(self, window: ModelWindow) -> list[ModelWindow]:
        """Other windows that are open, and train some of the same parameters."""
        others = [other for other in self if other.is_open and other is not window]
        own = {id(p) for p in window.parameters()} if others else set()
        return [other for other in others if any(id(p) in own for p in other.parameters())]

    def with_any_of(self, parameters: Iterable[Tensor]) -> list[ModelWindow]:
        """The windows that train at least one of these."""
        wanted = {id(p) for p in parameters}
        return [window for window in self if any(id(p) in wanted for p in window.parameters())]

    def holder_of(
        self, parameters: Sequence[Tensor], models: Sequence[nn.Module]
    ) -> tuple[nn.Module, list[nn.Parameter]]:
        """Return a module that names all of these, and the trained ones of them in its order.

        Args:
            parameters: Of one model, of several, or of none.
            models: Searched after the models of windows.
        """
        key = tuple(id(p) for p in parameters)
        if key not in self._holders:
            missing, holders = set(key), []
            for module in (*(window.whole for window in self), *models):
                own = {id(p) for p in module.parameters()}
                if own & missing:
                    holders.append(module)
                    missing -= own
            self._holders[key] = nn.ParameterList(parameters) if missing else _as_one(holders)
        ids = set(key)
        return self._holders[key], [p for p in trained_parameters(self._holders[key]) if id(p) in ids]

    def optimizers_of(
        self, window: ModelWindow, optimizers: Sequence[OptimizerT], others_known: Collection[int] = ()
    ) -> list[OptimizerT]:
        """The optimizers that step on gradients of a window; of no model may be the ``others_known`` by their ids.

        Raises:
            InvalidArgumentError: one of them also steps on parameters that belong to no window.
        """
        sizes = (len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
        key = (id(window), len(optimizers), *sizes)
        if key not in self._optimizers:
            own = {id(p) for p in window.parameters()}
            stepping = [o for o in optimizers if any(id(p) in own for p in parameters_of(o))]
            in_windows = own.union(others_known, *({id(p) for p in other.parameters()} for other in self))
            others = [p for o in stepping for p in parameters_of(o) if p.grad is not None and id(p) not in in_windows]
            if others and not window.is_final:
                raise InvalidArgumentError(
                    f"the optimizer also steps on {len(others)} parameters of no model that the loss trains, the first "
                    f"of shape {tuple(others[0].shape)}; their gradients would not be divided by the targets. Make "
                    "them part of a module and pass it: accelerator.accumulate(model, that_module)"
                )
            self._optimizers[key] = stepping
        return self._optimizers[key]


def _as_one(modules: Sequence[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that it steps on."""
    return [p for group in optimizer.param_groups for p in group["params"]]
