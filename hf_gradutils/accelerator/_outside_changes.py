"""What changes gradients besides ``accelerator.backward``, noticed in the first window of a loss.

Until a window ends its gradients are sums over targets: those of a plain ``loss.backward()``, torch's
``clip_grad_norm_``, or a step of an optimizer that was not prepared would be wrong without a sign of it.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils.accelerator._first_window import (
    BY_HAND,
    CHANGED,
    LEFT_OVER,
    NOT_WEIGHTED,
    FirstWindow,
    Running,
    adds_up_a_parameter,
    check_dense,
    check_weighted,
    mark_of,
    nodes_behind,
)
from hf_gradutils.accelerator._micro_batch import MicroBatch
from hf_gradutils.accelerator._model_windows import ModelWindow, parameters_of
from hf_gradutils.accelerator._prepared import PreparedModels
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.sync import find_wrappers, reduces_gradients
from hf_gradutils.upstream.accelerate import optimizers_of
from hf_gradutils.upstream.deepspeed import is_engine
from hf_gradutils.upstream.dtensor import local_tensor
from hf_gradutils.upstream.fsdp import fsdp2_shards
from hf_gradutils.upstream.torch import grads_of, tensors_in

_FSDP = (FSDPModule, FullyShardedDataParallel)
_AVERAGING = (DistributedDataParallel, FullyShardedDataParallel)
"""They average the gradients of all parameters that they wrap."""


class OutsideChanges:
    """Notices, in the first window of each loss, what changes its gradients besides ``accelerator.backward``.

    Args:
        accelerator: Knows the prepared optimizers and fp16's scaler.
        prepared: Knows the wrappers of models.
        moves_gradients: Gradients are moved between backwards, where they are accumulated in a wider dtype.
    """

    def __init__(self, accelerator: Accelerator, prepared: PreparedModels, *, moves_gradients: bool):
        self._accelerator, self._prepared = accelerator, prepared
        self._moves_gradients = moves_gradients
        self.running = Running()
        self._averaged: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
        self._plain: weakref.WeakKeyDictionary[nn.Module, _PlainBackward] = weakref.WeakKeyDictionary()

    def watch(self, models: Iterable[nn.Module]) -> None:
        """Note backwards through models that something wraps, from their next forward on, and what DDP averages."""
        for model in models:
            for _, wrapper in self._prepared.wrappers(model):
                if isinstance(wrapper, DistributedDataParallel) and wrapper not in self._averaged:
                    named = wrapper.module.named_parameters()
                    ignored = wrapper.parameters_to_ignore
                    self._averaged[wrapper] = {id(p) for name, p in named if p.requires_grad or name in ignored}
            is_compiled = getattr(model, "_compiled_call_impl", None) is not None  # together with its hooks
            is_moved = self._prepared.wrappers(model) or is_engine(model)
            if model not in self._plain and is_moved and not is_compiled:
                self._plain[model] = _PlainBackward(model, self.running)

    def forget(self) -> None:
        """Note no more backwards until models are prepared again."""
        for plain in self._plain.values():
            plain.end()
        self._plain.clear()

    def check_averaged(self, window: ModelWindow) -> None:
        """Raise InvalidArgumentError if parameters are trained that did not when DDP wrapped their model."""
        for wrapper in self._wrappers(window):
            averaged = self._averaged.get(wrapper)
            if averaged is None:
                continue
            late = [name for name, p in wrapper.named_parameters() if p.requires_grad and id(p) not in averaged]
            if late:
                raise InvalidArgumentError(
                    f"{len(late)} parameters train that did not when DDP wrapped the model, the first {late[0]}: their "
                    "gradients are not averaged over ranks; freeze what is to be frozen later after prepare, or "
                    "prepare the model again"
                )

    def start(self, window: ModelWindow, loss: Tensor, *, is_alone: bool, is_single: bool) -> None:
        """Watch over a window that opens, if it is the first; see in the second that nothing is left of that.

        Args:
            window: The window.
            loss: The first.
            is_alone: Gradients are not averaged over ranks.
            is_single: Windows have one micro-batch, on one process.

        Raises:
            TargetCountError: its parameters have gradients already, and those of the window are sums.
            InvalidArgumentError: its gradients will be sparse.
        """
        if window.first is not None and not (window.num_closed and window.first.goes_on):
            window.first = None
        if window.num_closed > 1:
            return
        shards = self._shards(window)
        own = [*window.parameters(), *shards]  # FSDP2 has whole ones in a forward, on which no optimizer steps
        if not window.is_final:
            stepped = {id(p) for optimizer in optimizers_of(self._accelerator) for p in parameters_of(optimizer)}
            used = [p for p in own if p.requires_grad and (not stepped or id(p) in stepped)]
            check_weighted(used, LEFT_OVER if window.num_closed else NOT_WEIGHTED)
        if window.num_closed:
            return
        check_dense(window.whole)
        averages_all = any(isinstance(wrapper, _AVERAGING) for wrapper in self._wrappers(window))
        window.first = FirstWindow(
            self.running, window, own, own if is_alone or averages_all else shards, loss, is_single=is_single
        )

    @contextlib.contextmanager
    def in_backward(self, window: ModelWindow) -> Iterator[None]:
        """The context of a weighted loss's backward."""
        before, self.running.is_ours = self.running.is_ours, True
        try:
            yield
        finally:
            self.running.is_ours = before
        window.is_reduced = all(map(reduces_gradients, self._wrappers(window)))
        if not self._is_sharded(window):  # where gradients may be elsewhere
            window.mark = mark_of(p.grad for p in window.whole.parameters())
        if window.first is not None:
            window.first.remember()

    def check(self, window: ModelWindow, *, ends: bool = False) -> None:
        """Raise TargetCountError if anything else has changed gradients that are sums still.

        ``ends``: no forward has begun since the last backward.
        """
        noted = [self._plain[model].take() for model in window.models if model in self._plain]
        wrappers = self._wrappers(window)
        if any(map(is_engine, window.models)) and any(is_noted for is_noted, _ in noted):
            raise TargetCountError(NOT_WEIGHTED)
        if window.is_final or (window.num_closed and window.first is None):
            return
        # FSDP keeps gradients elsewhere until the last micro-batch, where zero_grad does not reach them.
        if any(is_noted and (window.is_open or is_deferred) for is_noted, is_deferred in noted):
            raise TargetCountError(CHANGED)
        is_scaled = self._accelerator.scaler is not None  # and may be unscaled by now
        are_still = (ends or not wrappers) and not (self._moves_gradients or is_scaled)
        if window.is_open and window.first is not None and are_still:
            window.first.check()

    def are_gone(self, window: ModelWindow, micro_batch: MicroBatch | None) -> bool:
        """True if the gradients of an open window have been dropped.

        Gradients of 0 are gone in the micro-batch that has made them; later ones may be masked. FSDP may keep gradients
        elsewhere until the last micro-batch, and is asked only after that. Host syncs: none if nothing has touched the
        first gradient.

        Raises:
            TargetCountError: weights have changed too: they were updated by hand.
        """
        is_again = micro_batch is not None and window in micro_batch.counted
        is_sharded = self._is_sharded(window)
        if is_sharded and not window.is_reduced:
            return False
        found = grads_of([*window.parameters(), *self._shards(window)])
        gradients = [gradient for gradient in found if gradient is not None]
        # In the same micro-batch weights are changed for another loss, as SAM does.
        may_step = window.first is not None and not (window.is_final or is_again)
        has_stepped = may_step and window.first.has_stepped()
        is_touched = is_again and not (is_sharded or self._moves_gradients) and mark_of(gradients) != window.mark
        if gradients and (not (is_touched or has_stepped) or any(bool(local_tensor(g).any()) for g in gradients)):
            return False
        if has_stepped:
            raise TargetCountError(BY_HAND)
        return True

    def _shards(self, window: ModelWindow) -> list[nn.Parameter]:
        modules = [wrapper for wrapper in self._wrappers(window) if isinstance(wrapper, FSDPModule)]
        return [p for module in modules for p in fsdp2_shards(module)]

    def _is_sharded(self, window: ModelWindow) -> bool:
        return any(isinstance(wrapper, _FSDP) for wrapper in self._wrappers(window))

    def _wrappers(self, window: ModelWindow) -> list[nn.Module]:
        return [wrapper for model in window.models for _, wrapper in self._prepared.wrappers(model)]

    def end(self, window: ModelWindow) -> None:
        """Note no more backwards, when a window has ended."""
        for model in window.models:
            if model in self._plain:
                self._plain.pop(model).end()


