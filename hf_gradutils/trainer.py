"""A drop-in for ``transformers.Trainer`` with the gradient of one device and the whole batch.

micro-batch     training_step: count the targets, let the model return its own mean, weigh it in backward
window's end    _clip_grad_norm: one reduction, one scaling; the loss it reports replaces the running loss
evaluation      prediction_step: sum n·L and n over samples; evaluation_loop: divide once
"""

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_gradutils.accelerator import GradUtilsAccelerator, GradUtilsPlugin, uses_exact_arithmetic
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.loss_probe import settle_unit, undisturbed
from hf_gradutils.micro_batches import MicroBatches
from hf_gradutils.reduction import reduce_packed, world_domain
from hf_gradutils.targets import count_rows, count_with, is_divisible, take_rows, with_one_target
from hf_gradutils.window import AccumulationWindow, WindowReport, loss_scale_for

if TYPE_CHECKING:
    _Base = Any  # any Trainer class
else:
    _Base = object


class GradUtilsTrainerMixin(_Base):  # type: ignore[misc]
    """What makes a Trainer exact; goes in front of the Trainer class it is mixed into.

    Args:
        grad_plugin: Settings; the defaults need none.
        *args: As the Trainer class takes them.
        **kwargs: As the Trainer class takes them.

    Raises:
        InvalidArgumentError: a negative ``max_grad_norm``, one process for several GPUs, or DeepSpeed.
    """

    accelerator: GradUtilsAccelerator
    compute_loss_func: Any
    label_smoother: Any

    def __init__(self, *args: Any, grad_plugin: GradUtilsPlugin | None = None, **kwargs: Any):
        self.grad_plugin = grad_plugin or GradUtilsPlugin()
        self._head_shifts: bool | None = None
        self._expects_first_batch = True
        self._logged: _RunningLog | None = None
        self._eval_sums: Tensor | None = None
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
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InvalidArgumentError(
                "expected DDP, FSDP2 or tensor parallelism, got DeepSpeed, whose engine scales and clips gradients "
                "itself; use FSDP2 (fsdp=True, fsdp_config={'version': 2}), which shards what ZeRO-3 shards"
            )

        for axis, size in (
            ("tensor", self.get_tp_size()),
            ("context", self.get_cp_size()),
            ("sequence", self.get_sp_size()),
        ):
            if size > 1:
                raise InvalidArgumentError(
                    f"expected data parallelism (DDP, FSDP2), got {axis} parallelism of size {size}, whose gradients "
                    "this Trainer does not make exact yet; use FSDP2, or a loop of your own with the utilities"
                )

    def create_accelerator_and_postprocess(self) -> None:
        """Build the Accelerator as Trainer does, and make it one that weighs."""
        super().create_accelerator_and_postprocess()
        GradUtilsAccelerator.adopt(self.accelerator)

    # ---- Training: a micro-batch ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a non-finite loss is logged as it is, not replaced by an average of earlier ones."""
        self._expects_first_batch, self._logged = True, None
        # The filter costs two host syncs per micro-batch, and the loss it filters is not the one logged here.
        filters, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = filters

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """As in Trainer, which starts over: what was weighed so far is dropped with its gradients."""
        self._expects_first_batch, self._logged = True, None
        super()._update_auto_batch_size(batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Sequence[Any] | MicroBatches, None]:
        """The window's micro-batches, without a count: each is fetched and counted when its turn comes."""
        first = list(itertools.islice(epoch_iterator, 1))
        state = self.accelerator.gradient_state
        if not first or not state.in_dataloader:
            # A loader that accelerate has not prepared does not say which batch is its last: look at them all.
            return first + list(itertools.islice(epoch_iterator, num_batches - len(first))), None
        return MicroBatches(first.pop(), epoch_iterator, num_batches, lambda: state.end_of_dataloader), None

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its own mean loss, detached."""
        if self._expects_first_batch:
            self._start_windows(inputs)
        num_targets = self._count_targets(inputs)
        # A micro-batch's own mean is wanted: Trainer must not divide it by the number of micro-batches.
        self.current_gradient_accumulation_steps = 1
        with self.accelerator.counted(num_targets):
            return super().training_step(
                model, with_one_target(inputs, num_targets), num_items_in_batch=num_targets.clamp(min=1)
            )

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
        with self._own_mean(num_items_in_batch):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=None)

    @contextlib.contextmanager
    def _own_mean(self, num_targets: Tensor | None) -> Iterator[None]:
        """Give a loss function the micro-batch's count, and label smoothing the shift of the head.

        Trainer passes both a count over the whole window and decides on the shift by the model's class name,
        which ``fully_shard`` changes.
        """
        loss_func, smoother = self.compute_loss_func, self.label_smoother

        def own_loss_func(outputs: Any, labels: Any, num_items_in_batch: object = None) -> Tensor:
            return loss_func(outputs, labels, num_items_in_batch=num_targets)

        def own_smoother(
            outputs: Any, labels: Any, shift_labels: object = None, num_items_in_batch: object = None
        ) -> Tensor:
            return smoother(outputs, labels, shift_labels=bool(self._head_shifts))

        self.compute_loss_func = own_loss_func if loss_func is not None else None
        self.label_smoother = own_smoother if smoother is not None else None
        try:
            yield
        finally:
            self.compute_loss_func, self.label_smoother = loss_func, smoother

    def _forward_names_count(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return "num_items_in_batch" in inspect.signature(type(base).forward).parameters

    def _count_targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Targets of one micro-batch, shape (), on this rank's device."""
        plugin = self.grad_plugin
        num_targets = count_with(inputs, plugin.loss_unit, plugin.count_targets, head_shifts=bool(self._head_shifts))
        return num_targets.to(self.args.device, non_blocking=True)

    # ---- Training: the first batch ----

    def _start_windows(self, inputs: Mapping[str, Any]) -> None:
        """Settle the unit of the loss on the first batch, and open the first window with a scale to match."""
        accumulation = self.args.gradient_accumulation_steps
        is_one_micro_batch = accumulation == 1 and self.accelerator.num_processes == 1
        check = self.grad_plugin.check_loss_unit and not is_one_micro_batch
        targets_per_micro_batch = self._settle(inputs, check=check)
        self.accelerator.window = AccumulationWindow(
            self.args.device,
            loss_scale=loss_scale_for(targets_per_micro_batch * accumulation),
            num_replicas=self.get_tp_size(),
        )
        self._expects_first_batch = False

    def _settle(self, inputs: Mapping[str, Any], *, check: bool) -> float:
        """Find out whether the head shifts; returns the mean number of targets in a rank's micro-batch."""
        batch = self._prepare_input(dict(inputs))
        with undisturbed(self.model):
            settled = settle_unit(
                self._head_loss,
                self._trained_loss,
                batch,
                self.grad_plugin.loss_unit,
                self.grad_plugin.count_targets,
                check=check,
                exact_arithmetic=uses_exact_arithmetic(self.accelerator, self.model),
            )
        self._head_shifts = settled.head_shifts
        return settled.targets_per_micro_batch

    def _head_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of the head itself, without label smoothing around it."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(self.model, dict(batch), num_items_in_batch=torch.tensor(1))
        finally:
            self.label_smoother = smoother
        return loss

    def _trained_loss(self, batch: Mapping[str, Any], head_shifts: bool) -> Tensor:
        """The loss that is trained, without the auxiliary term of a mixture of experts, which is no mean."""
        self._head_shifts = head_shifts
        num_targets = self._count_targets(batch).clamp(min=1)
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(
                self.model, dict(batch), return_outputs=True, num_items_in_batch=num_targets
            )
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        is_the_models_own = self.label_smoother is None and self.compute_loss_func is None
        if is_the_models_own and isinstance(auxiliary, Tensor):
            config = getattr(self.model, "config", None)
            loss = loss - getattr(config, "router_aux_loss_coef", 0.0) * auxiliary
        return loss

    # ---- Training: the window's end ----

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Rescale and clip in one go. Trainer calls it before the optimizer step if it clips at all."""
        return self._close_window(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm before clipping. Trainer calls it always, after ``_clip_grad_norm`` if that ran."""
        return self._close_window(model, math.inf) if grad_norm is None else grad_norm

    def _close_window(self, model: nn.Module, max_norm: float) -> Tensor:
        report = self.accelerator.close_window(model, max_norm)
        if self._logged is None:
            self._logged = _RunningLog(report)
        else:
            was_logged = self._globalstep_last_logged == self.state.global_step
            self._logged.add(report, starts_anew=was_logged)
        # Trainer added each micro-batch's own mean to this; the step's loss takes the place of that sum.
        self._tr_loss.copy_(self._logged.loss)
        return report.grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.log``, with the number of targets that the logged loss is a mean over.

        Raises:
            TargetCountError: no micro-batch so far had a target on any rank, so nothing was learnt.
        """
        if self._logged is not None and ("loss" in logs or "train_loss" in logs):
            if not self._logged.total_targets.item():
                raise TargetCountError(
                    f"expected batches with targets, got none in the first {self.state.global_step} optimizer steps on "
                    "any rank: every label is -100; look at how the labels are masked and truncated"
                )
            if "loss" in logs:
                logs["num_targets"] = round(self._logged.num_targets.item())
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
        """As in Trainer, with the loss Σ n·L / Σ n over the evaluation set, each sample once."""
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums, self._eval_sums = self._eval_sums, None
        if f"{metric_key_prefix}_loss" in output.metrics:
            count, weighted_loss = reduce_packed(world_domain(), sums)[0].tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = weighted_loss / count if count else math.nan
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As in Trainer; the loss is also added up for :meth:`evaluation_loop`."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if loss is not None and self._eval_sums is not None:
            self._add_eval_loss(model, inputs, loss)
        return loss, logits, labels

    def _add_eval_loss(self, model: nn.Module, inputs: Mapping[str, Any], loss: Tensor) -> None:
        num_targets = self._count_targets(inputs)
        num_rows = count_rows(inputs)
        num_real_rows = self._num_real_rows(num_rows)
        if num_real_rows is not None and is_divisible(inputs):
            # Ranks were handed copies of samples to fill up the last batch: ask for the loss without them.
            batch = self._prepare_input(take_rows(inputs, 0, max(num_real_rows, 1)))
            num_targets = self._count_targets(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch, num_items_in_batch=num_targets.clamp(min=1)).detach().mean()
            num_targets = num_targets * min(num_real_rows, 1)
        count = num_targets.to(torch.float64)
        assert self._eval_sums is not None
        self._eval_sums += torch.stack((count, torch.where(count > 0, loss.to(torch.float64) * count, 0.0)))

    def _num_real_rows(self, num_rows: int) -> int | None:
        """Rows of this rank's batch that are no copies; None on every rank if there are no copies on any."""
        state = self.accelerator.gradient_state
        num_processes = self.accelerator.num_processes
        if num_processes == 1 or not state.end_of_dataloader or not 0 < state.remainder < num_rows * num_processes:
            return None
        return max(0, min(num_rows, state.remainder - self.accelerator.process_index * num_rows))

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """The count that ``prediction_step`` passes to ``compute_loss``: the batch's own."""
        if self._head_shifts is None:
            self._settle(batch_samples[0], check=False)
        return self._count_targets(batch_samples[0]).clamp(min=1)


class _RunningLog:
    """Sums over the optimizer steps since the last log, on the device."""

    def __init__(self, report: WindowReport):
        self.loss = report.loss.clone()
        self.num_targets = report.num_targets.clone()
        self.total_targets = report.num_targets.clone()

    def add(self, report: WindowReport, *, starts_anew: bool) -> None:
        self.loss = report.loss.clone() if starts_anew else self.loss + report.loss
        self.num_targets = report.num_targets.clone() if starts_anew else self.num_targets + report.num_targets
        self.total_targets = self.total_targets + report.num_targets


class GradUtilsTrainer(GradUtilsTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer``, exact.

    Takes what ``Trainer`` takes, and ``grad_plugin=GradUtilsPlugin(…)`` for settings. Gradient, gradient norm and
    logged loss are those of one process with the whole batch, whatever the accumulation, the number of ranks
    and the head; a log entry also has ``num_targets``, and the evaluation loss is a mean over all targets of
    the evaluation set.
    """
