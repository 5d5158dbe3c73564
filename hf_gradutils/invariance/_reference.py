"""The reference of a check: one process with the whole batch, in float64 if that fits."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hf_gradutils._undisturbed import in_evaluation_mode
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._report import Comparison, Difference, compare_gradients
from hf_gradutils.invariance._subjects import Rows, Subject
from hf_gradutils.invariance._whole_model import MakeModel, whole_model, whole_tensor
from hf_gradutils.sync import free_bytes
from hf_gradutils.targets.auxiliary_loss import without_auxiliary
from hf_gradutils.targets.known_heads import known_head
from hf_gradutils.targets.probe import check_additivity
from hf_gradutils.upstream.accelerate import without_accelerate_state

T = TypeVar("T")


@torch.no_grad()
def difference(want: Tensor, got: Tensor) -> Difference:
    """The difference of two gradients. Collectives: for a DTensor, one all-reduce over its mesh for each number."""
    a, b = want.to(torch.float64), got.to(torch.float64)
    sums = [(b - a).square().sum(), a.square().sum(), (a * b).sum()]
    return Difference(*(float(whole_tensor(s)) for s in sums))


@dataclass(frozen=True)
class Measured:
    """Loss and gradient of one optimizer step."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    """Name without wrappers → this rank's part."""

    @classmethod
    def of(cls, loss: float, gradients: dict[str, Tensor]) -> "Measured":
        """Take the norm of the gradients. Collectives: as :func:`difference`."""
        return cls(loss, math.sqrt(math.fsum(difference(g, g).want for g in gradients.values())), gradients)


def compare_with_one_process(
    subject: Subject, rows: Rows, many: Measured, tolerance: float, make_model: MakeModel | None
) -> list[Comparison]:
    """Compare the gradient of many micro-batches with one process, and the loss with the targets counted.

    Collectives: one broadcast and one gather per parameter; every rank must call.
    """
    name = "this layout against one process"
    try:
        whole = whole_model(subject.model, make_model=make_model)
    except InvalidArgumentError as error:
        return [Comparison(name=name, not_compared=str(error))]
    truth: Measured | None = None
    outcome: tuple[float, float, Comparison] | Exception | None = None
    if whole is not None:
        try:
            truth, targets = _alone(subject, whole, rows, tolerance)
            outcome = truth.loss, truth.norm, targets
        except Exception as error:  # raised on all ranks, which wait for the outcome
            outcome = error
    outcome = _from_first_rank(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    loss, norm, targets = outcome
    differences: dict[str, Difference] = {}
    for parameter, gradient in many.gradients.items():
        full = whole_tensor(gradient)
        if truth is not None:
            want = truth.gradients.get(parameter)
            if want is not None and want.shape == full.shape:
                differences[parameter] = difference(want.to(full.device), full)
            else:  # a shard without placements
                differences[parameter] = Difference(1.0, 1.0, 0.0)
    layout = compare_gradients(
        name,
        _from_first_rank(differences),
        loss=(loss, many.loss),
        grad_norm=(norm, many.norm),
        tolerance=tolerance,
        advice=subject.advice,
    )
    return [layout, targets]


def _from_first_rank(value: T) -> T:
    """The value of rank 0. Collectives: one broadcast of objects."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _alone(subject: Subject, whole: nn.Module, rows: Rows, tolerance: float) -> tuple[Measured, Comparison]:
    """Gradient and loss of one process and one batch, and the comparison of the loss with the targets counted."""
    batch = subject.batch(rows)
    head = known_head(whole)
    # Detection losses average their boxes over accelerate's ranks, of which none takes part here.
    without_ranks = head is not None and head.loss_unit == "boxes"
    with (
        in_evaluation_mode(whole),
        without_auxiliary(whole),
        without_accelerate_state() if without_ranks else contextlib.nullcontext(),
    ):
        counter = subject.counter(whole)
        with torch.no_grad():
            additivity = check_additivity(lambda part: subject.own_mean(whole, part), batch, counter)
        num_bytes = 2 * 16 * sum(p.numel() for p in whole.parameters())  # weights, gradients; as much for activations
        if num_bytes < free_bytes(next(whole.parameters()).device):
            try:
                wide = recursively_apply(lambda t: t.double() if t.is_floating_point() else t, batch)
                loss = _backward(subject, whole.double(), wide)
            except RuntimeError:  # an attention kernel without float64
                loss = _backward(subject, whole.to(next(subject.model.parameters()).dtype), batch)
        else:
            loss = _backward(subject, whole, batch)
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.named_parameters() if p.requires_grad
    }
    problem = ""
    if additivity.relative_error > max(20 * tolerance, 2e-4):  # three forwards of different shapes round differently
        problem = (
            f"L(AB)·n(AB) = {additivity.whole:.7g} but L(A)·n(A) + L(B)·n(B) = {sum(additivity.parts):.7g}, so that "
            f"the loss is no mean over the {additivity.num_targets:.0f} targets counted; {subject.advice}"
        )
    targets = Comparison(
        name="targets counted against the loss",
        loss=(additivity.whole, sum(additivity.parts)),
        problem=problem,
        not_compared="the samples cannot be cut in two" if math.isnan(additivity.relative_error) else "",
    )
    return Measured.of(loss, gradients), targets


def _backward(subject: Subject, model: nn.Module, batch: Any) -> float:
    model.zero_grad()
    loss = subject.own_mean(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())
