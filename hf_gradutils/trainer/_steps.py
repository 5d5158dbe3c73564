"""The optimizer steps of a Trainer: their windows, their log, and the rollback of skipped ones."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.accelerator import Counters, MicroBatch, check_weighted
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from hf_gradutils.targets import trl_generating
from hf_gradutils.targets.counter import with_one_target
from hf_gradutils.trainer._accumulation import Accumulation
from hf_gradutils.trainer._batches import MicroBatches, TrainingBatches
from hf_gradutils.trainer._counts import WindowCounts
from hf_gradutils.trainer._evaluation import num_data_ranks
from hf_gradutils.trainer._first_pass import FirstPass, check_possible
from hf_gradutils.trainer._given_terms import one_loss
from hf_gradutils.trainer._log import RunningLog
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.trainer._sentences import prepare_losses
from hf_gradutils.window import AccumulationWindow, loss_scale_for


class OptimizerSteps:
    """Opens the first window of a training, closes each, and keeps the state of its log and of a rollback."""

    def __init__(self, trainer: Any, unit: LossUnit, batches: TrainingBatches):
        self._trainer = trainer
        self._unit = unit
        self._batches = batches
        self.counts = WindowCounts(trainer, unit, batches)
        self.first_pass = FirstPass(trainer, unit, batches)
        self.micro_batch: MicroBatch | None = None
        self._is_preparing = False
        self._num_closed = 0
        """Windows that had been closed when the latest micro-batch began."""
        self._num_losses = 0
        """Calls of ``compute_loss`` that are under way, inside each other."""
        self.accumulation = Accumulation(trainer, batches)
        self._is_checked = True
        self._log: RunningLog | None = None
        self._counters: Counters | None = None

    def in_micro_batch(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run a step, ours or a user's around ours, in the micro-batch that it begins or belongs to."""
        if self.micro_batch is not None:
            return step(model, inputs, num_items_in_batch)
        trainer, device = self._trainer, self._trainer.args.device
        windows = trainer.accelerator.windows
        windows.has_data_left = self._batches.has_data_left
        self.accumulation.begin_micro_batch()
        if self._batches.is_padding(inputs) and num_data_ranks(trainer) == 1 and windows.engine is None:
            return torch.zeros((), device=device)  # no other rank waits for this micro-batch, nor does an engine
        self._begin(model, inputs)
        # A micro-batch's own mean is wanted: Trainer must not divide it by the number of micro-batches.
        trainer.current_gradient_accumulation_steps = 1
        self._num_closed = windows.of_loss(model).num_closed
        self.micro_batch = micro_batch = self.counts.micro_batch(inputs, num_items_in_batch)
        try:
            is_own = num_items_in_batch is None or self._unit.contract.is_asked_alone
            count = micro_batch.divisor if is_own else num_items_in_batch
            with (
                windows.one_micro_batch(model, micro_batch),
                self._keeping_models_losses(model, count),
                self.first_pass.second(micro_batch),
            ):
                loss = step(model, inputs, count if self._unit.hands_count else None)
            micro_batch.report(windows.of_loss(model), loss)
            trl_generating.join_step_times(trainer)
            return loss
        finally:
            self.micro_batch = micro_batch.count_late = None  # which would keep the batch

    def prepare(self, prepare_inputs: Callable[[Any], Any], inputs: Any) -> Any:
        """Prepare inputs, by ours or a user's ``_prepare_inputs``; in training, count the targets that come out."""
        if self.micro_batch is None or self._is_preparing:
            return prepare_inputs(inputs)
        self._is_preparing = True
        try:
            prepared = prepare_inputs(inputs)
        finally:
            self._is_preparing = False
        return with_one_target(prepared, self.counts.count(self.micro_batch, prepared))

    def outermost_loss(self, compute_loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a loss by a user's ``compute_loss`` around ours."""
        self.see_count(args[3] if len(args) > 3 else kwargs.get("num_items_in_batch"))
        return self.in_loss(compute_loss, *args, **kwargs)

    def see_count(self, count: Any) -> None:
        """Weight the next loss by whether the outermost ``compute_loss`` was given a count, if it may be trained."""
        if self.micro_batch is not None and not self._num_losses and torch.is_grad_enabled():
            self.micro_batch.is_models = False
            self.counts.choose(self.micro_batch, has_count=count is not None)

    def in_loss(self, compute_loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a loss, by ours or a user's ``compute_loss``, and keep it."""
        in_share = self._in_share(args[1] if len(args) > 1 else kwargs["inputs"])
        self._num_losses += 1
        try:
            with self._unit.alone(), in_share:
                result = one_loss(self._unit, compute_loss(*args, **kwargs), self.micro_batch)
        finally:
            self._num_losses -= 1
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        shares, micro_batch = self._unit.shares, self.micro_batch
        if micro_batch is not None and shares is not None and shares.is_result and loss.requires_grad:
            loss = micro_batch.give(loss) if micro_batch.share is None else loss
        self.keep(loss)
        return (loss, *outputs) if isinstance(result, tuple) else loss

    def _in_share(self, inputs: Any) -> contextlib.AbstractContextManager[None]:
        """The context of the outermost loss of a micro-batch, which is to become its share."""
        if self.micro_batch is None or self._num_losses or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return self._unit.in_share(inputs, self.micro_batch)

    def keep(self, loss: Tensor) -> None:
        """Keep a loss for ``backward`` to compare; one without a graph is looked at only."""
        if self.micro_batch is not None and loss.requires_grad:
            self.micro_batch.computed = loss

    @contextlib.contextmanager
    def _keeping_models_losses(self, model: nn.Module, count: Any) -> Iterator[None]:
        """Keep the losses that a user's own step, given this count, asks the model for, without ``compute_loss``."""
        micro_batch = self.micro_batch
        assert micro_batch is not None

        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            # After compute_loss has returned the loss that is trained, another forward is for something else.
            is_later = self._num_losses or not (micro_batch.computed is None or micro_batch.is_models)
            if self.micro_batch is micro_batch and isinstance(loss, Tensor) and loss.requires_grad and not is_later:
                self.counts.choose_models(micro_batch, kwargs.get("num_items_in_batch"), count)
                self.keep(loss)

        with contextlib.ExitStack() as stack:
            # The step may call either; torch.compile does not look at hooks on what is inside it.
            for called in {model, self._trainer.model} if micro_batch.division is not None else ():
                stack.callback(called.register_forward_hook(keep, with_kwargs=True).remove)
            yield

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        """Begin a micro-batch: settle the loss on the first, and look at it again in each window's first."""
        self._settle(model, inputs)
        if not self._is_checked:
            self._is_checked = True
            step = self._trainer.state.global_step
            self._unit.check_again(inputs, step)
            if self._unit.is_due(step):
                self.counts.look_again()
            if self._unit.ask_again(inputs, step):
                self.counts.decide(model)

    def _settle(self, model: nn.Module, inputs: Any) -> None:
        """Settle the unit of the loss on the first batch, and open the first window with a scale to match.

        Again where a callback has set another number of micro-batches, on which the answers depend.
        """
        trainer, unit = self._trainer, self._unit
        accumulation = self.accumulation.number
        if self.accumulation.is_settled:
            return
        trainer.accelerator.windows.num_micro_batches = accumulation
        if trainer.accelerator.windows.engine is not None:
            trainer.accelerator.windows.engine.check_clipping(trainer.args.max_grad_norm or math.inf)
        is_split = accumulation > 1 or trainer.accelerator.num_processes > trainer.get_tp_size()
        prepare_losses(trainer)
        targets_per_micro_batch = unit.settle(inputs, is_split=is_split)
        if unit.shares is not None:
            check_possible(trainer, unit.shares)
        assert unit.counter is not None
        sums = AccumulationWindow(
            trainer.args.device,
            loss_scale=1.0 if unit.counter.is_sum else loss_scale_for(targets_per_micro_batch * accumulation),
            num_replicas=trainer.get_tp_size(),
            is_sum=unit.counter.is_sum,
        )
        trainer.accelerator.windows.of_loss(model).start(sums)
        self.counts.decide(model)
        if self.counts.is_first and (reason := trl_generating.why_not_counted_first(trainer)):
            raise InvalidArgumentError(reason)
        self.accumulation.settled = accumulation

    def window(self, epoch: Iterator[Any], num_batches: int) -> tuple[Sequence[Any] | MicroBatches, Any]:
        """The next window's batches; and their count, if it is known first."""
        batches = self._batches.window(epoch, self.accumulation.num_batches(epoch, num_batches))
        self.accumulation.drawn = batches
        if not batches:
            return [], None
        if self.accumulation.settled is None:
            self._settle(self._trainer.model_wrapped, self._batches.first())
        elif not self.accumulation.is_settled:  # a callback has changed it, and with it perhaps the need of counts
            batches = list(batches)
            self._settle(self._trainer.model_wrapped, batches[0])
        if not self.counts.is_first:
            return batches, None
        if self._trainer.accelerator.windows.of_loss(self._trainer.model_wrapped).is_open:
            raise InvalidArgumentError(
                "an epoch ended inside a window, whose targets were counted first, also those of batches that never "
                "came: set control.should_epoch_stop in on_step_end, not in on_substep_end"
            )
        batches = list(batches)
        self.accumulation.drawn = range(len(batches))
        self._settle(self._trainer.model_wrapped, batches[0])
        count = self.counts.expect(batches)
        self.first_pass.run(batches)
        return batches, count

    def window_of(
        self, override: Callable[..., Any], epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Sequence[Any], Any]:
        """The next window's batches and their count by a user's ``get_batch_samples``."""
        num_batches = self.accumulation.num_batches(epoch_iterator, num_batches)
        with self.counts.handing():
            batches, count = override(self._batches.draws(epoch_iterator, num_batches), num_batches, device)
        self._batches.check_padding(batches)
        self.accumulation.drawn = range(len(batches))
        if len(batches):
            self._settle(self._trainer.model_wrapped, batches[0])
            self.counts.check_handed(count)
            window = self._trainer.accelerator.windows.of_loss(self._trainer.model_wrapped)
            self.counts.check_length(batches, num_batches, is_open=window.is_open)
            if not window.is_open:
                self.counts.expect(batches, hands_count=False)
                self.first_pass.run(batches)
        return batches, count

    def close_window(self, model: nn.Module, max_norm: float) -> Tensor:
        """Make the gradient the exact mean and clip it; returns its norm before. Collectives: as ``Windows.close``."""
        trainer, windows = self._trainer, self._trainer.accelerator.windows
        self.raise_pending()
        window = windows.of_loss(model)
        if window.sums.is_empty and window.num_closed > self._num_closed:
            # The user's own step has clipped; another norm is another clip.
            if max_norm < math.inf:
                trainer.accelerator.clip_grad_norm_(model.parameters(), max_norm)
            report, is_taken = windows.report, True
            assert report is not None
        else:
            if window.sums.is_empty:
                check_weighted(model.parameters())
            report, is_taken = windows.close(window, max_norm, step=trainer.state.global_step + 1)
        if windows.has_data_left is not None:
            self._batches.num_ranks_with_data = report.num_ranks_with_data
        if windows.is_pending:
            self._counters = Counters(trainer.state.global_step, trainer.lr_scheduler, trainer.optimizer)
        if self._log is None:
            self._log = RunningLog(trainer.args.device)
        was_logged = trainer._globalstep_last_logged == trainer.state.global_step
        self._log.add(report, is_taken=is_taken, starts_anew=was_logged)
        # Trainer has added each micro-batch's own mean to this; the loss of the steps replaces that sum.
        trainer._tr_loss.copy_(self._log.loss)
        self._is_checked = False
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
