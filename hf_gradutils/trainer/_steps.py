"""The optimizer steps of a Trainer: their windows, their log, and the rollback of skipped ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_gradutils.accelerator import Counters
from hf_gradutils.errors import NonfiniteGradientError
from hf_gradutils.trainer._batches import TrainingBatches
from hf_gradutils.trainer._log import RunningLog
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.window import AccumulationWindow, loss_scale_for


class OptimizerSteps:
    """Opens the first window of a training, closes each, and keeps the state of its log and of a rollback."""

    def __init__(self, trainer: Any, unit: LossUnit, batches: TrainingBatches):
        self._trainer = trainer
        self._unit = unit
        self._batches = batches
        self._is_started = False
        self._log: RunningLog | None = None
        self._counters: Counters | None = None

    def start_once(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Settle the unit of the loss on the first batch, and open the first window with a scale to match."""
        if self._is_started:
            return
        trainer, unit = self._trainer, self._unit
        accumulation = trainer.args.gradient_accumulation_steps
        is_split = accumulation > 1 or trainer.accelerator.num_processes > trainer.get_tp_size()
        targets_per_micro_batch = unit.settle(inputs, is_split=is_split)
        assert unit.counter is not None
        sums = AccumulationWindow(
            trainer.args.device,
            loss_scale=1.0 if unit.counter.is_sum else loss_scale_for(targets_per_micro_batch * accumulation),
            num_replicas=trainer.get_tp_size(),
            is_sum=unit.counter.is_sum,
        )
        trainer.accelerator.windows.of_loss(model).start(sums)
        self._is_started = True

    def close_window(self, model: nn.Module, max_norm: float) -> Tensor:
        """Make the gradient the exact mean and clip it; returns its norm before. Collectives: as ``Windows.close``."""
        trainer, windows = self._trainer, self._trainer.accelerator.windows
        has_data_left = self._batches.has_data_left
        self.raise_pending()
        report, is_taken = windows.close(
            windows.of_loss(model), max_norm, step=trainer.state.global_step + 1, has_data_left=has_data_left
        )
        if windows.is_pending:
            self._counters = Counters(trainer.state.global_step, trainer.lr_scheduler, trainer.optimizer)
        if has_data_left is not None:
            self._batches.num_ranks_with_data = report.num_ranks_with_data
        if self._log is None:
            self._log = RunningLog(trainer.args.device)
        was_logged = trainer._globalstep_last_logged == trainer.state.global_step
        self._log.add(report, is_taken=is_taken, starts_anew=was_logged)
        # Trainer has added each micro-batch's own mean to this; the loss of the steps replaces that sum.
        trainer._tr_loss.copy_(self._log.loss)
        return report.grad_norm

    def raise_pending(self) -> None:
        """Raise NonfiniteGradientError if the device has skipped the step before, with the counters as before it."""
        trainer = self._trainer
        try:
            trainer.accelerator.windows.raise_pending()
        except NonfiniteGradientError:
            if self._counters is not None:
                trainer.state.global_step = self._counters.restore(trainer.lr_scheduler, trainer.optimizer)
            raise

    def log_entries(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Numbers to add to Trainer's in an entry of the log, or to replace them. Host syncs.

        Raises:
            TargetCountError: as :meth:`RunningLog.check_targets`.
            NonfiniteGradientError: as :meth:`raise_pending`.
        """
        self.raise_pending()
        if self._log is None or not {"loss", "train_loss"} & set(logs):
            return {}
        self._log.check_targets(self._trainer.state.global_step)
        if "loss" not in logs:
            return {}
        plugin = self._trainer.grad_plugin
        entries = self._log.entries(has_groups=plugin.grad_norm_groups is not None)
        if plugin.on_nonfinite == "skip":
            entries["skipped_steps"] = self._trainer.accelerator.num_skipped_steps
        return entries
