"""The gradients of a window while it is the first of its loss: sums that nothing else may change or step on."""

import functools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_gradutils.accelerator._model_windows import ModelWindow, parameters_of
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.upstream.dtensor import local_tensor
from hf_gradutils.upstream.torch import grads_of

CHANGED = (
    "gradients have changed since accelerator.backward, by a plain loss.backward(), torch's clip_grad_norm_ or by "
    "hand, but until the window ends they are sums over its targets: call accelerator.backward for every loss and "
    "accelerator.clip_grad_norm_, or make them final with GradUtilsPlugin(counts='first') (and in a loop with several "
    "micro-batches accelerator.start_window)"
)
BY_HAND = (
    "weights were changed and gradients dropped in the middle of a window, as an update by hand does, but until the "
    "window ends gradients are sums over its targets: use an optimizer that is prepared, or call "
    "accelerator.clip_grad_norm_(model.parameters(), math.inf) before the update"
)
NOT_WEIGHTED = (
    "there are gradients that were not made by accelerator.backward, so they are neither weighted nor divided; call "
    "accelerator.backward(loss) in place of loss.backward(), with num_targets=… in a loop of your own"
)
_NOT_PREPARED = (
    "an optimizer that is not prepared would step on sums over targets, which accelerator.clip_grad_norm_ or a "
    "prepared optimizer's step makes a mean first: optimizer = accelerator.prepare(optimizer)"
)
OF_NO_MODEL = (
    "an optimizer would step on parameters that the loss trains, but that belong to no model of its window, so that "
    "their gradients are not divided by the targets; make them part of the model, or in a loop of another module, "
    "prepare it and its optimizer, and pass it: accelerator.accumulate(model, that_module)"
)
LEFT_OVER = (
    "gradients of an earlier step are there still, and would be divided by the targets again: call zero_grad after "
    "each step, or make gradients final with GradUtilsPlugin(counts='first')"
)
_MOST_WINDOWS = 100
"""Windows that are watched, at most, while gradients are touched and stay as they are."""
_MOST_LOOKED_AT, _LARGEST = 2**16, 64
"""Elements of a gradient among which the largest are remembered, and how many."""


class Running:
    """What hooks know of the Accelerator, so that no model holds it."""

    def __init__(self) -> None:
        self.is_ours = False
        """``accelerator.backward`` runs."""
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that were prepared, without wrappers."""


class FirstWindow:
    """The gradients of a window that is open.

    Args:
        running: Knows the prepared optimizers, and which backward runs.
        window: Holds this.
        own: All parameters that the window's loss trains.
        watched: Parameters whose gradients are compared with those after the backward. The gradients of the others may
            be averaged over ranks by hand, which is as right for sums as for means.
        loss: May train parameters outside of the models, such as the centres of a loss.
        is_single: Windows have one micro-batch, on one process.
    """

    def __init__(
        self,
        running: Running,
        window: ModelWindow,
        own: Sequence[nn.Parameter],
        watched: Sequence[nn.Parameter],
        loss: Tensor,
        *,
        is_single: bool,
    ):
        self._running, self._window = running, weakref.ref(window)
        self._own, self._watched = {id(p) for p in own}, watched
        nodes = list(nodes_behind(loss))
        self._others = {id(node.variable) for node in nodes if adds_up_a_parameter(node)} - self._own
        for node in () if is_single and window.is_final else nodes:
            if isinstance(node, BackwardCFunction):
                node.register_hook(functools.partial(_check_is_linear, type(node).__name__.removesuffix("Backward")))
        self.goes_on = False
        """Nothing is known yet: gradients were touched, and are as before."""
        self._seen: list[_Seen | None] | None = None
        self._weights = self._num_changes()
        itself = weakref.ref(self)  # torch keeps hooks for all optimizers until they are removed

        def before_any_step(optimizer: Optimizer, *_: Any) -> None:
            if (me := itself()) is not None:
                me._check_is_prepared(optimizer)

        weakref.finalize(self, register_optimizer_step_pre_hook(before_any_step).remove)

    @torch.no_grad()
    def remember(self) -> None:
        """Remember the gradients after a backward. Host syncs: none."""
        self._weights = self._num_changes()
        self._seen = [None if g is None else _Seen.of(g) for g in grads_of(self._watched)]

    @torch.no_grad()
    def check(self) -> None:
        """Raise TargetCountError if gradients are not those remembered, except where some or all elements were dropped.

        Touched but equal ones, as a clipping by torch leaves them that had nothing to clip, are looked at again in the
        next window. Non-finite ones are judged at the window's end.
        """
        before, self._seen = self._seen, None
        if before is None:
            return
        gradients = grads_of(self._watched)
        there = [(seen, g) for seen, g in zip(before, gradients, strict=True) if g is not None]
        is_same = all(seen is not None and seen.state == _state_of(g) for seen, g in there)
        if is_same and not any(isinstance(g, DTensor) for _, g in there):  # torch's clipping leaves no mark on these
            return
        if all(seen is not None for seen, _ in there):
            are_equal, are_masked = _compare([(seen.largest, g) for seen, g in there if seen is not None])
            window = self._window()
            is_early = window is not None and window.num_closed < _MOST_WINDOWS
            self.goes_on = are_equal and not is_same and is_early
            if are_equal or are_masked:
                return
        if all(local_tensor(g).isfinite().all() for _, g in there):
            raise TargetCountError(CHANGED)

    def has_stepped(self) -> bool:
        """Weights have changed since the latest backward."""
        return self._weights != self._num_changes()

    def _num_changes(self) -> int:
        return sum(p._version for p in self._watched)

    def _check_is_prepared(self, optimizer: Optimizer) -> None:
        window = self._window()
        if window is None or self._running.is_ours or optimizer in self._running.optimizers:
            return
        ids = {id(p) for p in parameters_of(optimizer)}
        if window.is_open and ids & self._own:
            raise TargetCountError(_NOT_PREPARED)
        if not window.is_final and ids & self._others:
            raise TargetCountError(OF_NO_MODEL)


def nodes_behind(output: Tensor) -> Iterator[Any]:
    """The nodes of a backward, from its first one on."""
    waiting: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in reversed(node.next_functions)]


def adds_up_a_parameter(node: Any) -> bool:
    """True for a node that adds up the gradient of a parameter."""
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _check_is_linear(name: str, own: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Raise InvalidArgumentError for a backward that returns 1 for a loss, whatever it is given."""
    returns_one = any(float(g) == 1 for g in own if g is not None and g.numel() == 1 and not g.is_complex())
    # A bias of one element gets the sum of what is given, which may be 1.
    if returns_one and not any(math.isclose(float(g.sum().abs()), 1, rel_tol=1e-3) for g in given if g is not None):
        raise InvalidArgumentError(
            f"{name} adds a loss with a gradient of 1, but losses are weighted by their targets, and it would be out "
            "of proportion: multiply by what its backward is given, or add the term to the loss that is passed to "
            "backward; with one micro-batch on one process it is right as it is"
        )


