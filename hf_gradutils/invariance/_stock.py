"""A Trainer as one process of the stock Trainer: the user's overrides without this package and without other ranks."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_gradutils.invariance._calls import calling_copy
from hf_gradutils.invariance._losses import loss_and_count, loss_of_rows
from hf_gradutils.targets.terms import is_terms

_SHARERS = ("get_tp_size", "get_cp_size", "get_sp_size")
"""Numbers of ranks that see the same rows, by which Trainer divides."""


@dataclass
class Backwards:
    """The backwards of one micro-batch."""

    by_accelerator: int = 0
    plain: int = 0
    """Called on the loss itself, past ``accelerator.backward``."""


@contextlib.contextmanager
def as_stock(
    trainer: Any, model: nn.Module, num_targets: Tensor | None = None, *, keeps_count: bool = False
) -> Iterator[Backwards]:
    """Let the trainer's steps be those of the stock Trainer with this model; the caller restores its attributes.

    ``accelerator.backward`` is a plain backward inside: several in one micro-batch add up. For ours, model and label
    smoothing return their own mean: they get no count, which Trainer takes wrongly for some heads. A
    ``WholeBatchLoss`` and terms of the user's, which the stock Trainer does not know, are computed as of the whole
    batch.

    Args:
        trainer: Ours or not.
        model: A copy for this alone.
        num_targets: For the loss function in place of Trainer's count.
        keeps_count: Model and label smoothing get Trainer's count.
    """
    smoother, loss_func = trainer.label_smoother, trainer.compute_loss_func
    accelerator, seen = trainer.accelerator, Backwards()
    calls = contextlib.ExitStack()
    calls.enter_context(calling_copy(trainer, model))
    kinds = [(trainer, type(trainer)), (accelerator, type(accelerator))]
    for name in [name for name, value in vars(trainer).items() if _is_ours(value)]:
        users = getattr(vars(trainer).pop(name), "instead_of", None)
        vars(trainer).update({} if users is None else {name: users})
    vars(trainer).update({name: lambda: 1 for name in _SHARERS if hasattr(trainer, name)})
    trainer.model = trainer.model_wrapped = model
    if not keeps_count:
        model.register_forward_pre_hook(_without_count, with_kwargs=True)
    model.register_forward_hook(_with_loss_of_its_own)
    if smoother is not None and not keeps_count:
        trainer.label_smoother = lambda *args, num_items_in_batch=None, **kwargs: smoother(*args, **kwargs)
    if num_targets is not None:
        trainer.compute_loss_func = lambda outputs, labels, **_: loss_func(
            outputs, labels, num_items_in_batch=num_targets
        )
    go_back = torch.autograd.backward
    is_inside = False

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal is_inside
        if is_inside:  # of a checkpoint, within another backward
            return go_back(*args, **kwargs)
        seen.plain, is_inside = seen.plain + 1, True
        try:
            go_back(*args, **kwargs)
        finally:
            is_inside = False

    def backward(loss: Tensor, num_targets: object = None, *, model: object = None, **kwargs: Any) -> None:
        seen.by_accelerator, seen.plain = seen.by_accelerator + 1, seen.plain - 1
        kwargs.pop("scale_wrt_gas", None)  # a Trainer's word to DeepSpeed
        loss.backward(**kwargs)  # type: ignore[no-untyped-call]

    whole_batch_loss = getattr(trainer, "whole_batch_loss", None)
    trainer.__class__, accelerator.__class__ = _without_ours(type(trainer)), Accelerator
    compute_loss = trainer.compute_loss

    def compute_one_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if whole_batch_loss is not None:
            return loss_of_rows(whole_batch_loss, model, inputs)
        result = compute_loss(model, inputs, *args, **kwargs)
        return loss_and_count(result)[0] if is_terms(result) else result

    vars(trainer)["compute_loss"] = compute_one_loss
    vars(accelerator)["backward"] = backward
    torch.autograd.backward = counted
    try:
        with calls:
            yield seen
    finally:
        torch.autograd.backward = go_back
        del vars(accelerator)["backward"]
        for one, kind in kinds:
            one.__class__ = kind


def _without_count(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}


def _with_loss_of_its_own(model: nn.Module, args: Any, outputs: Any) -> Any:
    """Copy the loss, which Trainer multiplies in place; a square root's backward needs its result as it was."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
        outputs["loss"] = outputs["loss"].clone()  # type: ignore[index]


def _without_ours(kind: type) -> type:
    """A class in whose hierarchy ``super()`` passes over the classes of this package."""

    def mro(cls: Any) -> list[type]:
        return [c for c in type.mro(cls) if c is cls or not _is_ours(c)]

    meta = type("Stock", (type(kind),), {"mro": mro})
    stock: type = meta(kind.__name__, (kind,), {"__module__": kind.__module__})
    return stock


def _is_ours(thing: Any) -> bool:
    """Whether a class or function is defined in this package; one that wraps a user's has taken over the other name."""
    code = getattr(thing, "__code__", None)
    module = thing.__globals__["__name__"] if code is not None else getattr(thing, "__module__", None)
    return callable(thing) and str(module).startswith("hf_gradutils.") and not isinstance(thing, nn.Module)
