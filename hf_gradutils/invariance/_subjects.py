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
from hf_gradutils.accelerator import GradUtilsAccelerator, WholeBatchLoss
from hf_gradutils.invariance._advice import advice_for_loop, advice_for_torch, advice_if_few_of_loop
from hf_gradutils.invariance._as_before import accelerator_untouched, model_untouched, seed_all
from hf_gradutils.invariance._deepspeed import dry_step_of
from hf_gradutils.invariance._losses import LossAndTargets, loss_and_count, loss_of_batch
from hf_gradutils.invariance._modes import Modes, modes_of_loop
from hf_gradutils.invariance._rows import drawn_rows
from hf_gradutils.sync import discard_deferred
from hf_gradutils.targets.terms import is_terms
from hf_gradutils.upstream.accelerate import optimizers_of

Rows: TypeAlias = list[Any]
RunWindow: TypeAlias = Callable[[list[Any]], Tensor | float]
"""This rank's micro-batches → the window's loss; leaves the gradient of the optimizer step in ``.grad``.

DeepSpeed's engine keeps it elsewhere: there the function calls ``engine.step``, which takes no step in a check.
"""


class Subject(Protocol):
    """A training that turns micro-batches into a gradient."""

    model: nn.Module
    """Wrapped and sharded, ready to train."""
    num_ranks: int
    num_data_ranks: int
    data_rank: int
    is_exact: bool
    """float32 or better, without autocast or TF32."""
    accumulation: int
    """Micro-batches of each rank in a step of the training."""
    is_split: bool
    """Steps have several micro-batches."""
    setting: str
    """A prefix for the row of so many micro-batches."""
    every_cut_decides: bool
    """Every cut of the batch is claimed to give the same gradient, not only the training's own."""
    fix: str
    """What makes the training exact, in one line; empty if it claims to be."""
    training_modes: Modes
    """Of all modules, as they are in the training."""
    keeps_auxiliary: bool
    """The auxiliary loss of a mixture of experts is to be that of the whole batch."""

    @property
    def compares_rows(self) -> bool:
        """The loss is one of the whole batch, in which large similarities amplify rounding."""

    @property
    def has_two_passes(self) -> bool:
        """The latest :meth:`run` has compared a first pass with a second one."""

    def rows(self, num_rows: int) -> Rows:
        """Samples of the dataset, or fewer if it has fewer; the same on all ranks. Some collectives."""

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

    def advice_if_few_are_wrong(self) -> str:
        """The fix if the gradients of a few parameters are wrong; empty if this loss has no special one."""

    def cause(self, scale: float, num_parts: int) -> str:
        """Why the gradient of so many micro-batches on each rank is wrong, in a few words; empty if unknown.

        ``scale``: the multiple of the right gradient that is next to it.
        """

    def as_it_was(self) -> contextlib.AbstractContextManager[None]:
        """The context of a check; restores everything."""