def check_dense(model: nn.Module) -> None:
    """Raise InvalidArgumentError if a gradient of the model will be sparse."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise InvalidArgumentError(
                f"the gradient of {name or type(module).__name__} is sparse, and torch has no norm of those: build it "
                "with sparse=False"
            )


def mark_of(gradients: Iterable[Tensor | None]) -> tuple[int, int] | None:
    """The first gradient that there is, and how often it was changed."""
    return next(((id(g), g._version) for g in gradients if g is not None), None)


def check_weighted(parameters: Iterable[Tensor], message: str = NOT_WEIGHTED) -> None:
    """Raise TargetCountError if any has a gradient; called where no loss of theirs was weighted. A host sync for each.

    Gradients of 0 are torch's, which so makes the state of an optimizer that is resumed.
    """
    if any(bool(local_tensor(g).any()) for g in grads_of(list(parameters)) if g is not None):
        raise TargetCountError(message)


class _Seen(NamedTuple):
    """A gradient after a backward."""

    state: tuple[int, int, int]
    largest: tuple[Tensor, Tensor]
    """Places and values of the largest elements, on the device, each shape (up to 64,)."""

    @classmethod
    def of(cls, gradient: Tensor) -> "_Seen":
        elements = _looked_at(gradient)
        places = elements.abs().topk(min(_LARGEST, elements.numel())).indices
        return cls(_state_of(gradient), (places, elements[places]))


def _state_of(gradient: Tensor) -> tuple[int, int, int]:
    """Which one it is, and how often it was changed: a DTensor as a whole, and this rank's part."""
    return id(gradient), gradient._version, local_tensor(gradient)._version


def _looked_at(gradient: Tensor) -> Tensor:
    flat = local_tensor(gradient).reshape(-1)
    return flat[:: 1 + flat.numel() // _MOST_LOOKED_AT]


def _compare(pairs: Sequence[tuple[tuple[Tensor, Tensor], Tensor]]) -> tuple[bool, bool]:
    """(the largest elements are as before, some have been set to zero and the others are as before). A host sync."""
    equal, masked = [], []
    for (places, largest), gradient in pairs:
        now = _looked_at(gradient)[places]
        equal.append((now == largest).all())
        masked.append(((now == largest) | (now == 0)).all())
    if not pairs:
        return True, False
    are_equal, are_masked = torch.stack((torch.stack(equal).all(), torch.stack(masked).all())).tolist()
    return are_equal, are_masked and not are_equal
