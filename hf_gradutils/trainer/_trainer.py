"""A drop-in for ``transformers.Trainer`` with the gradient of one device and the whole batch.

The order in which transformers calls the overrides:

    train → set_initial_training_values
        each window:       get_batch_samples → its micro-batches, drawn one by one or, with counts first, at once
        each micro-batch:  training_step → _prepare_inputs → compute_loss → accelerator.backward
        window's end:      _clip_grad_norm (if it clips) → _get_grad_norm → optimizer.step → log
    evaluate → evaluation_loop
        each batch:        prediction_step → _prepare_inputs → compute_loss

``OptimizerSteps.in_micro_batch`` makes the :class:`MicroBatch` around ``training_step``, a user's or ours. Its targets
are counted in ``_prepare_inputs``, because context parallelism has just cut the sequence to this rank's part, or
later if a user's step prepares nothing; ``backward`` reads the record.
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_gradutils.accelerator import GradUtilsPlugin, WholeBatchLoss
from hf_gradutils.coordination.route import route_first_rank
from hf_gradutils.gradients.partial_sums import sum_increments
from hf_gradutils.invariance import CheckBeforeTraining
from hf_gradutils.sync import discard_deferred
from hf_gradutils.trainer._batches import MicroBatches, TrainingBatches
from hf_gradutils.trainer._bookkeeping import Operations, without_rows
from hf_gradutils.trainer._evaluation import EvaluationLoss
from hf_gradutils.trainer._log import nan_filter
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.trainer._overrides import is_transformers, wrapping_overrides
from hf_gradutils.trainer._own_loops import refusing_loops
from hf_gradutils.trainer._setup import adopt_accelerator, check_nothing_reads_gradients, check_setup
from hf_gradutils.trainer._special_shares import predict_rows, users_loss
from hf_gradutils.trainer._steps import OptimizerSteps

if TYPE_CHECKING:
    TrainerBase = Any  # any Trainer class
else:
    TrainerBase = object

_HELPERS = ("_unit", "_evaluation", "_batches", "_steps", "_operations")
"""Attributes that belong to one training and hold the Trainer weakly; a copy has its own."""


class GradUtilsTrainerMixin(TrainerBase):  # type: ignore[misc]
    """Makes a Trainer exact; goes in front of the Trainer class.

    Args:
        grad_plugin: Settings.
        check_invariance: Prove at the start of every ``train`` that the gradient does not depend on how the batch is
            cut up and spread, as :func:`hf_gradutils.check_invariance` does, and stop if it does.
        whole_batch_loss: A loss that compares all rows of the batch, and what it is computed from; takes the place of
            the model's.
        *args: As the Trainer class takes them.
        **kwargs: As the Trainer class takes them.

    Raises:
        InvalidArgumentError: a negative ``max_grad_norm``, one process for several GPUs, a trainer of
            trl that weights or batches by itself, or settings of the plugin that ``TrainingArguments`` has too.
    """

    default_plugin: GradUtilsPlugin | None = None  # of Trainers that are given none

    def __init__(
        self,
        *args: Any,
        grad_plugin: GradUtilsPlugin | None = None,
        check_invariance: bool = False,
        whole_batch_loss: WholeBatchLoss | None = None,
        **kwargs: Any,
    ):
        self._checks_invariance, self.whole_batch_loss = check_invariance, whole_batch_loss
        self.grad_plugin = grad_plugin or self.default_plugin or GradUtilsPlugin()
        self._start_over()
        with route_first_rank():  # some Trainers prepare their data here
            super().__init__(*args, **kwargs)
        adopt_accelerator(self)
        check_setup(self)

    def _start_over(self) -> None:
        """Forget the unit of the loss, batches and steps: for a new Trainer, and for checks."""
        itself = weakref.proxy(self)  # these would keep it, and its model, until a garbage collection
        self._unit = LossUnit(itself)
        self._evaluation = EvaluationLoss(itself, self._unit)
        self._batches = TrainingBatches(itself)
        self._start_steps()

    def _start_steps(self) -> None:
        """Forget the optimizer steps of an earlier training; its unit and padding still hold for an evaluation."""
        self._steps = OptimizerSteps(weakref.proxy(self), self._unit, self._batches)
        self._operations = Operations(weakref.proxy(self))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _HELPERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_over()

    def create_accelerator_and_postprocess(self) -> None:
        """Build the Accelerator as Trainer does, and turn it into a :class:`GradUtilsAccelerator`."""
        super().create_accelerator_and_postprocess()
        adopt_accelerator(self)

    # ---- Training: start and end ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``Trainer.train``; a non-finite loss is logged as it is, not replaced by an average of earlier ones."""
        self._start_steps()
        self.accelerator.windows.forget()
        if self.grad_plugin.fold_into_optimizer:
            check_nothing_reads_gradients(self)
        if self.model is not None:  # a search for hyperparameters has dropped that of the trial before
            discard_deferred(self.model)
            sum_increments(self.model)
        with contextlib.ExitStack() as at_end:
            at_end.callback(lambda: self.accelerator.windows.prepared.round_gradients())  # a trial has its own
            if self._checks_invariance:
                check = CheckBeforeTraining(self)
                self.add_callback(check)
                at_end.callback(self.remove_callback, check)
            self._users_nan_filter = self.args.logging_nan_inf_filter
            at_end.enter_context(nan_filter(self.args, False))  # 2 host syncs per micro-batch, for another loss
            at_end.enter_context(wrapping_overrides(self, GradUtilsTrainerMixin))
            at_end.enter_context(refusing_loops(self))
            return super().train(*args, **kwargs)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Like ``Trainer.call_model_init``, which also makes the model of each trial."""
        model = super().call_model_init(*args, **kwargs)
        sum_increments(model)
        return model

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Like ``Trainer.save_model``, after raising what the device found wrong with the last step."""
        self._steps.raise_pending()
        with nan_filter(self.args, self._users_nan_filter):
            super().save_model(*args, **kwargs)

    _users_nan_filter = True

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Start over with a smaller batch: drop the micro-batches so far and their gradients."""
        self._start_steps()
        self.accelerator.windows.forget()
        discard_deferred(self.model)
        super()._update_auto_batch_size(batch_size)

    # ---- Training: the batches ----

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Plan steps for the longest rank, so that shorter ranks pad instead of deadlocking."""
        return super().set_initial_training_values(args, self._batches.plan(dataloader))

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """Resume data without a length by its epoch; Trainer takes it for one long epoch and skips too much."""
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        if self.state.global_step and not self._batches.has_length:
            trained = self._batches.trained_without_length(max_steps)
        self._steps.accumulation.skip(trained[1])
        return trained

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Sequence[Any] | MicroBatches, Tensor | None]:
        """The window's micro-batches.

        Without a count, unless targets are counted first: each batch is fetched and counted when its turn comes.
        """
        get_batch_samples = super().get_batch_samples
        if self._steps.counts.is_handing:  # an override of a user's calls ours
            batches, self._steps.counts.handed = get_batch_samples(epoch_iterator, num_batches, device)
            return batches, self._steps.counts.handed
        if not is_transformers(get_batch_samples):
            return self._steps.window_of(get_batch_samples, epoch_iterator, num_batches, device)
        return self._steps.window(epoch_iterator, num_batches)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Any], device: torch.device) -> Tensor | None:
        """The count that ``compute_loss`` is given: transformers' own of a window, and a batch's own in evaluation."""
        if self._steps.counts.is_handing:
            return super()._get_num_items_in_batch(batch_samples, device)
        self._unit.settle_once(batch_samples[0])
        return self._unit.count(batch_samples[0]).clamp(min=1).float() if self._unit.hands_count else None

    # ---- Training: a micro-batch ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its own mean loss, detached."""
        return self._steps.in_micro_batch(super().training_step, model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Like ``Trainer._prepare_inputs``; in training, also count the targets of the micro-batch."""
        return self._steps.prepare(super()._prepare_inputs, inputs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The micro-batch's own mean loss.

        A model gets ``num_items_in_batch`` only if its forward names it; without, it returns its mean. Loss functions
        and a user's override inside get the count that this was given.
        """
        self._evaluation.see(inputs)
        steps, count = self._steps, num_items_in_batch
        steps.see_count(count)
        if self.whole_batch_loss is not None:
            loss, rows = users_loss(self, self._unit, model, inputs, steps.micro_batch)
            steps.keep(loss)
            return (loss, {"embeddings": rows}) if return_outputs else loss
        with self._unit.own_mean(count, inputs) as inputs:
            if not is_transformers(super().compute_loss):
                return steps.in_loss(super().compute_loss, model, inputs, return_outputs, num_items_in_batch=count)
            given: Any = copy.copy(inputs) if isinstance(inputs, Mapping) else inputs  # Trainer takes labels out
            if count is not None and self._unit.forward_takes_count:
                given["num_items_in_batch"] = steps.counts.own_count(steps.micro_batch, inputs, count)
            result = steps.in_loss(super().compute_loss, model, given, return_outputs, num_items_in_batch=None)
        if count is None or not self._unit.model_divides:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = steps.counts.part(steps.micro_batch, inputs, loss, count)
        steps.keep(loss)
        return (loss, *outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Like ``Trainer.floating_point_ops``, but padding has none, and parameters are counted once."""
        return 0 if self._batches.is_padding(inputs) else self._operations.of(inputs, super().floating_point_ops)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Like ``Trainer._track_num_input_tokens``, without padding. Collectives: its gather; every rank calls it."""
        super()._track_num_input_tokens(without_rows(inputs) if self._batches.is_padding(inputs) else inputs)

    # ---- Training: the window's end ----

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Rescale and clip in one go. Trainer calls it before the optimizer step if it clips at all."""
        return self._steps.close_window(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm before clipping. Trainer calls it always, after ``_clip_grad_norm`` if that ran."""
        return self._steps.close_window(model, math.inf) if grad_norm is None else grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like ``Trainer.log``, with the number of targets that the logged loss is a mean over.

        Raises:
            TargetCountError: no micro-batch so far had a target on any rank, or targets could not be counted.
            NonfiniteGradientError: the gradient of the last step was not finite.
        """
        logs |= self._steps.log_entries(logs)
        super().log(logs, *args, **kwargs)

    # ---- Evaluation ----

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Like ``Trainer.evaluation_loop``, with the loss Σ n·L / Σ n over the evaluation set, each sample once."""
        with self._evaluation.over(dataloader) as loader, wrapping_overrides(self, GradUtilsTrainerMixin):
            output = super().evaluation_loop(loader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        name = f"{metric_key_prefix}_loss"
        if (loss := self._evaluation.finish(is_wanted=name in output.metrics)) is not None:
            output.metrics[name] = loss
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Like ``Trainer.prediction_step``; also add up the loss for :meth:`evaluation_loop`."""
        names = self.label_names  # of which transformers computes a loss only if all are there
        if isinstance(inputs, Mapping) and names and all(inputs.get(name) is not None for name in names):
            self._unit.settle_once(inputs)
        with self._evaluation.in_batch():
            if self.whole_batch_loss is not None:
                loss, logits, labels = predict_rows(self, model, inputs, prediction_loss_only)
            else:
                loss, logits, labels = super().prediction_step(
                    model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **kwargs
                )
        self._evaluation.add(model, inputs, loss)
        return loss, logits, labels
