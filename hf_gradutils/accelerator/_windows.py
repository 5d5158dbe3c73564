"""The windows of an Accelerator: the micro-batches that open one, and its end, up to the optimizer's step."""

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_gradutils.accelerator._deepspeed import Engine, close_by_engine
from hf_gradutils.accelerator._first_window import NOT_WEIGHTED, OF_NO_MODEL, check_weighted
from hf_gradutils.accelerator._half_precision import accumulates_in_float32, reduce_in_float32
from hf_gradutils.accelerator._loss_parameters import LossParameters
from hf_gradutils.accelerator._loss_scale import LossScale
from hf_gradutils.accelerator._micro_batch import MicroBatch
from hf_gradutils.accelerator._model_windows import ModelWindow, ModelWindows, parameters_of
from hf_gradutils.accelerator._optimizer import (
    GradUtilsOptimizer,
    StepOrder,
    as_flag,
    check_can_scale,
    why_not_on_device,
)
from hf_gradutils.accelerator._outside_changes import OutsideChanges
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._prepared import PreparedModels, without_wrappers
from hf_gradutils.accelerator._rollback import Counters
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from hf_gradutils.sync import PolicyChoice, SyncContext, communicates, discard_deferred, shard_again
from hf_gradutils.upstream.accelerate import models_of, optimizers_of, schedulers_of
from hf_gradutils.window import AccumulationWindow, WindowReport


