"""A drop-in for ``transformers.Trainer`` with the gradient of one device and the whole batch.

The order in which transformers calls the overrides:

    train → set_initial_training_values
        each window:       get_batch_samples → its micro-batches, drawn one by one
        each micro-batch:  training_step → _prepare_inputs → compute_loss → accelerator.backward
        window's end:      _clip_grad_norm (if it clips) → _get_grad_norm → optimizer.step → log
    evaluate → evaluation_loop
        each batch:        prediction_step → _prepare_inputs → compute_loss

``training_step`` makes the :class:`MicroBatch`. Only in ``_prepare_inputs`` can its targets be counted, because context
parallelism has just cut the sequence to this rank's part; ``backward`` reads the record.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_gradutils.accelerator import GradUtilsAccelerator, GradUtilsPlugin, MicroBatch, Padding
from hf_gradutils.coordination.route import route_first_rank
from hf_gradutils.gradients.partial_sums import sum_increments
from hf_gradutils.invariance import CheckBeforeTraining
from hf_gradutils.sync import discard_deferred
from hf_gradutils.targets.counter import with_one_target
from hf_gradutils.trainer._batches import MicroBatches, TrainingBatches
from hf_gradutils.trainer._evaluation import EvaluationLoss, num_data_ranks
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.trainer._setup import check_nothing_reads_gradients, check_setup
from hf_gradutils.trainer._steps import OptimizerSteps

if TYPE_CHECKING:
    TrainerBase = Any  # any Trainer class
else:
    TrainerBase = object


class GradUtilsTrainerMixin(TrainerBase):  # type: ignore[misc]
    """Makes a Trainer exact; goes in front of the Trainer class.

    Args:
        grad_plugin: Settings.
        check_invariance: Prove at the start of every ``train`` that the gradient does not depend on how the batch is
            cut up and spread, as :func:`hf_gradutils.check_invariance` does, and stop if it does.
        *args: As the Trainer class takes them.
        **kwargs: As the Trainer class takes them.

    Raises:
        InvalidArgumentError: a negative ``max_grad_norm``, one process for several GPUs, DeepSpeed, a trainer of
            trl that weights or batches by itself, or settings of the plugin that ``TrainingArguments`` has too.
    """

    def __init__(
        self,
        *args: Any,
        grad_plugin: GradUtilsPlugin | None = None,
        check_invariance: bool = False,
        **kwargs: Any,
    ):
        self._checks_invariance = check_invariance
        self.grad_plugin = grad_plugin or GradUtilsPlugin()
        self._start_over()
        with route_first_rank():  # some Trainers prepare their data here
            super().__init__(*args, **kwargs)
        check_setup(self)

    def _start_over(self) -> None:
        """Forget the unit of the loss, batches and steps: for a new Trainer, and for checks."""
        self._unit = LossUnit(self)
        self._evaluation = EvaluationLoss(self, self._unit)
        self._batches = TrainingBatches(self)
        self._micro_batch: MicroBatch | None = None
        self._start_steps()

    def _start_steps(self) -> None:
        """Forget the optimizer steps of an earlier training; its unit and padding still hold for an evaluation."""
        self._steps = OptimizerSteps(self, self._unit, self._batches)
        self._operations_per_token: int | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Build the Accelerator as Trainer does, and turn it into a :class:`GradUtilsAccelerator`."""
        super().create_accelerator_and_postprocess()
        num_micro_batches = self.args.gradient_accumulation_steps
        GradUtilsAccelerator.adopt(self.accelerator, self.grad_plugin, num_micro_batches=num_micro_batches)

    # ---- Training: start and end ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``Trainer.train``; a non-finite loss is logged as it is, not replaced by an average of earlier ones."""
        self._start_steps()
        self.accelerator.windows.forget()
        if self.grad_plugin.fold_into_optimizer:
            check_nothing_reads_gradients(self)
        discard_deferred(self.model)
        sum_increments(self.model)
        # The filter costs two host syncs per micro-batch, and the loss it filters is not the one logged here.
        with contextlib.ExitStack() as at_end:
            at_end.callback(self.accelerator.windows.prepared.round_gradients)
            if self._checks_invariance:
                check = CheckBeforeTraining(self)
                self.add_callback(check)
                at_end.callback(self.remove_callback, check)
            at_end.enter_context(self._nan_filter(False))
            return super().train(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Like ``Trainer.save_model``, after raising what the device found wrong with the last step."""
        self._steps.raise_pending()
        with self._nan_filter(self._users_nan_filter):
            super().save_model(*args, **kwargs)

    _users_nan_filter = True

    @contextlib.contextmanager
    def _nan_filter(self, value: bool) -> Iterator[None]:
        before = self.args.logging_nan_inf_filter
        if not value:
            self._users_nan_filter = before
        self.args.logging_nan_inf_filter = value
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = before

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
        if self._batches.has_length or not self.state.global_step:
            return trained
        num_epochs = int(self.state.epoch)
        num_batches = round((self.state.epoch - num_epochs) * max_steps * self.args.gradient_accumulation_steps)
        return num_epochs, 0 if self.args.ignore_data_skip else num_batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Sequence[Any] | MicroBatches, None]:
        """The window's micro-batches, without a count: each is fetched and counted when its turn comes."""
        return self._batches.window(epoch_iterator, num_batches), None

    # ---- Training: a micro-batch ----

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its own mean loss, detached."""
        is_padding = isinstance(inputs, Padding)
        if is_padding and num_data_ranks(self) == 1:
            return torch.zeros((), device=self.args.device)  # no other rank waits for this micro-batch
        self._steps.start_once(model, inputs)
        # A micro-batch's own mean is wanted: Trainer must not divide it by the number of micro-batches.
        self.current_gradient_accumulation_steps = 1
        divisor = torch.ones((), dtype=torch.float64, device=self.args.device)
        self._micro_batch = MicroBatch(is_padding=is_padding, divisor=divisor)
        try:
            with self.accelerator.windows.one_micro_batch(model, self._micro_batch):
                return super().training_step(model, inputs, num_items_in_batch=divisor)
        finally:
            self._micro_batch = None

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Any:
        """Like ``Trainer._prepare_inputs``; in training, also count the targets of the micro-batch."""
        prepared = super()._prepare_inputs(inputs)
        if self._micro_batch is None:
            return prepared
        assert self._unit.counter is not None
        num_targets = self._unit.count(prepared)
        self._micro_batch.count(num_targets, self._unit.counter.weight(num_targets))
        return with_one_target(prepared, num_targets)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The micro-batch's own mean loss.

        A model gets ``num_items_in_batch`` only if its forward names it; without, it returns its mean. Loss functions
        get the micro-batch's own count.
        """
        self._evaluation.see(inputs)
        inputs = dict(inputs)
        if num_items_in_batch is not None and self._unit.forward_takes_count:
            inputs["num_items_in_batch"] = num_items_in_batch
        with self._unit.own_mean(num_items_in_batch):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=None)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Like ``Trainer.floating_point_ops``, but count parameters once, not in every micro-batch."""
        is_trainers = super().floating_point_ops.__func__ is Trainer.floating_point_ops
        main_input = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not (is_trainers and isinstance(main_input, Tensor) and hasattr(self.model, "num_parameters")):
            return int(super().floating_point_ops(inputs))
        if self._operations_per_token is None:
            self._operations_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        return main_input.numel() * self._operations_per_token

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
        self._evaluation.start()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
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
        if any(inputs.get(name) is not None for name in self.label_names):
            self._unit.settle_once(inputs)
        self._evaluation.start_batch()
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **kwargs
        )
        self._evaluation.add(model, inputs, loss)
        return loss, logits, labels

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """The count that ``prediction_step`` passes to ``compute_loss``: the batch's own."""
        self._unit.settle_once(batch_samples[0])
        return self._unit.count(batch_samples[0]).clamp(min=1)


class GradUtilsTrainer(GradUtilsTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer``, exact.

    Takes the arguments of ``Trainer``, and ``grad_plugin=GradUtilsPlugin(…)`` for settings. Gradient, gradient norm and
    logged loss are those of one process with the whole batch, for every accumulation, number of ranks and head. A log
    entry also has ``num_targets``, and the evaluation loss is a mean over all targets of the evaluation set.
    """


class GradUtilsSeq2SeqTrainer(GradUtilsTrainerMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """``transformers.Seq2SeqTrainer``, exact in the same way."""
