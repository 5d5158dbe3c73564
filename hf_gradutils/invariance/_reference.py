"""The reference of a check: one process with the whole batch, in float64 if that fits."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_gradutils._undisturbed import in_evaluation_mode
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._agreement import from_first_rank
from hf_gradutils.invariance._difference import Difference, relative_error
from hf_gradutils.invariance._modes import staying_in_mode, train_copy_as, trains
from hf_gradutils.invariance._subjects import Rows, Subject
from hf_gradutils.invariance._whole_model import MakeModel, whole_model, whole_tensor
from hf_gradutils.sync import free_bytes
from hf_gradutils.targets.auxiliary_loss import without_auxiliary
from hf_gradutils.upstream.accelerate import as_single_process
from hf_gradutils.upstream.deepspeed import without_configuration


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
    rounding: float = 0.0
    """Relative error of the gradient in the model's own dtype, where it was looked for."""

    @classmethod
    def of(cls, loss: float, gradients: dict[str, Tensor]) -> "Measured":
        """Take the norm of the gradients. Collectives: as :func:`difference`."""
        return cls(loss, math.sqrt(math.fsum(difference(g, g).want for g in gradients.values())), gradients)

    def differences(self, other: "Measured") -> dict[str, Difference]:
        """Name → how the other gradient differs. Collectives: as :func:`difference`."""
        return {name: difference(self.gradients[name], gradient) for name, gradient in other.gradients.items()}


def one_process(subject: Subject, rows: Rows, seed: int, make_model: MakeModel | None) -> Measured | str:
    """Loss and gradient of one process and one batch, on rank 0; the reason, on all ranks, if there is none.

    Collectives: one gather per sharded parameter, and one broadcast; every rank must call.
    """
    truth, whole, reason = Measured(math.nan, math.nan, {}), None, ""
    with without_configuration():
        try:
            whole = whole_model(subject.model, make_model=make_model)
        except InvalidArgumentError as error:
            reason = str(error)
        except Exception as error:  # of rank 0 alone, for which the others wait below
            reason = f"the whole model cannot be made on one process: {type(error).__name__}: {error}"
    with without_configuration(), _world_of_one_rank() as is_first:
        if is_first and whole is not None:
            try:
                truth = _alone(subject, whole, rows, seed)
            except Exception as error:
                reason = f"the step cannot run on one process with the whole batch: {type(error).__name__}: {error}"
    return from_first_rank(reason) or truth


def differences_from(truth: Measured, measured: Measured) -> dict[str, Difference]:
    """Name → how a gradient differs from that of one process; complete on rank 0. One gather per parameter."""
    differences = {}
    for name, gradient in measured.gradients.items():
        full, want = whole_tensor(gradient), truth.gradients.get(name)
        if want is not None and want.shape == full.shape:
            differences[name] = difference(want.to(full.device), full)
        else:  # a shard without placements
            differences[name] = Difference(1.0, 1.0, 0.0)
    return differences


@contextlib.contextmanager
def _world_of_one_rank() -> Iterator[bool]:
    """On rank 0, yield True in a world without other ranks, whose collectives are local; else False.

    Collectives: one new group; every rank must call.
    """
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None:
        with as_single_process():
            yield True
        return
    alone = dist.new_group([0])
    if dist.get_rank() != 0:
        yield False
        return
    dist.group.WORLD = alone
    try:
        with as_single_process():
            yield True
    finally:
        dist.group.WORLD = world
        dist.destroy_process_group(alone)


def _alone(subject: Subject, whole: nn.Module, rows: Rows, seed: int) -> Measured:
    def run(model: nn.Module, *, wide: bool) -> Measured:
        model.zero_grad()
        left_out = contextlib.nullcontext() if subject.keeps_auxiliary else without_auxiliary(model)
        with in_evaluation_mode(model), left_out, staying_in_mode(model):
            if trains(subject.model):
                train_copy_as(model, subject.model)
            loss = subject.alone(model, rows, seed, wide=wide)
        trained: Any = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return Measured.of(loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained})

    num_bytes = 2 * 16 * sum(p.numel() for p in whole.parameters())  # weights, gradients; as much for activations
    if num_bytes < free_bytes(next(whole.parameters()).device):
        rounds = subject.compares_rows or not subject.is_exact
        narrow = run(whole, wide=False) if rounds else None
        with contextlib.suppress(Exception):  # an attention kernel without float64, user code that names a dtype
            truth = run(whole.double(), wide=True)
            if narrow is None:
                return truth
            rounding = relative_error(truth.differences(narrow))
            # In bf16 most of the rounding is the same in each cut, so that the same arithmetic is the closer reference.
            return replace(truth if subject.is_exact else narrow, rounding=rounding)
        if narrow is not None:
            return narrow
        whole.to(next(subject.model.parameters()).dtype)
    return run(whole, wide=False)
