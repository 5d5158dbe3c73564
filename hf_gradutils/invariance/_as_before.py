"""What a check puts back: the model, the Accelerator, random states, and what user code has counted and collected."""

import contextlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_gradutils._undisturbed import in_evaluation_mode
from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.invariance._deepspeed import steps_are_dry
from hf_gradutils.invariance._modes import staying_in_mode
from hf_gradutils.sync import discard_deferred
from hf_gradutils.targets.auxiliary_loss import without_auxiliary
from hf_gradutils.upstream.accelerate import models_of, optimizers_of
from hf_gradutils.upstream.torch import has_users_hook_after_accumulation

_FEW = 100
"""Elements up to which a container's own containers and tensors are put back too; a dataset has more."""
_SMALL = 2**20
"""Elements up to which tensors outside the model are put back."""
_SIMPLE = (bool, int, float, complex, str, tuple, type(None), list, dict, set, deque)


def seed_all(seed: int) -> None:
    """Seed torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@contextlib.contextmanager
def attributes_kept(*objects: Any) -> Iterator[None]:
    """Attributes are as before afterwards, with the contents of lists, dicts, sets and small tensors."""
    put_back = [_memory(vars(one)) for one in objects]
    try:
        yield
    finally:
        for memory in put_back:
            memory()


@contextlib.contextmanager
def gradients_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradients at first; afterwards those that were there."""
    before = [(p, p.grad) for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in before:
            p.grad = gradient


def _memory(value: Any, depth: int = 5) -> Callable[[], Any]:
    """A function that gives a container or tensor the contents it has now, and returns it."""
    if isinstance(value, Tensor) and not value.requires_grad and value.numel() <= _SMALL:
        content = value.clone()
        return lambda: value.copy_(content)
    if not isinstance(value, list | dict | set | deque) or not depth:
        return lambda: value

    def memory(item: Any) -> Callable[[], Any]:
        return _memory(item, depth - 1) if len(value) <= _FEW else lambda: item

    if isinstance(value, dict):
        entries = [(key, memory(item)) for key, item in value.items()]

        def refill() -> Any:
            value.clear()
            for key, item in entries:
                value[key] = item()
            return value

        return refill
    items = [memory(item) for item in value]

    def fill() -> Any:
        value.clear()
        add = value.add if isinstance(value, set) else value.append
        for item in items:
            add(item())
        return value

    return fill


@contextlib.contextmanager
def model_untouched(model: nn.Module, *, keeps_auxiliary: bool = False) -> Iterator[None]:
    """Evaluation mode at first; gradients, buffers, plain attributes, modes and random states are as before afterwards.

    So are weights that a user's hook may change as soon as a gradient is there. No auxiliary loss either, unless it is
    kept.
    """
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    gradients = [(p, p.grad) for p in model.parameters()]
    kept = [*model.buffers(), *(p for p, _ in gradients if has_users_hook_after_accumulation(p))]
    values = [(tensor, tensor.detach().clone()) for tensor in kept]
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    for p, _ in gradients:
        p.grad = None
    try:
        with (
            plain_attributes_kept(inside),
            in_evaluation_mode(model),
            contextlib.nullcontext() if keeps_auxiliary else without_auxiliary(model),
            staying_in_mode(model),
            staying_in_mode(inside),
            steps_are_dry(model),
        ):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        discard_deferred(model)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for p, gradient in gradients:
            p.grad = gradient


@contextlib.contextmanager
def accelerator_untouched(
    accelerator: Accelerator, model: nn.Module, *, keeps_auxiliary: bool = False
) -> Iterator[None]:
    """:func:`model_untouched`; the Accelerator is as before afterwards too."""
    before = accelerator.sync_gradients, accelerator.gradient_accumulation_steps, accelerator.step
    windows = accelerator.windows if isinstance(accelerator, GradUtilsAccelerator) else None
    kept = None if windows is None else (windows.by_models, windows.report)
    orders = [(optimizer, optimizer.order) for optimizer in optimizers_of(accelerator) if hasattr(optimizer, "order")]
    engines = [] if windows is None or windows.engine is None else [windows.engine]
    with model_untouched(model, keeps_auxiliary=keeps_auxiliary), attributes_kept(*engines):
        try:
            yield
        finally:
            accelerator.sync_gradients, accelerator.gradient_accumulation_steps, accelerator.step = before
            if windows is not None and kept is not None:
                windows.forget()
                windows.by_models, windows.report = kept
                windows.outside.watch(models_of(accelerator))
            for optimizer, order in orders:
                optimizer.order = order


@contextlib.contextmanager
def plain_attributes_kept(model: nn.Module) -> Iterator[None]:
    """What forwards count and collect in public attributes of modules is as before afterwards."""

    def plain(module: nn.Module) -> dict[str, Any]:
        return {name: x for name, x in vars(module).items() if name[0] != "_" and isinstance(x, _SIMPLE)}

    memories = [(module, _memory(plain(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, memory in memories:
            before = memory()
            for name in plain(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
