"""The loss of one micro-batch: its own mean over its own targets, for every model and loss function.

:class:`LossUnit` also finds out, on the first batch, which targets these are.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils._devices import on_device
from hf_gradutils._precision import uses_exact_arithmetic
from hf_gradutils._undisturbed import undisturbed
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets import trl
from hf_gradutils.targets.auxiliary_loss import auxiliary_coefficient
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.known_heads import known_head
from hf_gradutils.targets.probe import HOW_TO_FIX
from hf_gradutils.targets.unit import settle_unit
from hf_gradutils.upstream.accelerate import without_accelerate_state


class LossUnit:
    """The targets that a Trainer's loss is a mean over."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._forward: tuple[nn.Module, bool] | None = None
        self.counter: TargetCounter | None = None
        """None until the first batch has been seen."""

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        """Targets of one micro-batch, shape (), on this rank's device."""
        assert self.counter is not None
        return on_device(self.counter(inputs), self._trainer.args.device)

    @property
    def head(self) -> nn.Module:
        """The model without wrappers."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def forward_takes_count(self) -> bool:
        """True if the model's forward names ``num_items_in_batch``; cached per model."""
        model = self._trainer.model
        if self._forward is None or self._forward[0] is not model:
            names = inspect.signature(type(self.head).forward).parameters
            self._forward = (model, "num_items_in_batch" in names)
        return self._forward[1]

    @contextlib.contextmanager
    def own_mean(self, num_targets: Tensor | None) -> Iterator[None]:
        """Give a loss function the micro-batch's own count, and label smoothing the shift of the head.

        Trainer passes a count over the whole window, and chooses the shift by the model's class name, which
        ``fully_shard`` changes.
        """
        trainer, counter = self._trainer, self.counter or TargetCounter()
        counts_boxes = counter.loss_unit == "boxes"
        loss_func, smoother = trainer.compute_loss_func, trainer.label_smoother
        if loss_func is None and smoother is None and not counts_boxes:
            yield
            return

        if loss_func is not None:
            trainer.compute_loss_func = lambda outputs, labels, *_, **__: loss_func(
                outputs, labels, num_items_in_batch=num_targets
            )
        if smoother is not None:
            trainer.label_smoother = lambda outputs, labels, *_, **__: smoother(
                outputs, labels, shift_labels=counter.head_shifts
            )
        try:
            with without_accelerate_state() if counts_boxes else contextlib.nullcontext():
                yield
        finally:
            trainer.compute_loss_func, trainer.label_smoother = loss_func, smoother

    def settle_once(self, inputs: Mapping[str, Any]) -> None:
        """:meth:`settle` on a batch of the evaluation, if it is the first."""
        if self.counter is None:
            self.settle(inputs, is_split=False)

    def settle(self, inputs: Mapping[str, Any], *, is_split: bool) -> float:
        """Find the unit of the loss; returns the mean number of targets in a rank's micro-batch.

        Args:
            inputs: This rank's first batch.
            is_split: The losses of several micro-batches or ranks are combined to one mean.

        Raises:
            LossUnitError: the loss is not a mean over countable targets, and it is split.
            TargetCountError: the targets cannot be counted, and they are needed.
        """
        trainer = self._trainer
        batch = trainer._prepare_inputs(dict(inputs))
        check = is_split and trainer.grad_plugin.check_loss_unit
        counter = self._initial_counter(batch, is_split=is_split, check=check)
        with undisturbed(trainer.model), trl.loss_only(trainer, with_auxiliary=False):
            settled = settle_unit(
                self._head_loss,
                self._trained_loss,
                batch,
                counter,
                check=check,
                exact_arithmetic=uses_exact_arithmetic(trainer.accelerator, trainer.model),
                smooths_labels=trainer.label_smoother is not None,
                num_blocks=trl.num_blocks(trainer),
            )
        self.counter = replace(counter, head_shifts=settled.head_shifts)
        return settled.targets_per_micro_batch

    def _initial_counter(self, batch: Mapping[str, Any], *, is_split: bool, check: bool) -> TargetCounter:
        """The counter from the user, or from the tables of trainers and heads."""
        trainer = self._trainer
        counter, why_not = trainer.grad_plugin.counter(), ""
        if counter.is_default and trl.num_blocks(trainer) == 2:
            counter, why_not = TargetCounter(count=trl.count_pairs), trl.why_without_unit(trainer)
        elif counter.is_default and trainer.compute_loss_func is None and (head := known_head(self.head)) is not None:
            if head.loss_unit is not None:
                counter = TargetCounter(head.loss_unit, ignore_index=head.ignore_index)
            else:
                counter = TargetCounter("rows")
            why_not = head.reason
        if why_not and check:
            raise LossUnitError(f"the loss cannot be split exactly: {why_not}; {HOW_TO_FIX}")
        if is_split:
            return counter
        # One micro-batch on one process is the whole batch; the count is only reported.
        try:
            return counter if counter(batch).isfinite() else TargetCounter("rows")
        except TargetCountError:
            return TargetCounter("rows")

    def _head_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of the head itself, without label smoothing around it."""
        trainer = self._trainer
        smoother, trainer.label_smoother = trainer.label_smoother, None
        try:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        finally:
            trainer.label_smoother = smoother

    def _trained_loss(self, batch: Mapping[str, Any], counter: TargetCounter) -> Tensor:
        """The loss that is trained, without the auxiliary term of a mixture of experts, which is no mean."""
        trainer = self._trainer
        self.counter = counter
        num_targets = self.count(batch).clamp(min=1)
        is_the_models_own = trainer.label_smoother is None and trainer.compute_loss_func is None
        coefficient = auxiliary_coefficient(self.head) if is_the_models_own else 0.0
        # trl's trainers add the auxiliary term themselves, which is off here; outputs would cost them a forward.
        has_auxiliary = bool(coefficient) and trl.trl_name(trainer) is None
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(
                trainer.model, dict(batch), return_outputs=has_auxiliary, num_items_in_batch=num_targets
            )
        if not has_auxiliary:
            return loss
        loss, outputs = loss
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        return loss - coefficient * auxiliary if isinstance(auxiliary, Tensor) else loss