class _PlainBackward:
    """A forward hook that notes a ``backward`` of a wrapped model's outputs that the Accelerator has not begun.

    DDP, FSDP and DeepSpeed move gradients by themselves, so that these do not show it. Noted is the first parameter
    behind each output when its gradient is added up, which ``torch.autograd.grad`` does not do.

    Args:
        model: To hook; None for a copy, which notes nothing.
        running: Which backward runs.
    """

    def __init__(self, model: nn.Module | None = None, running: Running | None = None):
        self._running = running
        self._is_noted = self._is_deferred = False
        self._handles = [] if model is None else [model.register_forward_hook(self)]

    def __reduce__(self) -> tuple[type["_PlainBackward"], tuple[()]]:
        return _PlainBackward, ()

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._running is None or not torch.is_grad_enabled():
            return
        nodes = (next(filter(adds_up_a_parameter, nodes_behind(tensor)), None) for tensor in tensors_in(outputs))
        is_deferred = not all(reduces_gradients(wrapper) for _, wrapper in find_wrappers(module))
        note = functools.partial(self._note, is_deferred)
        self._handles += [node.register_prehook(note) for node in nodes if node is not None]

    def _note(self, is_deferred: bool, gradients: Any) -> None:
        assert self._running is not None
        if not self._running.is_ours:
            self._is_noted = True
            self._is_deferred |= is_deferred

    def take(self) -> tuple[bool, bool]:
        """(one was noted since the last call, FSDP has kept its gradients elsewhere)."""
        noted = self._is_noted, self._is_deferred
        self._is_noted = self._is_deferred = False
        return noted

    def end(self) -> None:
        """Note no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
