"""A drop-in for ``transformers.Trainer`` with the gradient of one device and the whole batch.

micro-batch     training_step: count the targets, let the model return its own mean, weigh it in backward
window's end    _clip_grad_norm: one reduction, one scaling; the loss it reports replaces the running loss
evaluation      :mod:`hf_gradutils.evaluation`
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_gradutils._collectives import reduce_packed, world_domain
from hf_gradutils.accelerator import Counters, GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.coordination.route import route_first_rank
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError, TargetCountError
from hf_gradutils.gradients.partial_sums import sum_increments
from hf_gradutils.invariance import CheckBeforeTraining
from hf_gradutils.sync import discard_deferred
from hf_gradutils.targets import trl
from hf_gradutils.targets.counter import check_count, with_one_target
from hf_gradutils.trainer._batches import BatchStream, MicroBatches, Padding
from hf_gradutils.trainer._evaluation import EvaluationMixin
from hf_gradutils.trainer._log import RunningLog
from hf_gradutils.window import AccumulationWindow, loss_scale_for


class GradUtilsTrainerMixin(EvaluationMixin):
    """What makes a Trainer exact; goes in front of the Trainer class it is mixed into.

    Args:
        grad_plugin: Settings; the defaults need none.
        check_invariance: Prove at the start of every ``train`` that the gradient does not depend on how the batch is
            cut up and spread, as :func:`hf_gradutils.check_invariance` does, and stop if it does.
        *args: As the Trainer class takes them.
        **kwargs: As the Trainer class takes them.

    Raises:
        InvalidArgumentError: a negative ``max_grad_norm``, one process for several GPUs, DeepSpeed, a trainer of
            trl that weighs or batches by itself, or settings of the plugin that ``TrainingArguments`` has a place for.
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
        self._expects_first_batch = True
        self._logged: RunningLog | None = None
        self._counters: Counters | None = None
        self._micro_batch_count: Tensor | None = None
        self._stream: BatchStream | None = None
        self._epoch_iterator: Iterator[Any] | None = None
        self._has_length, self._pads, self._others_have_data = True, False, torch.tensor(0.0)
        with route_first_rank():  # some Trainers prepare their data here
            super().__init__(*args, **kwargs)
        self._check_setup()

    def _check_setup(self) -> None:
        if not self.args.max_grad_norm >= 0:
            raise InvalidArgumentError(
                f"max_grad_norm must be > 0, got {self.args.max_grad_norm}; 0 measures the norm without clipping"
            )
        if self.args.n_gpu > 1:
            raise InvalidArgumentError(
                f"expected one process per GPU, got one process for {self.args.n_gpu}; start it with `accelerate "
                f"launch --num_processes {self.args.n_gpu}`, or with CUDA_VISIBLE_DEVICES=0 for one GPU"
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED or self.get_sp_size() > 1:
            raise InvalidArgumentError(
                "expected DDP, FSDP2, tensor or context parallelism, got DeepSpeed, whose engine scales and clips "
                "gradients itself; use FSDP2 (fsdp=True, fsdp_config={'version': 2}), which shards what ZeRO-3 shards"
            )
        if self.accelerator.distributed_type == DistributedType.XLA:
            raise InvalidArgumentError(
                "expected CPU or a device that torch drives itself, got XLA, which reduces gradients in its own step; "
                "use transformers.Trainer there"
            )
        if reason := trl.why_not_exact(self):
            name = trl.trl_name(self)
            raise InvalidArgumentError(
                f"expected of trl's trainers one of {', '.join(trl.EXACT)}, got {name}, which {reason}; use "
                f"{name} by itself, without GradUtilsTrainerMixin in front"
            )
        if named := self.grad_plugin.accumulation_settings():
            raise InvalidArgumentError(
                f"expected accumulation to be set in TrainingArguments, got GradUtilsPlugin({', '.join(named)}); use "
                "gradient_accumulation_steps, or accelerator_config={'gradient_accumulation_kwargs': {…}}"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Build the Accelerator as Trainer does, and make it one that weighs."""
        super().create_accelerator_and_postprocess()
        num_micro_batches = self.args.gradient_accumulation_steps
        GradUtilsAccelerator.adopt(self.accelerator, self.grad_plugin, num_micro_batches=num_micro_batches)

    # ---- Training: start and end ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a non-finite loss is logged as it is, not replaced by an average of earlier ones."""
        self._expects_first_batch, self._logged, self._operations_per_token = True, None, None
        self.accelerator.forget_windows()
        if self.grad_plugin.fold_into_optimizer:
            self._check_nobody_reads_gradients()
        discard_deferred(self.model)
        sum_increments(self.model)
        # The filter costs two host syncs per micro-batch, and the loss it filters is not the one logged here.
        with self._nan_filter(False), self._checking_first(), self.accelerator.rounding_at_the_end():
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _checking_first(self) -> Iterator[None]:
        check = CheckBeforeTraining(self) if self._checks_invariance else None
        if check is not None:
            self.add_callback(check)
        try:
            yield
        finally:
            if check is not None:
                self.remove_callback(check)

    def _check_nobody_reads_gradients(self) -> None:
        for callback in self.callback_handler.callbacks:
            if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step:
                raise InvalidArgumentError(
                    "expected no callback before the optimizer step with fold_into_optimizer=True, because gradients "
                    f"are not scaled yet then, got {type(callback).__name__}.on_pre_optimizer_step; leave out one"
                )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.save_model``, once it is sure that the last step was a good one."""
        self._settle_step()
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
        """As in Trainer, which starts over: what was weighed so far is dropped with its gradients."""
        self._expects_first_batch, self._logged = True, None
        self.accelerator.forget_windows()
        discard_deferred(self.model)
        super()._update_auto_batch_size(batch_size)

    # ---- Training: the batches ----

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As in Trainer, for the rank that has the most batches: the others pad theirs, and nobody waits in vain."""
        self._epoch_iterator = None
        self._has_length = has_length(dataloader)
        num_batches = len(dataloader) if self._has_length else 0
        extremes = torch.tensor([num_batches, -num_batches], dtype=torch.float64)
        _, maxima = reduce_packed(world_domain(), extremes[:0], extremes)
        assert maxima is not None
        most, least = int(maxima[0]), -int(maxima[1])
        self._pads = not self._has_length or most != least
        return super().set_initial_training_values(args, _OfLength(dataloader, most) if most != least else dataloader)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """As in Trainer, which takes data without a length for one long epoch and would skip more than there is."""
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        if self._has_length or not self.state.global_step:
            return trained
        num_epochs = int(self.state.epoch)
        num_batches = round((self.state.epoch - num_epochs) * max_steps * self.args.gradient_accumulation_steps)
        return num_epochs, 0 if self.args.ignore_data_skip else num_batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Sequence[Any] | MicroBatches, None]:
        """The window's micro-batches, without a count: each is fetched and counted when its turn comes."""
        if self._stream is None or epoch_iterator is not self._epoch_iterator:
            self._stream = self._start_epoch(epoch_iterator)
        if self._pads and not self._stream.has_more() and not self._others_have_data.item():
            return [], None
        return MicroBatches(self._stream, num_batches, pads=self._pads), None

    def _start_epoch(self, epoch_iterator: Iterator[Any]) -> BatchStream:
        state = self.accelerator.gradient_state
        stream = BatchStream(
            epoch_iterator,
            # A loader that accelerate has not prepared does not say which batch is its last.
            lambda: state.end_of_dataloader if state.in_dataloader else None,
            padding=self._stream.padding if self._stream is not None else None,
        )
        self._epoch_iterator = epoch_iterator
        if self._pads:
            has_none = not stream.has_more() and stream.padding is None
            mine = torch.tensor([stream.has_more(), has_none], dtype=torch.float64, device=self.args.device)
            self._others_have_data, num_without = reduce_packed(world_domain(), mine)[0]
            if num_without and self._others_have_data:
                raise InvalidArgumentError(
                    f"expected data on every rank, got none on {num_without:.0f} of {self.accelerator.num_processes} "
                    "ranks in the first epoch; use fewer ranks, or split the dataset into more shards"
                )
        return stream

    # ---- Training: a micro-batch ----

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its own mean loss, detached."""
        if isinstance(inputs, Padding) and self._num_data_ranks() == 1:
            return torch.zeros((), device=self.args.device)  # nobody communicates with what this rank lacks
        if self._expects_first_batch:
            self._start_windows(model, inputs)
        # A micro-batch's own mean is wanted: Trainer must not divide it by the number of micro-batches.
        self.current_gradient_accumulation_steps = 1
        self._micro_batch_count = torch.ones((), dtype=torch.float64, device=self.args.device)
        try:
            with self.accelerator.one_micro_batch(model):
                return super().training_step(model, inputs, num_items_in_batch=self._micro_batch_count)
        finally:
            self._micro_batch_count = None

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Any:
        """As in Trainer, and count: only here, context parallelism has cut the sequence to this rank's part."""
        prepared = super()._prepare_inputs(inputs)
        if self._micro_batch_count is None:
            return prepared
        assert self._counter is not None
        num_targets = self._count_targets(prepared)
        self._micro_batch_count.copy_(num_targets.clamp(min=1))
        if isinstance(inputs, Padding):
            num_targets = weight = torch.zeros_like(num_targets)
        else:
            weight = self._counter.weight(num_targets)
        self.accelerator.count(num_targets, weight)
        return with_one_target(prepared, num_targets)

    def _start_windows(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Settle the unit of the loss on the first batch, and open the first window with a scale to match."""
        accumulation = self.args.gradient_accumulation_steps
        is_split = accumulation > 1 or self.accelerator.num_processes > self.get_tp_size()
        targets_per_micro_batch = self._settle_unit(inputs, is_split=is_split)
        assert self._counter is not None
        sums = AccumulationWindow(
            self.args.device,
            loss_scale=1.0 if self._counter.is_sum else loss_scale_for(targets_per_micro_batch * accumulation),
            num_replicas=self.get_tp_size(),
            is_sum=self._counter.is_sum,
        )
        self.accelerator.window_of(model).start(sums)
        self._expects_first_batch = False

    _operations_per_token: int | None = None

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As in Trainer, but its parameters are counted once a training, not in every micro-batch."""
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
        return self._close_window(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm before clipping. Trainer calls it always, after ``_clip_grad_norm`` if that ran."""
        return self._close_window(model, math.inf) if grad_norm is None else grad_norm

    def _close_window(self, model: nn.Module, max_norm: float) -> Tensor:
        has_data_left = self._stream.has_more() if self._pads and self._stream is not None else None
        self._settle_step()
        report, is_taken = self.accelerator.close_window(
            model, max_norm, step=self.state.global_step + 1, has_data_left=has_data_left
        )
        if self.accelerator.is_unsettled:
            self._counters = Counters(self.state.global_step, self.lr_scheduler, self.optimizer)
        if has_data_left is not None:
            self._others_have_data = report.num_ranks_with_data
        if self._logged is None:
            self._logged = RunningLog(self.args.device)
        was_logged = self._globalstep_last_logged == self.state.global_step
        self._logged.add(report, is_taken=is_taken, starts_anew=was_logged)
        # Trainer added each micro-batch's own mean to this; the step's loss takes the place of that sum.
        self._tr_loss.copy_(self._logged.loss)
        return report.grad_norm

    def _settle_step(self) -> None:
        """Raise if the step before was left out on the device, with the counters as they were before it."""
        try:
            self.accelerator.settle()
        except NonfiniteGradientError:
            if self._counters is not None:
                self.state.global_step = self._counters.restore(self.lr_scheduler, self.optimizer)
            raise

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.log``, with the number of targets that the logged loss is a mean over.

        Raises:
            TargetCountError: no micro-batch so far had a target on any rank, so nothing was learnt; or some had
                targets that cannot be counted.
            NonfiniteGradientError: the gradient of the last step was not finite.
        """
        self._settle_step()
        if self._logged is not None and ("loss" in logs or "train_loss" in logs):
            total = self._logged.total_targets.item()
            check_count(total)
            if not total:
                raise TargetCountError(
                    f"expected batches with targets, got none in the first {self.state.global_step} optimizer steps on "
                    "any rank: every label is -100; look at how the labels are masked and truncated"
                )
            if "loss" in logs:
                logs |= self._logged.entries(self.grad_plugin.grad_norm_groups is not None)
                if self.grad_plugin.on_nonfinite == "skip":
                    logs["skipped_steps"] = self.accelerator.num_skipped_steps
        super().log(logs, *args, **kwargs)


class _OfLength:
    """A loader, but for its length: that of the rank that has the most batches."""

    def __init__(self, dataloader: Any, length: int):
        self._dataloader = dataloader
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)


class GradUtilsTrainer(GradUtilsTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer``, exact.

    Takes what ``Trainer`` takes, and ``grad_plugin=GradUtilsPlugin(…)`` for settings. Gradient, gradient norm and
    logged loss are those of one process with the whole batch, whatever the accumulation, the number of ranks
    and the head; a log entry also has ``num_targets``, and the evaluation loss is a mean over all targets of
    the evaluation set.
    """


class GradUtilsSeq2SeqTrainer(GradUtilsTrainerMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """``transformers.Seq2SeqTrainer``, exact in the same way."""
