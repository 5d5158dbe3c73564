"""The reference of a check: one process with the whole batch, in float64 where that fits."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hf_gradutils._undisturbed import in_evaluation_mode
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._report import Comparison, Difference, compare_gradients
from hf_gradutils.invariance._subjects import (
    Rows,
    Subject,
)
from hf_gradutils.invariance._whole_model import MakeModel, whole_model, whole_tensor
from hf_gradutils.sync import free_bytes
from hf_gradutils.targets.auxiliary_loss import without_auxiliary
from hf_gradutils.targets.known_heads import known_head
from hf_gradutils.targets.probe import check_additivity
from hf_gradutils.upstream.accelerate import without_accelerate_state

HOOKS = (
    "something sums what earlier micro-batches left in them again (a tensor-parallel hook on qk-norm), or holds only a "
    "part of them (experts: pass ownership={'<name pattern>': 'sharded'}); GradUtilsTrainer takes such hooks out"
)
"""Advice where the gradients of a few parameters are wrong."""


@dataclass(frozen=True)
class Measured:
    """Loss and gradient of one optimizer step."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    """Name without wrappers → this rank's part."""


@torch.no_grad()
def difference(want: Tensor, got: Tensor) -> Difference:
    """How a gradient differs. Collectives: for a DTensor, one all-reduce over its mesh for each number."""
    a, b = want.to(torch.float64), got.to(torch.float64)
    sums = [(b - a).square().sum(), a.square().sum(), (a * b).sum()]
    return Difference(*(float(whole_tensor(s)) for s in sums))


def compare_with_one_process(
    subject: Subject, rows: Rows, many: Measured, tolerance: float, make_model: MakeModel | None
) -> list[Comparison]:
    """Compare the gradient of many micro-batches with one process, and the loss with the targets counted.

    Collectives: one broadcast and one gather per parameter; every rank calls.
    """
    name = "this layout against one process"
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        whole = whole_model(subject.model, make_model=make_model)
    except InvalidArgumentError as error:
        return [Comparison(name=name, not_compared=str(error))]
    found: list[Any] = [None]
    truth: Measured | None = None
    if is_first:
        assert whole is not None
        try:
            truth, found[0] = _alone(subject, whole, rows, tolerance)
        except Exception as error:  # told to the others, who would wait
            found[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    loss, norm, targets = found[0]
    differences: dict[str, Difference] = {}
    for parameter, gradient in many.gradients.items():
        full = whole_tensor(gradient)
        if truth is not None:
            want = truth.gradients.get(parameter)
            if want is not None and want.shape == full.shape:
                differences[parameter] = difference(want.to(full.device), full)
            else:  # a part that does not say so
                differences[parameter] = Difference(1.0, 1.0, 0.0)
    told: list[Any] = [differences]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    row = compare_gradients(
        name,
        told[0],
        loss=(loss, many.loss),
        grad_norm=(norm, many.norm),
        tolerance=tolerance,
        advice=subject.advice,
        others=HOOKS,
    )
    return [row, targets]


def _alone(
    subject: Subject, whole: nn.Module, rows: Rows, tolerance: float
) -> tuple[Measured, tuple[float, float, Comparison]]:
    """Gradient and loss of one process and one batch; and whether the loss is a mean over what is counted."""
    batch = subject.batch(rows)
    with in_evaluation_mode(whole), without_auxiliary(whole), _alone_in_the_world(whole):
        counter = subject.counter(whole)
        with torch.no_grad():
            additivity = check_additivity(lambda part: subject.own_mean(whole, part), batch, counter)
        if _fits_in_float64(whole):
            try:
                loss = _backward(subject, whole.double(), _in_float64(batch))
            except RuntimeError:  # an attention kernel without float64
                whole.to(next(subject.model.parameters()).dtype)
                loss = _backward(subject, whole, batch)
        else:
            loss = _backward(subject, whole, batch)
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.named_parameters() if p.requires_grad
    }
    norm = math.sqrt(math.fsum(float(g.to(torch.float64).square().sum()) for g in gradients.values()))
    name = "targets counted against the loss"
    # Three forwards of different shapes round differently.
    limit = max(20 * tolerance, 2e-4)
    problem = ""
    if additivity.relative_error > limit:
        problem = (
            f"L(AB)·n(AB) = {additivity.whole:.7g} but L(A)·n(A) + L(B)·n(B) = {sum(additivity.parts):.7g}, so that "
            f"the loss is no mean over the {additivity.num_targets:.0f} targets counted; {subject.advice}"
        )
    unchecked = "the samples cannot be cut in two" if math.isnan(additivity.relative_error) else ""
    row = Comparison(
        name=name,
        loss=(additivity.whole, sum(additivity.parts)),
        problem=problem,
        not_compared=unchecked,
    )
    return Measured(loss, norm, gradients), (loss, norm, row)


def _backward(subject: Subject, model: nn.Module, batch: Any) -> float:
    model.zero_grad()
    loss = subject.own_mean(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@contextlib.contextmanager
def _alone_in_the_world(model: nn.Module) -> Iterator[None]:
    """Detection losses ask accelerate for other ranks, of which none takes part here."""
    with without_accelerate_state() if _counts_boxes(model) else contextlib.nullcontext():
        yield


def _counts_boxes(model: nn.Module) -> bool:
    known = known_head(model)
    return known is not None and known.loss_unit == "boxes"


def _in_float64(batch: Any) -> Any:
    return recursively_apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def _fits_in_float64(model: nn.Module) -> bool:
    """Weights and gradients, and as much again for activations."""
    needed = 2 * 16 * sum(p.numel() for p in model.parameters())
    return needed < free_bytes(next(model.parameters()).device)
