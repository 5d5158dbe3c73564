"""accelerate's Accelerator on top of the accumulation window."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_gradutils import environment, upstream
from hf_gradutils.dist_utils import clip_parameters
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError, TargetCountError
from hf_gradutils.first_rank import FirstRankPerNode
from hf_gradutils.model_windows import ModelWindow, ModelWindows
from hf_gradutils.norms import check_norm_type
from hf_gradutils.optimizer import GradUtilsOptimizer, StepOrder, as_flag, why_not_on_device
from hf_gradutils.ownership import trainable_parameters
from hf_gradutils.partial_gradients import sum_increments
from hf_gradutils.plugin import GradUtilsPlugin
from hf_gradutils.reduction import reduce_packed, world_domain
from hf_gradutils.scaling import check_max_norm
from hf_gradutils.steps import Counters
from hf_gradutils.sync import SyncContext, find_wrappers
from hf_gradutils.sync_auto import PolicyChoice
from hf_gradutils.uneven import is_padding, padded_to_the_same_number
from hf_gradutils.window import AccumulationWindow, WindowReport, loss_scale_for


class GradUtilsAccelerator(Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator``, exact: the gradient of one process with the whole batch.

        accelerator = GradUtilsAccelerator(gradient_accumulation_plugin=GradUtilsPlugin(num_steps=4))
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss, num_targets=count_targets(batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    The loss is the micro-batch's own mean over its targets, undivided. Gradients in ``.grad`` are weighted sums until
    the window ends; clipping or the optimizer step, whichever comes first, makes them the exact mean.

    Args:
        *args: As accelerate takes them.
        gradient_accumulation_plugin: Settings; accelerate's own plugin sets what it has.
        gradient_accumulation_steps: Micro-batches of a window, where the plugin does not say; else what ``accelerate
            launch --gradient_accumulation_steps`` says, else 1.
        **kwargs: As accelerate takes them.

    Raises:
        InvalidArgumentError: two numbers of steps; or DeepSpeed, Megatron-LM or XLA, which scale gradients themselves.
    """

    report: WindowReport | None
    """Of the window that ended last: loss, number of targets, gradient norm, exact over all ranks. Tensors on the
    device; reading one on the host waits for it."""
    _plugin: GradUtilsPlugin
    _windows: ModelWindows
    _current: tuple[nn.Module, ...] | None
    """The models of the ``accumulate`` or ``no_sync`` that is open."""
    _micro_batch: object | None
    """Stands for the ``accumulate`` that is open."""
    _counted: "_Counted | None"
    _policy_choice: PolicyChoice
    _wrappers: dict[nn.Module, list[tuple[str, nn.Module]]]
    """Of each model, for the window that is open: looking for them takes a walk over all modules."""
    _unscaled: list[Optimizer]
    """Optimizers whose gradients have lost fp16's scale in this step."""
    _counters: list[tuple[Any, Counters]]
    """Prepared schedulers, and their state before a step that the device may have left out."""

    def __init__(
        self,
        *args: Any,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        gradient_accumulation_steps: int | None = None,
        **kwargs: Any,
    ):
        plugin = gradient_accumulation_plugin or GradUtilsPlugin()
        if not isinstance(plugin, GradUtilsPlugin):
            plugin = GradUtilsPlugin(**vars(plugin))
        num_steps = {plugin.num_steps, gradient_accumulation_steps} - {None}
        if len(num_steps) > 1:
            raise InvalidArgumentError(
                f"expected one number of micro-batches, got gradient_accumulation_steps={gradient_accumulation_steps} "
                f"and GradUtilsPlugin(num_steps={plugin.num_steps}); leave out gradient_accumulation_steps"
            )
        steps = num_steps.pop() if num_steps else environment.read_accumulation_steps() or 1
        super().__init__(*args, gradient_accumulation_plugin=plugin.of_accelerate(steps), **kwargs)
        if self.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
            raise InvalidArgumentError(
                f"expected DDP, FSDP, tensor or context parallelism, got {self.distributed_type.value}, which scales "
                "and clips gradients itself; use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2), which shards "
                "what ZeRO-3 shards"
            )
        self._equip(plugin)

    @classmethod
    def adopt(cls, accelerator: Accelerator, plugin: GradUtilsPlugin) -> "GradUtilsAccelerator":
        """Turn an Accelerator, as the Trainer builds it by name, into one of ours, in place."""
        accelerator.__class__ = cls
        accelerator._equip(plugin)
        return accelerator

    def _equip(self, plugin: GradUtilsPlugin) -> None:
        self.report = None
        self._plugin = plugin
        self._current, self._counted, self._micro_batch = None, None, None
        self._wrappers, self._unscaled, self._counters = {}, [], []
        each_batch = self.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        self._policy_choice = PolicyChoice(plugin.effective_sync(each_batch=each_batch), self.device)
        self.forget_windows()

    # ---- Preparing ----

    def local_main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, but the others learn how it ended, and no process group limits the time."""
        return FirstRankPerNode()

    def main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, with each node's first rank before the rest of its node; see ``FirstRankPerNode``."""
        return FirstRankPerNode(scope="world")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As in accelerate."""
        prepared = super().prepare(*args, **kwargs)
        for model in self._models:
            sum_increments(model)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As in accelerate; a model that is sharded already (transformers' ``DistributedConfig``) is left as it is."""
        is_sharded = not self.is_fsdp2 and any(isinstance(p, DTensor) for p in model.parameters())
        return super().prepare_model(model, device_placement, evaluation_mode or is_sharded)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> GradUtilsOptimizer:
        """As in accelerate; the optimizer takes its steps the way the windows were closed.

        Raises:
            InvalidArgumentError: the scaling is to be folded into an optimizer that cannot do it.
        """
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
        return super().free_memory(*objects)

    # ---- A micro-batch ----

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """As in accelerate, with the communication that ``sync`` asks for. The loss inside trains these models."""
        before, self._micro_batch = self._micro_batch, object()
        try:
            with super().accumulate(*models), self._training(models), contextlib.ExitStack() as contexts:
                for model in models:
                    contexts.enter_context(self.sync_context(model))
                yield
        finally:
            self._micro_batch = before

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """A micro-batch that does not end its window, whatever wraps the model; ``sync`` says what it communicates."""
        with self._training((model,)), self._sync_context(model, is_last=False):
            yield

    @contextlib.contextmanager
    def _training(self, models: tuple[nn.Module, ...]) -> Iterator[None]:
        before, self._current = self._current, models
        try:
            yield
        finally:
            self._current = before

    def sync_context(self, model: nn.Module) -> SyncContext:
        """The forward and backward of one micro-batch; it ends its window if ``sync_gradients`` says so."""
        return self._sync_context(model, is_last=self.sync_gradients)

    def _sync_context(self, model: nn.Module, *, is_last: bool) -> SyncContext:
        policy = self._policy_choice.policy(model, is_last=is_last)
        if model not in self._wrappers:
            self._wrappers[model] = find_wrappers(model)
        return SyncContext(model, policy, is_last=is_last, wrappers=self._wrappers[model])

    @contextlib.contextmanager
    def one_micro_batch(self, model: nn.Module) -> Iterator[None]:
        """What :meth:`count` says inside holds for every ``backward`` inside, and is forgotten at the end."""
        with self._training((model,)), self.sync_context(model):
            try:
                yield
            finally:
                self._counted = None

    def count(self, num_targets: Tensor, weight: Tensor) -> None:
        """Say how many targets the micro-batch has, and what turns its loss into the sum over them."""
        self._counted = _Counted(num_targets, weight)

    def backward(
        self,
        loss: Tensor,
        num_targets: Tensor | int | None = None,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        """Backward of a micro-batch's own mean loss, weighted by its targets.

        Args:
            loss: Shape (). Several terms are added first.
            num_targets: What the loss is a mean over, on this rank: a whole number, or a tensor of one element. A
                tensor on the device costs no host sync.
            model: What the loss trains; default: the models of ``accumulate``, else the only one that was prepared.
            **kwargs: As accelerate takes them.

        Collectives: none of its own; under fp16 one all-reduce in the first call for a model. Host syncs: none.

        Raises:
            TargetCountError: nobody said how many targets the micro-batch has.
            InvalidArgumentError: ``num_targets`` is not one number; it is not known which models the loss trains;
                or their window has ended in this micro-batch.
        """
        counted = self._counted
        if num_targets is not None:
            number = _as_number(num_targets, loss.device)
            counted = _Counted(number, number)
        if counted is None:
            raise TargetCountError(
                "expected the number of targets of this micro-batch, got none; call "
                "accelerator.backward(loss, num_targets=(labels != -100).sum())"
            )
        if is_padding(self.gradient_state.active_dataloader):
            counted = _Counted(torch.zeros_like(counted.num_targets), torch.zeros_like(counted.weight))
        window = self.window_of(model)
        self._check_one_loss(window, kwargs)
        if not window.is_open and not any(other.is_open for other in self._windows):
            self._update_scale()
        if not window.has_scale:
            self._choose_loss_scale(window, counted.num_targets)
        window.is_open = True
        weighed = window.sums.weigh(loss, *counted)
        if self.gradient_accumulation_steps != 1:  # accelerate divides by it
            weighed = weighed * self.gradient_accumulation_steps
        super().backward(weighed, **kwargs)

    def _check_one_loss(self, window: ModelWindow, options: dict[str, Any]) -> None:
        if self._micro_batch is None:
            return
        if window.ended_in is self._micro_batch:
            raise InvalidArgumentError(
                "expected one loss per model in a micro-batch, got another one after the optimizer step; if they train "
                "different models, say which: accelerator.backward(loss, num_targets, model=discriminator)"
            )
        if window.kept_graph_in is self._micro_batch:
            raise InvalidArgumentError(
                "expected one loss per model in a micro-batch, got another one on a graph that was retained; add the "
                "terms and call backward once, or say which models each trains: backward(loss, num_targets, model=…)"
            )
        if options.get("retain_graph"):
            window.kept_graph_in = self._micro_batch

    def _choose_loss_scale(self, window: ModelWindow, num_targets: Tensor) -> None:
        """fp16 needs gradients of the size of a mean's; elsewhere sums are as good. Once, for all ranks alike."""
        window.has_scale = True
        if self.scaler is None and not any(p.dtype == torch.float16 for p in window.parameters()):
            return
        domain = world_domain()
        total, _ = reduce_packed(domain, num_targets.to(self.device, torch.float64).view(1))
        scale = loss_scale_for(total.item() / domain.num_ranks * self.gradient_accumulation_steps)
        window.sums = AccumulationWindow(self.device, loss_scale=scale, num_replicas=self._num_replicas(window.models))

    # ---- Windows ----

    def forget_windows(self) -> None:
        """Start over: forget the micro-batches so far, together with the gradients that the caller drops."""
        self._windows = ModelWindows(self._make_window)
        self._holders: dict[tuple[int, ...], nn.Module] = {}

    def _make_window(self, models: tuple[nn.Module, ...]) -> ModelWindow:
        sums = AccumulationWindow(self.device, num_replicas=self._num_replicas(models))
        return ModelWindow(models, sums, self._plugin.guard())

    def _num_replicas(self, models: tuple[nn.Module, ...]) -> int:
        """How many ranks see the same batch: those of tensor parallelism, as transformers or accelerate set it up."""
        sizes = [getattr(_inside(model), "_tp_size", None) or 1 for model in models]
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
        if any(model is prepared for prepared in self._models):
            return model
        return next((p for p in self._models if _inside(p) is _inside(model)), model)

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float | None = None
    ) -> Tensor:
        """Make the gradients the exact mean, and clip these to ``max_norm``.

        Args:
            parameters: All that the loss trains, or some of it, or another model's.
            max_norm: Greater than 0; inf measures without clipping.
            norm_type: p of the norm; default: the plugin's, 2.

        Returns:
            Their norm before clipping, shape (), float64, on the device.

        Collectives: one all-reduce over all ranks; one more for some of a window's parameters, or other ones. Host
            syncs: as :meth:`close_window`.

        Raises:
            InvalidArgumentError: the window goes on after this micro-batch.
            NonfiniteGradientError: as the plugin's ``on_nonfinite`` says.
        """
        self._check_at_end("clip_grad_norm_")
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        max_norm = check_max_norm(max_norm)
        p = self._plugin.norm_type if norm_type is None else check_norm_type(norm_type)
        windows = self._windows.with_any_of(parameters)
        if len(windows) == 1 and windows[0].is_open and windows[0].is_all(parameters) and p == self._plugin.norm_type:
            return self._close(windows[0], max_norm)[0].grad_norm
        self._close_all(windows)
        holder, trained = self._holder_of(parameters)
        return clip_parameters(holder, trained, max_norm, norm_type=p, ownership=self._plugin.ownership)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Make the gradients the exact mean, and limit every element of these to ±``clip_value``, sharded or not.

        Collectives: one all-reduce over all ranks. Host syncs: as :meth:`close_window`.

        Raises:
            InvalidArgumentError: as :meth:`clip_grad_norm_`; ``clip_value`` ≤ 0; or a gradient is not summed over its
                mesh yet.
        """
        self._check_at_end("clip_grad_value_")
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not clip_value > 0:
            raise InvalidArgumentError(f"clip_value must be > 0, got {clip_value}")
        self._close_all(self._windows.with_any_of(parameters))
        for parameter in parameters:
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
                raise InvalidArgumentError(
                    f"expected summed gradients, got one with placements {gradient.placements}; use clip_grad_norm_"
                )
            if gradient is not None:
                upstream.local_tensor(gradient.detach()).clamp_(-clip_value, clip_value)

    def _holder_of(self, parameters: Sequence[Tensor]) -> tuple[nn.Module, list[nn.Parameter]]:
        """A module that knows all of these by name, and those that are trained, in its order."""
        key = tuple(id(p) for p in parameters)
        if key not in self._holders:
            wanted, modules = set(key), [*(window.whole for window in self._windows), *self._models]
            found: list[nn.Module] = []
            for module in modules:
                own = {id(p) for p in module.parameters()}
                if own & wanted:
                    found.append(module)
                    wanted -= own
            self._holders[key] = nn.ParameterList(parameters) if wanted else _as_one(found)
        ids = set(key)
        return self._holders[key], [p for p in trainable_parameters(self._holders[key]) if id(p) in ids]

    def _check_at_end(self, name: str) -> None:
        if not self.sync_gradients:
            raise InvalidArgumentError(
                f"expected {name} at the end of a window, got it before; write `if accelerator.sync_gradients:` above"
            )

    def _close_all(self, windows: Iterable[ModelWindow]) -> None:
        for window in windows:
            if window.is_open:
                self._close(window, math.inf, folds=False)

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
        prepared = [o for o in upstream.optimizers_of(self) if isinstance(o, GradUtilsOptimizer)]
        optimizers = self._windows.optimizers_of(window, prepared)
        self._check_folding(optimizers)  # again: loading a checkpoint may change what is fused
        self.settle()
        folds = folds and plugin.fold_into_optimizer
        self._policy_choice.window_closed()
        self._wrappers.clear()
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
        window.is_open, window.ended_in = False, self._micro_batch
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
            window.guard.judge_later(report, step)
            return StepOrder(skip_flag=as_flag(report.is_finite))
        return StepOrder(skip=not window.guard.judge(report, step))

    # ---- Optimizer steps ----

    def _before_step(self, optimizer: GradUtilsOptimizer) -> None:
        """End the windows that the optimizer steps on and that nothing has ended yet."""
        prepared = [o for o in upstream.optimizers_of(self) if isinstance(o, GradUtilsOptimizer)]
        for window in self._windows:
            if window.is_open and any(o is optimizer for o in self._windows.optimizers_of(window, prepared)):
                self._close(window, math.inf)

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """As in accelerate, once per optimizer and step however often it is called."""
        if self.scaler is None:
            return
        if optimizer is None:
            optimizer = upstream.optimizers_of(self)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        optimizers = [o for o in optimizers if not any(o is known for known in self._unscaled)]
        super().unscale_gradients(optimizers)
        self._unscaled += optimizers

    def _update_scale(self) -> None:
        """Let fp16's scale change: between windows only, for gradients of one window share one scale."""
        stepped = [o for o in self._unscaled if isinstance(o, GradUtilsOptimizer) and o.awaits_update]
        if stepped:
            self.scaler.update()
            self._unscaled.clear()
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

    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Ranks with fewer batches than others go through their last one again, and it counts for nothing.

        As accelerate's, but in every layout, and also with accumulation. ``even_batches=False`` is what makes ranks
        differ; otherwise accelerate fills them up with samples that count twice.
        """
        return padded_to_the_same_number(self._dataloaders, self.even_batches if even_batches is None else even_batches)


class _Counted(NamedTuple):
    num_targets: Tensor
    weight: Tensor


def uses_exact_arithmetic(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether a loss is the same however its batch is composed, up to float32 rounding."""
    return (
        accelerator.mixed_precision == "no"
        and all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
        and not (accelerator.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest")
    )


def _as_number(num_targets: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(num_targets, Tensor) and num_targets.numel() == 1:
        return num_targets.detach().reshape(())
    if isinstance(num_targets, int | float) and not isinstance(num_targets, bool) and num_targets >= 0:
        return torch.full((), float(num_targets), dtype=torch.float64, device=device)
    got = f"a tensor of shape {tuple(num_targets.shape)}" if isinstance(num_targets, Tensor) else repr(num_targets)
    raise InvalidArgumentError(
        f"num_targets must be one number ≥ 0, what the loss is a mean over on this rank, got {got}; for labels of "
        "causal language modelling: (labels[:, 1:] != -100).sum()"
    )


def _inside(model: nn.Module) -> nn.Module:
    """The model without wrappers.

    ``unwrap_model`` would take DDP out of a compiled model for good.
    """
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _as_one(modules: Sequence[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)