class Windows:
    """A window for the models of each loss, and the order that its end gives to the optimizers.

    Args:
        accelerator: Has prepared the models, optimizers and schedulers.
        plugin: Settings.
        num_micro_batches: Micro-batches per window.

    Raises:
        InvalidArgumentError: the device has no float64.
    """

    def __init__(self, accelerator: Accelerator, plugin: GradUtilsPlugin, *, num_micro_batches: int):
        if accelerator.device.type == "mps":
            raise InvalidArgumentError(
                "MPS has no float64, in which counts and norms are summed; pass cpu=True to the Accelerator, or "
                "use_cpu=True to TrainingArguments"
            )
        self.plugin = plugin
        self.num_micro_batches = num_micro_batches
        self.widens_gradients = reduce_in_float32(accelerator)
        """FSDP2 accumulates gradients in float32 that stock accelerate accumulates in half precision."""
        self.report: WindowReport | None = None
        self.models: tuple[nn.Module, ...] | None = None
        """The models that a loss trains now: those of ``accumulate``, ``no_sync`` or ``one_micro_batch``."""
        self.micro_batch: MicroBatch | None = None
        """The micro-batch of ``accumulate`` or ``one_micro_batch``."""
        self.has_data_left: bool | None = None
        """Of a Trainer's loader, after this micro-batch; as in :meth:`AccumulationWindow.close`, whoever closes."""
        self.prepared = PreparedModels(accelerator, with_half_shards=plugin.accumulate_in_float32 is True)
        self.engine: Engine | None = None
        """DeepSpeed's, once it is prepared."""
        self.loss_parameters = LossParameters()
        self.loss_scale = LossScale(accelerator)
        self.accelerator = accelerator
        has_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
        is_wide = accumulates_in_float32(plugin.accumulate_in_float32, num_micro_batches)
        self.accumulates_wide = is_wide and not has_engine
        self._forgotten: weakref.WeakSet[GradUtilsOptimizer] = weakref.WeakSet()
        """Prepared before accelerate freed its memory, as a Trainer does when it begins, and stepping still."""
        self.outside = OutsideChanges(accelerator, self.prepared, moves_gradients=self.accumulates_wide)
        each_batch = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        sync = plugin.effective_sync(each_batch=each_batch, widens_gradients=self.widens_gradients)
        self._policy = PolicyChoice(sync, accelerator.device)
        self.forget()

    def forget(self) -> None:
        """Start over without windows; the caller drops the gradients."""
        self.prepared.forget()
        self.outside.forget()
        self.by_models = ModelWindows(self._make)
        self._counters: list[tuple[object, Counters]] = []
        """Schedulers, and their state before a step that the device may have skipped."""

    def _make(self, models: tuple[nn.Module, ...]) -> ModelWindow:
        sums = AccumulationWindow(self.accelerator.device, num_replicas=self.num_replicas(models))
        return ModelWindow(models, sums, self.plugin.guard())

    def num_replicas(self, models: tuple[nn.Module, ...]) -> int:
        """Ranks that see the same batch: those of tensor parallelism, set up by transformers or accelerate."""
        sizes = [getattr(without_wrappers(model), "_tp_size", None) or 1 for model in models]
        config = self.accelerator.parallelism_config
        return max(*sizes, config.tp_size if config is not None else 1)

    @property
    def have_one_micro_batch(self) -> bool:
        """Each window has one, as far as settings tell."""
        return max(self.num_micro_batches, self.accelerator.gradient_accumulation_steps) == 1

    # ---- A micro-batch ----

    @contextlib.contextmanager
    def training(self, models: tuple[nn.Module, ...], micro_batch: MicroBatch | None = None) -> Iterator[None]:
        """Let losses inside train these models, and belong to this micro-batch if one is given."""
        before = self.models, self.micro_batch
        self.models, self.micro_batch = models, micro_batch or self.micro_batch
        try:
            yield
        finally:
            self.models, self.micro_batch = before

    def sync_context(self, model: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward, with the communication of the policy."""
        if self.engine is not None and self.accelerator.sync_gradients and not is_last:
            raise InvalidArgumentError("no_sync has no effect under DeepSpeed; use `accelerator.accumulate(model)`")
        policy = self._policy.policy(model, is_last=is_last)
        wrappers = self.prepared.wrappers(model)
        if self.accumulates_wide:
            self.prepared.half_parameters(model).begin(communicates(policy, is_last=is_last), is_last=is_last)
        return SyncContext(model, policy, is_last=is_last, wrappers=wrappers) if wrappers else contextlib.nullcontext()

    def of_loss(self, model: nn.Module | Sequence[nn.Module] | None = None) -> ModelWindow:
        """The window of a loss that trains these models; default: :attr:`models`, else the only trained one."""
        if model is not None:
            models = (model,) if isinstance(model, nn.Module) else tuple(model)
        elif self.models:
            models = self.models
        else:
            prepared = models_of(self.accelerator)
            models = tuple(m for m in prepared if any(p.requires_grad for p in m.parameters()))
            if len(models) != 1:
                raise InvalidArgumentError(
                    f"cannot tell which of the {len(models)} prepared models this loss trains; call backward inside "
                    "`with accelerator.accumulate(model):`, or pass it: backward(loss, num_targets, model=model)"
                )
        return self.by_models.of_models([self.prepared[m] for m in models])

    @contextlib.contextmanager
    def one_micro_batch(self, model: nn.Module, micro_batch: MicroBatch) -> Iterator[None]:
        """Let every ``backward`` inside train this model on this micro-batch, which may end the window."""
        is_open = self.models == (model,)  # Trainer calls no_sync for all micro-batches but the last
        is_last = self.accelerator.sync_gradients
        with (
            self.training((model,), micro_batch),
            contextlib.nullcontext() if is_open else self.sync_context(model, is_last=is_last),
        ):
            yield

    def forget_dropped(self, window: ModelWindow, micro_batch: MicroBatch | None = None) -> None:
        """Drop a window's sums if its gradients are gone, by ``zero_grad``: only what comes now is wanted."""
        if window.is_open and self.engine is None and self.outside.are_gone(window, micro_batch):
            is_again = micro_batch is not None and micro_batch.counted.pop(window, None) is not None
            window.sums.discard(keeps_count=is_again or not window.needs_counts)
            window.is_open = False

    def discard(self, window: ModelWindow) -> None:
        """Drop a window's gradients, communicated or not, and its sums."""
        if self.engine is not None:
            self.engine.discard()
        discard_deferred(window.whole)
        self.prepared.round_gradients(*window.models)
        window.sums.discard()
        window.is_open, window.first = False, None

    # ---- The end of a window ----

    def close(
        self,
        window: ModelWindow,
        max_norm: float = math.inf,
        *,
        folds: bool = True,
        step: int | None = None,
    ) -> tuple[WindowReport, bool]:
        """Unscale (fp16), make ``.grad`` the exact mean gradient, clip it, and decide whether the step is taken.

        ``folds``: the optimizer may do the scaling, if the plugin says so. ``step``: number of the optimizer step that
        follows, from 1, for messages. Other arguments as in :meth:`AccumulationWindow.close`.

        Returns:
            The report, and False if the host already knows that the step is skipped.

        Collectives: one all-reduce over all ranks. Host syncs: none where the optimizer skips on the device or
            ``on_nonfinite="ignore"``, else one. One more of both if the loss has parameters of its own.

        Raises:
            NonfiniteGradientError: the gradient of this step is not finite, or that of the step before was not.
        """
        if self.micro_batch is not None and self.micro_batch.computed is not None:
            # A step that clips has not returned its loss yet.
            self.micro_batch.report(window, self.micro_batch.computed)
        if self.engine is not None:
            return close_by_engine(self, self.engine, window, max_norm, step or window.num_closed + 1)
        self._shard_again(window)
        self.outside.check(window, ends=True)
        optimizers = self.optimizers_of(window)
        if self.plugin.fold_into_optimizer:
            check_can_scale(optimizers, self.loss_scale.scaler)  # again: a checkpoint may have changed ``fused``
        self.raise_pending()
        folds = folds and self.plugin.fold_into_optimizer
        self._policy.window_closed()
        self.accelerator.unscale_gradients(optimizers)
        self.report = report = window.sums.close(
            window.whole,
            max_norm,
            norm_type=self.plugin.norm_type,
            ownership=self.plugin.ownership,
            norm_groups=self.plugin.grad_norm_groups,
            scales=not folds,
            has_data_left=self.has_data_left,
        )
        self.loss_parameters.close(report.mean_multiplier / report.multiplier if folds else report.mean_multiplier)
        if window.sums.has_new_parameters:
            self.outside.check_averaged(window)
        self.loss_scale.agree_on_overflow(optimizers, report)
        self.prepared.round_gradients(*window.models)
        window.is_folded = folds
        self.end(window)
        order = self._judge(window, report, optimizers, step or window.num_closed)
        if folds:
            order = replace(order, divisor=report.multiplier.reciprocal().float())
        for optimizer in optimizers:
            optimizer.order = order if optimizer.order is None else optimizer.order.and_then(order)
            window.ordered.append((optimizer, optimizer.order))
        return report, not order.skip

    def end(self, window: ModelWindow) -> None:
        """Note that a window has ended."""
        window.is_open = False
        window.num_closed += 1
        self.outside.end(window)
        if self.micro_batch is not None:
            self.micro_batch.ended.append(window)

    def _judge(
        self, window: ModelWindow, report: WindowReport, optimizers: Sequence[GradUtilsOptimizer], step: int
    ) -> StepOrder:
        if self.loss_scale.scaler is not None:
            return StepOrder()  # the scaler skips the step and lowers its scale
        on_device = bool(optimizers) and all(why_not_on_device(optimizer) is None for optimizer in optimizers)
        if window.guard.on_nonfinite == "raise" and on_device:
            schedulers = schedulers_of(self.accelerator)
            self._counters = [(s, Counters(0, s, s.optimizers[0])) for s in schedulers]
            return StepOrder(skip_flag=as_flag(window.guard.judge_later(report, step)))
        return StepOrder(skip=not window.guard.judge(report, step))

    def optimizers_of(self, window: ModelWindow) -> list[GradUtilsOptimizer]:
        """The prepared optimizers that step on gradients of a window."""
        found = [o for o in optimizers_of(self.accelerator) if isinstance(o, GradUtilsOptimizer)]
        found += [o for o in self._forgotten if o not in found]
        return self.by_models.optimizers_of(window, found, self.loss_parameters.ids)

    def before_step(self, optimizer: GradUtilsOptimizer) -> None:
        """Close the open windows whose gradients the optimizer steps on.

        Raises:
            TargetCountError: there are gradients, but no window of theirs has ever had a loss.
        """
        if optimizer not in optimizers_of(self.accelerator):
            self._forgotten.add(optimizer)
        for window in self.by_models:
            self.forget_dropped(window)
            self._shard_again(window)
            if window.is_open and any(o is optimizer for o in self.optimizers_of(window)):
                self.close(window)
        if optimizer.order or self.by_models.with_any_of(parameters_of(optimizer)):
            return
        if not (self.by_models and all(window.is_final for window in self.by_models)):
            check_weighted(parameters_of(optimizer), OF_NO_MODEL if self.by_models else NOT_WEIGHTED)

    def _shard_again(self, window: ModelWindow) -> None:
        for model in window.models:
            shard_again(self.prepared.wrappers(model))

    def raise_pending(self) -> None:
        """Read the verdicts that are still on the device.

        Raises:
            NonfiniteGradientError: the device has skipped a step; schedulers are as before it.
        """
        try:
            for window in self.by_models:
                window.guard.raise_pending()
        except NonfiniteGradientError:
            for scheduler, counters in self._counters:
                counters.restore(scheduler, scheduler.optimizers[0])  # type: ignore[attr-defined]
            raise

    @property
    def is_pending(self) -> bool:
        """True if a step's verdict is still on the device."""
        return any(window.guard.is_pending for window in self.by_models)
