"""An Accelerator that keeps windows of micro-batches: who opens one, and all from its end to the optimizer's step."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_gradutils._devices import on_device
from hf_gradutils.accelerator._half_precision import HalfParameters, accumulates_in_float32
from hf_gradutils.accelerator._model_windows import ModelWindow, ModelWindows
from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer, StepOrder, as_flag, innermost, why_not_on_device
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._rollback import Counters
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError
from hf_gradutils.sync import PolicyChoice, discard_deferred, find_wrappers
from hf_gradutils.upstream.accelerate import optimizers_of
from hf_gradutils.upstream.dtensor import unscaling_local_parts
from hf_gradutils.window import AccumulationWindow, WindowReport


class WindowedAccelerator(Accelerator):  # type: ignore[misc]
    """What ``GradUtilsAccelerator`` stands on: windows per model, and optimizers that step the way theirs ended."""

    report: WindowReport | None
    """Of the window that ended last: loss, number of targets, gradient norm, exact over all ranks. Tensors on the
    device; reading one on the host waits for it."""
    _plugin: GradUtilsPlugin
    _windows: ModelWindows
    _current: tuple[nn.Module, ...] | None
    """The models of the micro-batch that is open: of ``accumulate``, ``no_sync`` or ``one_micro_batch``."""
    _micro_batch: object | None
    """Stands for the ``accumulate`` that is open."""
    _policy_choice: PolicyChoice
    _wrappers: dict[nn.Module, list[tuple[str, nn.Module]]]
    """Of each model; looking for them takes a walk over all modules. Until something is prepared."""
    _prepared_as: dict[nn.Module, nn.Module]
    """A model as the loop has it, wrapped or not → what accelerate has prepared. Until something is prepared."""
    _outermost: dict[nn.Module, nn.Module]
    """A model without wrappers → as accelerate has wrapped it."""
    _accumulates_wide: bool
    """Gradients of parameters in half precision are accumulated in float32."""
    _widens_gradients: bool
    """FSDP2 accumulates in float32 what stock accelerate accumulates in half precision."""
    _half_parameters: dict[nn.Module, HalfParameters]
    """Of each model, as in ``_prepared_as``, whose gradients are accumulated in float32."""
    _unscaled: list[Optimizer]
    """Optimizers whose gradients have lost fp16's scale in this step."""
    _found_inf: dict[int, list[Tensor]]
    """id of an optimizer in this step's ``_unscaled`` → the flags that its step asks whether to leave it out."""
    _counters: list[tuple[Any, Counters]]
    """Prepared schedulers, and their state before a step that the device may have left out."""

    def _keep_windows(self, plugin: GradUtilsPlugin, *, num_micro_batches: int, widens_gradients: bool) -> None:
        if self.device.type == "mps":
            raise InvalidArgumentError(
                "expected CPU or a device that has float64, in which counts and norms are summed, got MPS; pass "
                "cpu=True to the Accelerator, or use_cpu=True to TrainingArguments"
            )
        self.report = None
        self._plugin = plugin
        self._current, self._micro_batch = None, None
        self._unscaled, self._found_inf, self._counters = [], {}, []
        self._accumulates_wide = accumulates_in_float32(plugin.accumulate_in_float32, num_micro_batches)
        self._widens_gradients = widens_gradients
        each_batch = self.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        sync = plugin.effective_sync(each_batch=each_batch, widens_gradients=widens_gradients)
        self._policy_choice = PolicyChoice(sync, self.device)
        self._half_parameters, self._outermost = {}, {}
        self.forget_windows()

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> GradUtilsOptimizer:
        """As in accelerate; the optimizer takes its steps the way the windows were closed.

        Raises:
            InvalidArgumentError: the scaling is to be folded into an optimizer that cannot do it; or it steps inside
                of ``backward``, before the window has ended.
        """
        kind = type(innermost(optimizer))
        if kind.__module__.partition(".")[0] == "lomo_optim":
            raise InvalidArgumentError(
                f"expected an optimizer that steps after the backward of a whole window, got {kind.__name__}, which "
                "steps inside of it; use another one"
            )
        self._check_folding([optimizer])
        prepared = super().prepare_optimizer(optimizer, device_placement)
        return GradUtilsOptimizer.adopt(prepared, self._before_step)

    def _check_folding(self, optimizers: Sequence[Optimizer]) -> None:
        if not self._plugin.fold_into_optimizer:
            return
        reasons = [reason for optimizer in optimizers if (reason := why_not_on_device(optimizer)) is not None]
        if self.scaler is not None:
            reasons.append("fp16's GradScaler puts its own scale in the same place")
        if reasons:
            raise InvalidArgumentError(
                f"expected an optimizer that scales gradients itself for fold_into_optimizer=True, but {reasons[0]}; "
                "leave out fold_into_optimizer, or use a fused AdamW: torch.optim.AdamW(…, fused=True), "
                "optim='adamw_torch_fused' of the Trainer"
            )

    def free_memory(self, *objects: Any) -> Any:
        """As in accelerate."""
        self.forget_windows()
        self._outermost.clear()
        return super().free_memory(*objects)

    # ---- Windows ----

    def forget_windows(self) -> None:
        """Start over: forget the micro-batches so far, together with the gradients that the caller drops."""
        self._round_all()
        self._windows = ModelWindows(self._make_window)
        self._wrappers, self._prepared_as, self._half_parameters = {}, {}, {}

    def discard_window(self, model: nn.Module | Sequence[nn.Module] | None = None) -> None:
        """Give up the micro-batches of a window, after an exception say: their gradients, sent or not, and their sums.

        Args:
            model: As in :meth:`GradUtilsAccelerator.backward`.

        Collectives: none; every rank calls it.
        """
        window = self.window_of(model)
        discard_deferred(window.whole)
        self._round_gradients(window)
        window.sums.discard()
        window.is_open = False
        self.step = 0

    def _make_window(self, models: tuple[nn.Module, ...]) -> ModelWindow:
        sums = AccumulationWindow(self.device, num_replicas=self._num_replicas(models))
        return ModelWindow(models, sums, self._plugin.guard())

    def _num_replicas(self, models: tuple[nn.Module, ...]) -> int:
        """How many ranks see the same batch: those of tensor parallelism, as transformers or accelerate set it up."""
        sizes = [getattr(without_wrappers(model), "_tp_size", None) or 1 for model in models]
        config = self.parallelism_config
        return max(*sizes, config.tp_size if config is not None else 1)

    def window_of(self, model: nn.Module | Sequence[nn.Module] | None = None) -> ModelWindow:
        """The window that a loss of these models belongs to; default as in :meth:`backward`."""
        if model is not None:
            models = (model,) if isinstance(model, nn.Module) else tuple(model)
        elif self._current is not None:
            models = self._current
        else:
            models = tuple(m for m in self._models if any(p.requires_grad for p in m.parameters()))
            if len(models) != 1:
                raise InvalidArgumentError(
                    f"expected to know which model the loss trains, got {len(models)} prepared ones; call backward "
                    "inside `with accelerator.accumulate(model):`, or pass it: backward(loss, num_targets, model=model)"
                )
        return self._windows.of_models([self._prepared(m) for m in models])

    def _prepared(self, model: nn.Module) -> nn.Module:
        """The model as it was prepared, if this is what is inside."""
        if model not in self._prepared_as:  # asked in every micro-batch, and slow to find out
            inside = without_wrappers(model)
            self._prepared_as[model] = next((p for p in self._models if without_wrappers(p) is inside), model)
        return self._prepared_as[model]

    def _wrappers_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        if model not in self._wrappers:
            self._wrappers[model] = find_wrappers(self._outermost.get(without_wrappers(model), model))
        return self._wrappers[model]

    def _half_parameters_of(self, model: nn.Module) -> HalfParameters:
        prepared = self._prepared(model)
        if prepared not in self._half_parameters:
            wrapped = self._outermost.get(without_wrappers(model), model)
            with_shards = self._plugin.accumulate_in_float32 is True
            self._half_parameters[prepared] = HalfParameters.of(wrapped, with_shards=with_shards)
        return self._half_parameters[prepared]

    @contextlib.contextmanager
    def rounding_at_the_end(self) -> Iterator[None]:
        """Leave no parameter with wider gradients than its own dtype, also after an exception."""
        try:
            yield
        finally:
            self._round_all()

    def _round_all(self) -> None:
        for half in self._half_parameters.values():
            half.round()

    def _round_gradients(self, window: ModelWindow) -> None:
        """Give optimizers what they ask for: gradients of their parameters' dtype."""
        for model in window.models:
            if (half := self._half_parameters.get(model)) is not None:
                half.round()

    # ---- The end of a window ----

    def close_window(
        self, model: nn.Module, max_norm: float = math.inf, *, step: int, has_data_left: bool | None = None
    ) -> tuple[WindowReport, bool]:
        """Unscale (fp16), make ``.grad`` the exact mean gradient, clip it, and decide whether the step is taken.

        For a loop of its own that does not clip or step through this Accelerator.

        Args:
            model: All of the model that is trained.
            max_norm: Greater than 0; inf does not clip.
            step: The optimizer step that follows, counted from 1; for messages.
            has_data_left: As in :meth:`AccumulationWindow.close`.

        Returns:
            The report, and whether the step is taken as far as the host knows.

        Collectives: one all-reduce over all ranks. Host syncs: none where the optimizer skips on the device or
            ``on_nonfinite="ignore"``, else one.

        Raises:
            NonfiniteGradientError: the gradient of this step is not finite, or that of the step before was not.
        """
        return self._close(self.window_of(model), max_norm, step=step, has_data_left=has_data_left)

    def _close(
        self,
        window: ModelWindow,
        max_norm: float,
        *,
        folds: bool = True,
        step: int | None = None,
        has_data_left: bool | None = None,
    ) -> tuple[WindowReport, bool]:
        plugin = self._plugin
        prepared = [o for o in optimizers_of(self) if isinstance(o, GradUtilsOptimizer)]
        optimizers = self._windows.optimizers_of(window, prepared)
        self._check_folding(optimizers)  # again: loading a checkpoint may change what is fused
        self.settle()
        folds = folds and plugin.fold_into_optimizer
        self._policy_choice.window_closed()
        self.unscale_gradients(optimizers)
        self.report = report = window.sums.close(
            window.whole,
            max_norm,
            norm_type=plugin.norm_type,
            ownership=plugin.ownership,
            norm_groups=plugin.grad_norm_groups,
            scales=not folds,
            has_data_left=has_data_left,
        )
        self._agree_on_overflow(optimizers, report)
        self._round_gradients(window)
        window.is_open, window.is_folded, window.ended_in = False, folds, self._micro_batch
        window.num_closed += 1
        order = self._judge(window, report, optimizers, step or window.num_closed)
        if folds:
            order = replace(order, divisor=report.multiplier.reciprocal().to(torch.float32))
        for optimizer in optimizers:
            optimizer.order = order if optimizer.order is None else optimizer.order.and_then(order)
        return report, not order.skip

    def _judge(
        self, window: ModelWindow, report: WindowReport, optimizers: Sequence[GradUtilsOptimizer], step: int
    ) -> StepOrder:
        if self.scaler is not None:
            return StepOrder()  # it skips by itself, and lowers its scale
        on_device = bool(optimizers) and all(why_not_on_device(optimizer) is None for optimizer in optimizers)
        if window.guard.on_nonfinite == "raise" and on_device:
            self._counters = [(s, Counters(0, s, s.optimizers[0])) for s in self._schedulers]
            return StepOrder(skip_flag=as_flag(window.guard.judge_later(report, step)))
        return StepOrder(skip=not window.guard.judge(report, step))

    # ---- Optimizer steps ----

    def _before_step(self, optimizer: GradUtilsOptimizer) -> None:
        """End the windows that the optimizer steps on and that nothing has ended yet."""
        prepared = [o for o in optimizers_of(self) if isinstance(o, GradUtilsOptimizer)]
        for window in self._windows:
            if window.is_open and any(o is optimizer for o in self._windows.optimizers_of(window, prepared)):
                self._close(window, math.inf)

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """As in accelerate, once per optimizer and step however often it is called."""
        if self.scaler is None:
            return
        if optimizer is None:
            optimizer = optimizers_of(self)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        optimizers = [o for o in optimizers if not any(o is known for known in self._unscaled)]
        with unscaling_local_parts(self.scaler) as found:
            super().unscale_gradients(optimizers)
        self._unscaled += optimizers
        self._found_inf |= found

    def _agree_on_overflow(self, optimizers: Sequence[Optimizer], report: WindowReport) -> None:
        """Let fp16's scaler leave the step out on every rank if it would on one, by the norm that all have reduced."""
        for optimizer in optimizers:
            for flag in self._found_inf.get(id(innermost(optimizer)), ()):
                torch.maximum(flag, on_device(as_flag(report.is_finite), flag.device), out=flag)

    def _update_scale(self) -> None:
        """Let fp16's scale change: between windows only, for gradients of one window share one scale."""
        stepped = [o for o in self._unscaled if isinstance(o, GradUtilsOptimizer) and o.awaits_update]
        if stepped:
            self.scaler.update()
            self._unscaled.clear()
            self._found_inf.clear()
            for optimizer in stepped:
                optimizer.awaits_update = False

    def settle(self) -> None:
        """Raise if a step was left out on the device that nobody on the host knows of yet.

        Called at the next window's end, by ``save_state`` and by ``end_training``.

        Raises:
            NonfiniteGradientError: one was; schedulers are as before that step.
        """
        try:
            for window in self._windows:
                window.guard.settle()
        except NonfiniteGradientError:
            for scheduler, counters in self._counters:
                counters.restore(scheduler, scheduler.optimizers[0])
            raise

    @property
    def is_unsettled(self) -> bool:
        """Whether a step may have been left out on the device that nobody on the host knows of yet."""
        return any(window.guard.is_pending for window in self._windows)

    @property
    def num_skipped_steps(self) -> int:
        """Steps left out so far because of gradients that were not finite; fp16's overflows not counted."""
        return sum(window.guard.num_skipped for window in self._windows)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """As in accelerate, once it is sure that the last step was a good one."""
        self.settle()
        self._update_scale()
        return super().save_state(*args, **kwargs)

    def end_training(self) -> None:
        """As in accelerate, once it is sure that the last step was a good one."""
        self.settle()
        super().end_training()


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model without wrappers.

    ``unwrap_model`` would take DDP out of a compiled model for good.
    """
    inside: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inside
