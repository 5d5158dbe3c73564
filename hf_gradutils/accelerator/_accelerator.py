"""accelerate's Accelerator on top of the accumulation window."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_gradutils import _environment
from hf_gradutils._collectives import reduce_packed, world_domain
from hf_gradutils.accelerator._half_precision import reduce_in_float32, reduce_parameters_in_float32
from hf_gradutils.accelerator._model_windows import ModelWindow
from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer
from hf_gradutils.accelerator._padding import is_padding, padded_to_the_same_number
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._windows import WindowedAccelerator, without_wrappers
from hf_gradutils.coordination.first_rank import FirstRankPerNode
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.gradients.clip import clip_parameters
from hf_gradutils.gradients.partial_sums import sum_increments
from hf_gradutils.gradients.power_sums import check_norm_type
from hf_gradutils.gradients.scaling import check_max_norm
from hf_gradutils.sync import SyncContext, communicates, reduces_in_one_dtype
from hf_gradutils.upstream.accelerate import optimizers_of, sharding_tied_embeddings_together
from hf_gradutils.upstream.dtensor import local_tensor
from hf_gradutils.upstream.fsdp import fsdp2_keep_losses
from hf_gradutils.window import AccumulationWindow, loss_scale_for


class GradUtilsAccelerator(WindowedAccelerator):
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

    _counted: "_Counted | None"

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
        steps = num_steps.pop() if num_steps else _environment.read_accumulation_steps() or 1
        super().__init__(*args, gradient_accumulation_plugin=plugin.of_accelerate(steps), **kwargs)
        if self.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
            raise InvalidArgumentError(
                f"expected DDP, FSDP, tensor or context parallelism, got {self.distributed_type.value}, which scales "
                "and clips gradients itself; use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2), which shards "
                "what ZeRO-3 shards"
            )
        self._equip(plugin, steps)

    @classmethod
    def adopt(
        cls, accelerator: Accelerator, plugin: GradUtilsPlugin, *, num_micro_batches: int = 1
    ) -> "GradUtilsAccelerator":
        """Turn an Accelerator, as the Trainer builds it by name, into one of ours, in place.

        Args:
            accelerator: Any of accelerate's own.
            plugin: Settings.
            num_micro_batches: Of a window, which a Trainer counts by itself.
        """
        accelerator.__class__ = cls
        accelerator._equip(plugin, num_micro_batches)
        return accelerator

    def _equip(self, plugin: GradUtilsPlugin, num_micro_batches: int) -> None:
        self._counted = None
        self._keep_windows(plugin, num_micro_batches=num_micro_batches, widens_gradients=reduce_in_float32(self))

    # ---- Preparing ----

    def local_main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, but the others learn how it ended, and no process group limits the time."""
        return FirstRankPerNode()

    def main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, with each node's first rank before the rest of its node; see ``FirstRankPerNode``."""
        return FirstRankPerNode(scope="world")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As in accelerate."""
        self._wrappers, self._prepared_as = {}, {}
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        if self._plugin.accumulate_in_float32 is True:
            for model in models:
                reduce_parameters_in_float32(self, model)
        with sharding_tied_embeddings_together(models) if self.is_fsdp2 else contextlib.nullcontext():
            prepared = super().prepare(*args, **kwargs)
        for model in self._models:
            sum_increments(model)
            if self._widens_gradients and isinstance(model, FSDPModule):
                fsdp2_keep_losses(model)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As in accelerate; a model that is sharded already (transformers' ``DistributedConfig``) is left as it is."""
        is_sharded = not self.is_fsdp2 and any(isinstance(p, DTensor) for p in model.parameters())
        prepared = super().prepare_model(model, device_placement, evaluation_mode or is_sharded)
        self._outermost[without_wrappers(prepared)] = prepared
        return prepared

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

    def sync_context(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The forward and backward of one micro-batch; it ends its window if ``sync_gradients`` says so."""
        return self._sync_context(model, is_last=self.sync_gradients)

    def _sync_context(self, model: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        policy = self._policy_choice.policy(model, is_last=is_last)
        wrappers = self._wrappers_of(model)
        if self._accumulates_wide:
            self._half_parameters_of(model).begin(communicates(policy, is_last=is_last), is_last=is_last)
        return SyncContext(model, policy, is_last=is_last, wrappers=wrappers) if wrappers else contextlib.nullcontext()

    @contextlib.contextmanager
    def one_micro_batch(self, model: nn.Module) -> Iterator[None]:
        """What :meth:`count` says inside holds for every ``backward`` inside, and is forgotten at the end."""
        is_open = self._current == (model,)  # Trainer calls no_sync for all micro-batches but the last
        with contextlib.nullcontext() if is_open else self._micro_batch_of(model):
            try:
                yield
            finally:
                self._counted = None

    @contextlib.contextmanager
    def _micro_batch_of(self, model: nn.Module) -> Iterator[None]:
        with self._training((model,)), self.sync_context(model):
            yield

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
        if self.scaler is not None:
            self._check_scaled(window)
            weighed = self.scaler.scale(weighed)
        with self._last_backward(window) if self.sync_gradients else contextlib.nullcontext():
            # As accelerate, but for its division by the number of micro-batches; what it asks further is refused here.
            weighed.backward(**kwargs)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _last_backward(self, window: ModelWindow) -> Iterator[None]:
        """A backward that reduces: each of several in a micro-batch, and one that no context surrounds."""
        with contextlib.ExitStack() as contexts:
            for model in window.models:
                if self._current is None and self._accumulates_wide:
                    self._half_parameters_of(model).begin(communicates("defer", is_last=True), is_last=True)
                contexts.enter_context(reduces_in_one_dtype(self._wrappers_of(model)))
            yield

    def _check_scaled(self, window: ModelWindow) -> None:
        prepared = [o for o in optimizers_of(self) if isinstance(o, GradUtilsOptimizer)]
        for optimizer in self._windows.optimizers_of(window, prepared) if self._unscaled else ():
            if not optimizer.awaits_update and any(optimizer is known for known in self._unscaled):
                raise InvalidArgumentError(
                    "expected each backward of a step before its gradients are unscaled or clipped (fp16), got one "
                    "after; clip once the losses of all models that the optimizer steps on have gone backward"
                )

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

    # ---- Clipping ----

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
        holder, trained = self._windows.holder_of(parameters, self._models)
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
                local_tensor(gradient.detach()).clamp_(-clip_value, clip_value)

    def _check_at_end(self, name: str) -> None:
        if not self.sync_gradients:
            raise InvalidArgumentError(
                f"expected {name} at the end of a window, got it before; write `if accelerator.sync_gradients:` above"
            )

    def _close_all(self, windows: Iterable[ModelWindow]) -> None:
        for window in windows:
            if window.is_open:
                self._close(window, math.inf, folds=False)
            elif window.is_folded:
                raise InvalidArgumentError(
                    "expected to clip once with fold_into_optimizer=True, because the optimizer multiplies the "
                    "gradients after that, got another clip; leave out fold_into_optimizer"
                )

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