@dataclass
class _Loop:
    model: nn.Module
    all_rows: Sequence[Any]
    collate: Callable[[Rows], Any]
    loss_and_targets: LossAndTargets | WholeBatchLoss

    is_split = every_cut_decides = True
    keeps_auxiliary = False
    accumulation = 1
    fix = setting = ""

    @property
    def compares_rows(self) -> bool:
        return isinstance(self.loss_and_targets, WholeBatchLoss)

    @property
    def has_two_passes(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def rows(self, num_rows: int) -> Rows:
        return drawn_rows(self.all_rows, num_rows, seed=0)

    def batch(self, rows: Rows) -> Any:
        return send_to_device(self.collate(rows), self.device)

    def alone(self, model: nn.Module, rows: Rows, seed: int, *, wide: bool) -> float:
        batch = self.batch(rows)
        seed_all(seed)
        loss = loss_of_batch(self.loss_and_targets, model, in_float64(batch) if wide else batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def advice_if_few_are_wrong(self) -> str:
        return advice_if_few_of_loop(self.loss_and_targets)

    def cause(self, scale: float, num_parts: int) -> str:
        return ""


@dataclass
class AcceleratorLoop(_Loop):
    """A loop with an Accelerator, ours or accelerate's."""

    accelerator: Accelerator

    def __post_init__(self) -> None:
        accelerator, self.training_modes = self.accelerator, modes_of_loop(self.model)
        self.num_ranks = accelerator.num_processes
        self.accumulation = int(accelerator.gradient_accumulation_steps)
        self.is_exact = uses_exact_arithmetic(accelerator, self.model)
        config = accelerator.parallelism_config
        num_sharers = 1 if config is None else config.tp_size * config.cp_size * getattr(config, "sp_size", 1)
        self.num_data_ranks = self.num_ranks // num_sharers
        self.data_rank = accelerator.process_index // num_sharers
        self._has_terms: bool | None = None

    @property
    def has_two_passes(self) -> bool:
        return self.compares_rows and isinstance(self.accelerator, GradUtilsAccelerator)

    def advice(self, factor: float | None) -> str:
        is_ours = isinstance(self.accelerator, GradUtilsAccelerator)
        return advice_for_loop(self.loss_and_targets, has_terms=bool(self._has_terms), is_ours=is_ours)

    def run(self, parts: Sequence[Rows], seed: int) -> float:
        accelerator, model = self.accelerator, self.model
        discard_deferred(model)
        if isinstance(accelerator, GradUtilsAccelerator):
            accelerator.windows.forget()
        accelerator.gradient_accumulation_steps = len(parts)
        if step := dry_step_of(model):
            step.start_window(len(parts))
        if isinstance(self.loss_and_targets, WholeBatchLoss) and isinstance(accelerator, GradUtilsAccelerator):
            seed_all(seed)
            accelerator.backward_whole_batch(self.loss_and_targets, list(map(self.batch, parts)), model=model)
            return self._close()
        if step or self._find_terms(parts[0], seed):
            self._start_window(parts, seed)
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            accelerator.sync_gradients = is_last
            batch = self.batch(part)
            seed_all(seed)
            with self._sync_context(is_last):
                if isinstance(self.loss_and_targets, WholeBatchLoss):
                    whole = accelerator.unwrap_model(model)
                    loss = self.loss_and_targets.of_rows(*self.loss_and_targets.rows_of(model, batch, whole))
                    accelerator.backward(loss)
                else:
                    loss = self._go_back(self.loss_and_targets(model, batch))
            total += loss.detach() / len(parts)
        return self._close() if isinstance(accelerator, GradUtilsAccelerator) else mean_over_ranks(total)

    def _go_back(self, result: Any) -> Tensor:
        """Run the backward of what ``loss_and_targets`` returned; returns the loss."""
        accelerator, (loss, num_targets) = self.accelerator, loss_and_count(result)
        if not isinstance(accelerator, GradUtilsAccelerator):
            accelerator.backward(loss)
        elif is_terms(result):
            accelerator.backward(result, model=self.model)
        else:
            accelerator.backward(loss, num_targets=num_targets, model=self.model)
        return loss

    def _close(self) -> float:
        accelerator: Any = self.accelerator
        accelerator.windows.close(accelerator.windows.of_loss(self.model), step=1)  # unclipped, as the engine is now
        return finish_step(accelerator, self.model)

    def _find_terms(self, part: Rows, seed: int) -> bool:
        """True if the loss has several terms, whose targets have to be known first. One forward in a check."""
        if self._has_terms is None and not isinstance(self.loss_and_targets, WholeBatchLoss):
            batch = self.batch(part)
            seed_all(seed)
            with torch.no_grad():
                self._has_terms = is_terms(self.loss_and_targets(self.model, batch))
        return bool(self._has_terms)

    def _start_window(self, parts: Sequence[Rows], seed: int) -> None:
        """Say how many targets there are, which DeepSpeed's engine and several terms have to know first."""
        if not isinstance(self.accelerator, GradUtilsAccelerator) or isinstance(self.loss_and_targets, WholeBatchLoss):
            return
        num_targets: Any = 0
        with torch.no_grad():
            for part in parts:
                batch = self.batch(part)
                seed_all(seed)
                num_targets = num_targets + loss_and_count(self.loss_and_targets(self.model, batch))[1]
        of_terms = isinstance(num_targets, Tensor) and num_targets.dim() > 0
        self.accelerator.start_window(list(num_targets) if of_terms else num_targets, model=self.model)

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
        self.training_modes = modes_of_loop(self.model)
        self.num_ranks = self.num_data_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.data_rank = dist.get_rank() if dist.is_initialized() else 0
        self.is_exact = is_exact_in_itself(self.model, self.device)

    def advice(self, factor: float | None) -> str:
        return advice_for_torch(self.loss_and_targets)

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
