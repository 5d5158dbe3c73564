"""The subjects of a check of invariance: loops with an Accelerator, ours or not, and loops of plain torch."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils._devices import device_of
from hf_gradutils._precision import is_exact_in_itself, uses_exact_arithmetic
from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._as_before import accelerator_untouched, model_untouched, seed_all
from hf_gradutils.invariance._deepspeed import dry_step_of
from hf_gradutils.sync import discard_deferred
from hf_gradutils.upstream.accelerate import optimizers_of

Rows: TypeAlias = list[Any]
RunWindow: TypeAlias = Callable[[list[Any]], Tensor | float]
"""This rank's micro-batches → the window's loss; leaves the gradient of the optimizer step in ``.grad``.

DeepSpeed's engine keeps it elsewhere: there the function calls ``engine.step``, which takes no step in a check.
"""
LossAndTargets: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Tensor | int]]
"""(model, batch) → its own mean loss, and its number of targets."""


class Subject(Protocol):
    """A training that turns micro-batches into a gradient."""

    model: nn.Module
    """Wrapped and sharded, ready to train."""
    num_ranks: int
    num_data_ranks: int
    data_rank: int
    is_exact: bool
    """float32 or better, without autocast or TF32."""

    def rows(self, num_rows: int) -> Rows:
        """The first samples of the dataset, the same on all ranks."""

    def run(self, parts: Sequence[Rows], seed: int) -> float:
        """Leave the gradient of a step with these micro-batches of this rank in ``.grad``; returns the logged loss.

        Random numbers are those of ``seed`` in every micro-batch, as far as the subject runs them itself.
        """

    def alone(self, model: nn.Module, rows: Rows, seed: int, *, wide: bool) -> float:
        """The same with one process, all rows as one micro-batch and this model, without wrappers and other ranks.

        ``wide``: the model is in float64.
        """

    def advice(self, factor: float | None) -> str:
        """The fix if gradients are wrong, which are ``factor`` times what they should be, or no multiple.

        Of the rank that has run :meth:`alone`.
        """

    def as_it_was(self) -> contextlib.AbstractContextManager[None]:
        """The context of a check; restores everything."""


@dataclass
class _Loop:
    model: nn.Module
    all_rows: Sequence[Any]
    collate: Callable[[Rows], Any]
    loss_and_targets: LossAndTargets

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def rows(self, num_rows: int) -> Rows:
        if len(self.all_rows) < num_rows:
            raise InvalidArgumentError(f"{num_rows} rows are needed, got {len(self.all_rows)}; lower num_samples")
        return [self.all_rows[index] for index in range(num_rows)]

    def batch(self, rows: Rows) -> Any:
        return send_to_device(self.collate(rows), self.device)

    def alone(self, model: nn.Module, rows: Rows, seed: int, *, wide: bool) -> float:
        batch = self.batch(rows)
        seed_all(seed)
        loss = self.loss_and_targets(model, in_float64(batch) if wide else batch)[0]
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


@dataclass
class AcceleratorLoop(_Loop):
    """A loop with an Accelerator, ours or accelerate's."""

    accelerator: Accelerator

    def __post_init__(self) -> None:
        accelerator = self.accelerator
        self.num_ranks = accelerator.num_processes
        self.is_exact = uses_exact_arithmetic(accelerator, self.model)
        config = accelerator.parallelism_config
        num_sharers = 1 if config is None else config.tp_size * config.cp_size * getattr(config, "sp_size", 1)
        self.num_data_ranks = self.num_ranks // num_sharers
        self.data_rank = accelerator.process_index // num_sharers

    def advice(self, factor: float | None) -> str:
        if isinstance(self.accelerator, GradUtilsAccelerator):
            return "num_targets is not the number of targets that the loss is a mean over"
        return (
            "accelerate's Accelerator does not weight micro-batches by their targets; use "
            "hf_gradutils.GradUtilsAccelerator and backward(loss, num_targets=…)"
        )

    def run(self, parts: Sequence[Rows], seed: int) -> float:
        accelerator, model = self.accelerator, self.model
        discard_deferred(model)
        if isinstance(accelerator, GradUtilsAccelerator):
            accelerator.windows.forget()
        accelerator.gradient_accumulation_steps = len(parts)
        if step := dry_step_of(model):
            step.start_window(len(parts))
            self._start_window(parts, seed)
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            accelerator.sync_gradients = is_last
            batch = self.batch(part)
            seed_all(seed)
            with self._sync_context(is_last):
                loss, num_targets = self.loss_and_targets(model, batch)
                if isinstance(accelerator, GradUtilsAccelerator):
                    accelerator.backward(loss, num_targets=num_targets, model=model)
                else:
                    accelerator.backward(loss)
            total += loss.detach() / len(parts)
        if isinstance(accelerator, GradUtilsAccelerator):
            accelerator.windows.close(accelerator.windows.of_loss(model), step=1)  # unclipped, as the engine is now
            return finish_step(accelerator, model)
        return mean_over_ranks(total)

    def _start_window(self, parts: Sequence[Rows], seed: int) -> None:
        """Say how many targets there are, which DeepSpeed's engine has to know first."""
        if not isinstance(self.accelerator, GradUtilsAccelerator):
            return
        num_targets: Any = 0
        with torch.no_grad():
            for part in parts:
                batch = self.batch(part)
                seed_all(seed)
                num_targets = num_targets + self.loss_and_targets(self.model, batch)[1]
        self.accelerator.start_window(num_targets, model=self.model)

    def _sync_context(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if not is_last:
            return self.accelerator.no_sync(self.model)  # type: ignore[no-any-return]
        if isinstance(self.accelerator, GradUtilsAccelerator):
            return self.accelerator.windows.sync_context(self.model, is_last=True)
        return contextlib.nullcontext()

    def as_it_was(self) -> contextlib.AbstractContextManager[None]:
        return accelerator_untouched(self.accelerator, self.model)


@dataclass
class TorchLoop(_Loop):
    """A loop of plain torch, with data parallelism of any kind or one process."""

    run_window: RunWindow

    def __post_init__(self) -> None:
        self.num_ranks = self.num_data_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.data_rank = dist.get_rank() if dist.is_initialized() else 0
        self.is_exact = is_exact_in_itself(self.model, self.device)

    def advice(self, factor: float | None) -> str:
        return "divide gradients at the window's end by the targets that the losses are means over"

    def run(self, parts: Sequence[Rows], seed: int) -> float:
        discard_deferred(self.model)
        if step := dry_step_of(self.model):
            step.start_window(len(parts))
        seed_all(seed)
        return float(self.run_window([self.batch(part) for part in parts]))

    def as_it_was(self) -> contextlib.AbstractContextManager[None]:
        return model_untouched(self.model)


def finish_step(accelerator: GradUtilsAccelerator, model: nn.Module) -> float:
    """Scale gradients as a fused optimizer would have in its step; returns the loss."""
    report = accelerator.report
    assert report is not None
    for optimizer in optimizers_of(accelerator) if accelerator.windows.engine is None else []:
        order, optimizer.order = optimizer.order, None
        if order is not None and order.divisor is not None:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(report.multiplier.to(p.grad.dtype))
            break
    return float(report.loss)


def in_float64(batch: Any) -> Any:
    """The batch with its floating-point tensors in float64; an object of another type as it is."""
    return recursively_apply(lambda t: t.double() if t.is_floating_point() else t, batch)


def mean_over_ranks(loss: Tensor) -> float:
    domain = world_domain()
    return add_up(domain, loss.device, loss=float(loss))["loss"] / domain.num_ranks


def describe(subject: Subject, num_rows: int) -> str:
    """The layout, the samples and the arithmetic."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in subject.model.parameters()})
    rounds = "" if subject.is_exact else ", rounded arithmetic"
    ranks = "1 rank"
    if subject.num_ranks > 1:
        ranks = f"{subject.num_ranks} ranks, {subject.num_data_ranks} of them with data of their own"
    return f"{num_rows} samples, {ranks}, {type(subject.model).__name__}, {'/'.join(kinds)}{rounds}"
