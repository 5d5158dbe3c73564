"""What a Trainer's loss is for one micro-batch: its own mean over its own targets, whatever the model or the user do.

The part of :class:`hf_gradutils.trainer.GradUtilsTrainerMixin` that training and evaluation share.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradutils._devices import on_device
from hf_gradutils._precision import uses_exact_arithmetic
from hf_gradutils._undisturbed import undisturbed
from hf_gradutils.accelerator import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets import trl
from hf_gradutils.targets.auxiliary_loss import _auxiliary_coefficient
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.known_heads import known_head
from hf_gradutils.targets.probe import HOW_TO_FIX
from hf_gradutils.targets.unit import settle_unit
from hf_gradutils.upstream.accelerate import without_accelerate_state

if TYPE_CHECKING:
    TrainerBase = Any  # any Trainer class
else:
    TrainerBase = object


class OwnMeanLossMixin(TrainerBase):  # type: ignore[misc]
    """``compute_loss`` returns the micro-batch's own mean, and ``_counter`` counts what it is a mean over."""

    accelerator: GradUtilsAccelerator
    grad_plugin: GradUtilsPlugin
    compute_loss_func: Any
    label_smoother: Any
    _counter: TargetCounter | None = None
    """None until :meth:`_settle_unit` has looked at a batch."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The micro-batch's own mean loss.

        Models are not told ``num_items_in_batch`` unless their forward asks for it by name: they return their
        mean then, whatever they would do with the number. Loss functions get the micro-batch's own count.
        """
        inputs = dict(inputs)
        if num_items_in_batch is not None and self._forward_names_count():
            inputs["num_items_in_batch"] = num_items_in_batch
        is_plain = self.compute_loss_func is None and self.label_smoother is None and not self._counts_boxes
        with contextlib.nullcontext() if is_plain else self._own_mean(num_items_in_batch):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=None)

    @contextlib.contextmanager
    def _own_mean(self, num_targets: Tensor | None) -> Iterator[None]:
        """Give a loss function the micro-batch's count, and label smoothing the shift of the head.

        Trainer passes both a count over the whole window and decides on the shift by the model's class name,
        which ``fully_shard`` changes.
        """
        loss_func, smoother = self.compute_loss_func, self.label_smoother
        counter = self._counter or TargetCounter()

        def own_loss_func(outputs: Any, labels: Any, num_items_in_batch: object = None) -> Tensor:
            return loss_func(outputs, labels, num_items_in_batch=num_targets)

        def own_smoother(
            outputs: Any, labels: Any, shift_labels: object = None, num_items_in_batch: object = None
        ) -> Tensor:
            return smoother(outputs, labels, shift_labels=counter.head_shifts)

        self.compute_loss_func = own_loss_func if loss_func is not None else None
        self.label_smoother = own_smoother if smoother is not None else None
        try:
            with without_accelerate_state() if self._counts_boxes else contextlib.nullcontext():
                yield
        finally:
            self.compute_loss_func, self.label_smoother = loss_func, smoother

    @property
    def _counts_boxes(self) -> bool:
        return self._counter is not None and self._counter.loss_unit == "boxes"

    def _head(self) -> nn.Module:
        """The model itself, without what is wrapped around it."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _num_data_ranks(self) -> int:
        """Ranks, or groups of ranks, that see batches of their own."""
        return self.accelerator.num_processes // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    _asked: tuple[nn.Module, bool] | None = None

    def _forward_names_count(self) -> bool:
        if self._asked is None or self._asked[0] is not self.model:  # asked in every micro-batch, and slow to find out
            self._asked = (self.model, "num_items_in_batch" in inspect.signature(type(self._head()).forward).parameters)
        return self._asked[1]

    def _count_targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Targets of one micro-batch, shape (), on this rank's device."""
        assert self._counter is not None
        return on_device(self._counter(inputs), self.args.device)

    # ---- The unit, settled on a batch ----

    def _settle_unit(self, inputs: Mapping[str, Any], *, is_split: bool) -> float:
        """Find out what the loss is a mean over; returns the mean number of targets in a rank's micro-batch.

        Args:
            inputs: This rank's first batch.
            is_split: The loss of several such batches, of several ranks too, is combined to one mean.

        Raises:
            LossUnitError: the loss is a mean over nothing that could be counted, and it is split.
            TargetCountError: the targets cannot be counted, and they are needed.
        """
        batch = self._prepare_inputs(dict(inputs))
        check = is_split and self.grad_plugin.check_loss_unit
        counter = self._initial_counter(batch, is_split=is_split, check=check)
        with undisturbed(self.model), trl.loss_only(self, with_auxiliary=False):
            settled = settle_unit(
                self._head_loss,
                self._trained_loss,
                batch,
                counter,
                check=check,
                exact_arithmetic=uses_exact_arithmetic(self.accelerator, self.model),
                smooths_labels=self.label_smoother is not None,
                num_blocks=trl.num_blocks(self),
            )
        self._counter = replace(counter, head_shifts=settled.head_shifts)
        return settled.targets_per_micro_batch

    def _initial_counter(self, batch: Mapping[str, Any], *, is_split: bool, check: bool) -> TargetCounter:
        """What the user said, or what is known of the trainer or the head."""
        counter, why_not = self.grad_plugin.counter(), ""
        if counter.is_default and trl.num_blocks(self) == 2:
            counter, why_not = TargetCounter(count=trl.count_pairs), trl.why_without_unit(self)
        elif counter.is_default and self.compute_loss_func is None and (known := known_head(self._head())) is not None:
            if known.loss_unit is not None:
                counter = TargetCounter(known.loss_unit, ignore_index=known.ignore_index)
            else:
                counter = TargetCounter("rows")
            why_not = known.reason
        if why_not and check:
            raise LossUnitError(f"the loss cannot be split exactly: {why_not}; {HOW_TO_FIX}")
        if is_split:
            return counter
        # One micro-batch on one process: its loss is the whole loss, and the count is only reported.
        try:
            return counter if counter(batch).isfinite() else TargetCounter("rows")
        except TargetCountError:
            return TargetCounter("rows")

    def _head_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of the head itself, without label smoothing around it."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(self.model, dict(batch), num_items_in_batch=torch.tensor(1))
        finally:
            self.label_smoother = smoother
        return loss

    def _trained_loss(self, batch: Mapping[str, Any], counter: TargetCounter) -> Tensor:
        """The loss that is trained, without the auxiliary term of a mixture of experts, which is no mean."""
        self._counter = counter
        num_targets = self._count_targets(batch).clamp(min=1)
        is_the_models_own = self.label_smoother is None and self.compute_loss_func is None
        coefficient = _auxiliary_coefficient(self._head()) if is_the_models_own else 0.0
        with self.compute_loss_context_manager():
            # trl's trainers add the auxiliary term themselves, and were told not to; outputs would cost a forward.
            if coefficient == 0 or trl.trl_name(self) is not None:
                loss: Tensor = self.compute_loss(self.model, dict(batch), num_items_in_batch=num_targets)
                return loss
            loss, outputs = self.compute_loss(
                self.model, dict(batch), return_outputs=True, num_items_in_batch=num_targets
            )
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        return loss - coefficient * auxiliary if isinstance(auxiliary, Tensor) else loss
