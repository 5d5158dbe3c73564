"""accelerate's Accelerator on top of accumulation windows: its overrides."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_gradutils.accelerator._clipping import clip_by_norm, clip_by_value
from hf_gradutils.accelerator._copies import CopyableAccelerator
from hf_gradutils.accelerator._counted_first import start_window
from hf_gradutils.accelerator._deepspeed_limits import check_backend
from hf_gradutils.accelerator._deepspeed_optimizer import use_engine
from hf_gradutils.accelerator._half_precision import reduce_parameters_in_float32
from hf_gradutils.accelerator._micro_batch import MicroBatch, as_numbers
from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer, check_can_scale, innermost
from hf_gradutils.accelerator._padding import padded_to_the_same_number
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._shards import ShardingAccelerator
from hf_gradutils.accelerator._weighing import run_backward
from hf_gradutils.accelerator._whole_batch import WholeBatchAccelerator
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.coordination import FirstRankPerNode
from hf_gradutils.gradients.partial_sums import sum_increments
from hf_gradutils.targets.terms import Terms
from hf_gradutils.upstream.accelerate import (
    dataloaders_of,
    models_of,
    optimizers_of,
    sharding_tied_embeddings_together,
)
from hf_gradutils.upstream.deepspeed import clipping_is_set
from hf_gradutils.upstream.fsdp import fsdp2_keep_losses
from hf_gradutils.window import WindowReport


class GradUtilsAccelerator(CopyableAccelerator, ShardingAccelerator, WholeBatchAccelerator):
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
        gradient_accumulation_plugin: Settings; accelerate's own plugin sets the fields that it has.
        gradient_accumulation_steps: Micro-batches of a window if the plugin does not say; else the launcher's, else 1.
        **kwargs: As accelerate takes them.

    Raises:
        InvalidArgumentError: the two numbers of steps differ; or the backend cannot be made exact.
    """

    def __init__(
        self,
        *args: Any,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        gradient_accumulation_steps: int | None = None,
        **kwargs: Any,
    ):
        plugin = GradUtilsPlugin.of(gradient_accumulation_plugin)
        steps = plugin.num_micro_batches(gradient_accumulation_steps)
        super().__init__(*args, gradient_accumulation_plugin=plugin.of_accelerate(steps), **kwargs)
        check_backend(self, kwargs)
        self._add_windows(plugin, steps)

    @classmethod
    def adopt(
        cls, accelerator: Accelerator, plugin: GradUtilsPlugin, *, num_micro_batches: int = 1
    ) -> "GradUtilsAccelerator":
        """Turn an Accelerator of accelerate, which Trainer builds by name, into one of ours, in place."""
        accelerator.__class__ = cls
        accelerator._add_windows(plugin, num_micro_batches)
        return accelerator

    def _add_windows(self, plugin: GradUtilsPlugin, num_micro_batches: int) -> None:
        self.windows = Windows(weakref.proxy(self), plugin, num_micro_batches=num_micro_batches)

    def local_main_process_first(self) -> FirstRankPerNode:
        """Like ``Accelerator.local_main_process_first``, as :class:`FirstRankPerNode`."""
        return FirstRankPerNode()

    def main_process_first(self) -> FirstRankPerNode:
        """Like ``Accelerator.main_process_first``, as ``FirstRankPerNode(scope="world")``."""
        return FirstRankPerNode(scope="world")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        self.windows.prepared.forget_wrappers()
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        if self.windows.plugin.accumulate_in_float32 is True:
            for model in models:
                reduce_parameters_in_float32(self, model)
        says_clipping = clipping_is_set(self)  # before accelerate sets it
        with sharding_tied_embeddings_together(models) if self.is_fsdp2 else contextlib.nullcontext():
            prepared = super().prepare(*args, **kwargs)
        use_engine(self.windows, clipping_is_set=says_clipping)
        for model in models_of(self):
            sum_increments(model)
            if self.windows.widens_gradients and isinstance(model, FSDPModule):
                fsdp2_keep_losses(model)
        self.windows.outside.watch(models_of(self))
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Like ``Accelerator.prepare_model``; a model that transformers has sharded already stays as it is."""
        is_sharded = not self.is_fsdp2 and any(isinstance(p, DTensor) for p in model.parameters())
        prepared = super().prepare_model(model, device_placement, evaluation_mode or is_sharded)
        self.windows.prepared.add(prepared)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> GradUtilsOptimizer:
        """Like ``Accelerator.prepare_optimizer``; the optimizer applies the decision made when its windows closed.

        Raises:
            InvalidArgumentError: the optimizer cannot scale gradients and ``fold_into_optimizer`` is set.
        """
        if self.windows.plugin.fold_into_optimizer:
            check_can_scale([optimizer], self.scaler)
        self.windows.outside.running.optimizers.add(innermost(optimizer))
        prepared = super().prepare_optimizer(optimizer, device_placement)
        return GradUtilsOptimizer.adopt(prepared, self.windows.before_step)

    def free_memory(self, *objects: Any) -> Any:
        self.windows.forget()
        self.windows.engine = None  # which accelerate destroys
        self.windows.prepared.release()
        self.windows.loss_scale.release()
        return super().free_memory(*objects)

    # ---- A micro-batch ----

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Like ``Accelerator.accumulate``; ``sync`` sets the communication, and a loss inside trains these models."""
        with (
            super().accumulate(*models),
            self.windows.training(models, MicroBatch()),
            contextlib.ExitStack() as contexts,
        ):
            for model in models:
                contexts.enter_context(self.windows.sync_context(model, is_last=self.sync_gradients))
            yield

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """A micro-batch that does not end its window, whatever wraps the model; ``sync`` sets its communication."""
        with self.windows.training((model,)), self.windows.sync_context(model, is_last=False):
            yield

    def start_window(
        self,
        num_targets: Tensor | int | Sequence[Tensor | int],
        *,
        num_micro_batches: int | None = None,
        model: nn.Module | Sequence[nn.Module] | None = None,
    ) -> None:
        """Make gradients final in the backward, for DeepSpeed, and for hooks and optimizers that read them there.

        Call it before the first ``backward`` of a window of several micro-batches; one of a single micro-batch does so
        by itself where something reads gradients.

        Args:
            num_targets: Targets of all the window's micro-batches on this rank; for several terms a list.
            num_micro_batches: Those after which ``accumulate`` ends the window; for loops that draw its batches first.
            model: As in :meth:`backward`.

        Collectives: one all-reduce of these numbers over all ranks, beside the first forward. Host syncs: none.

        Raises:
            InvalidArgumentError: ``num_targets`` or ``num_micro_batches`` is no such number; or the window has begun.
        """
        start_window(self.windows, self.windows.of_loss(model), as_numbers(num_targets, self.device), num_micro_batches)

    def backward(
        self,
        loss: Tensor | Terms,
        num_targets: Tensor | int | None = None,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        """Backward of a micro-batch's own mean loss, weighted by its targets.

        Args:
            loss: Shape (). Several in one micro-batch add up, and must be means over the same targets; or means over
                different ones, ``[(loss, num_targets), …]``, which :meth:`start_window` is told first.
            num_targets: Targets that the loss is a mean over, on this rank; a tensor on the device costs no host sync.
            model: The model or models that it trains; default: those of ``accumulate``, else the only one prepared.
            **kwargs: As accelerate takes them.

        Collectives: two all-reduces in the first call for a model; then one in each window of one micro-batch whose
            targets are counted first. Host syncs: none, but in that first call.

        Raises:
            TargetCountError: the number of targets is missing.
            InvalidArgumentError: ``num_targets`` is not one number; the loss may train any of several models; or their
                window has ended in this micro-batch.
        """
        run_backward(self, self.windows, loss, num_targets, model, kwargs)

    # ---- The end of a window ----

    @property
    def report(self) -> WindowReport | None:
        """The last window's loss, number of targets and gradient norm, exact over all ranks; tensors on the device."""
        return self.windows.report

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float | None = None
    ) -> Tensor:
        """Make the gradients the exact mean, and clip these to ``max_norm``.

        Args:
            parameters: All that the loss trains, some of them, or another model's.
            max_norm: Greater than 0; inf measures without clipping.
            norm_type: p of the norm; default: the plugin's, 2.

        Returns:
            Their norm before clipping, shape (), float64, on the device.

        Collectives: one all-reduce over all ranks; one more for some of a window's parameters, or other ones. Host
            syncs: as :meth:`Windows.close`.

        Raises:
            InvalidArgumentError: the window goes on after this micro-batch.
            NonfiniteGradientError: as the plugin's ``on_nonfinite`` says.
        """
        return clip_by_norm(self, self.windows, parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Make the gradients the exact mean, and limit every element of these to ±``clip_value``, sharded or not.

        Collectives: one all-reduce over all ranks. Host syncs: as :meth:`Windows.close`.

        Raises:
            InvalidArgumentError: as :meth:`clip_grad_norm_`; ``clip_value`` ≤ 0; or a gradient is not summed over its
                mesh yet.
        """
        clip_by_value(self, self.windows, parameters, clip_value)

    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Let ranks with fewer batches repeat their last one, with weight zero; in every layout, and accumulating.

        ``even_batches=False`` makes ranks differ; otherwise accelerate fills them up with samples that count twice.
        """
        even_batches = self.even_batches if even_batches is None else even_batches
        return padded_to_the_same_number(dataloaders_of(self), even_batches)

    def discard_window(self, model: nn.Module | Sequence[nn.Module] | None = None) -> None:
        """Drop a window's gradients, communicated or not, and its sums, for example after an exception.

        Args:
            model: As in :meth:`backward`.

        Collectives: none; every rank must call.
        """
        self.windows.discard(self.windows.of_loss(model))
        self.step = 0

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """Like ``Accelerator.unscale_gradients``; repeated calls in one step change nothing."""
        optimizers = optimizers_of(self) if optimizer is None else optimizer
        self.windows.loss_scale.unscale([optimizers] if isinstance(optimizers, Optimizer) else list(optimizers))

    @property
    def num_skipped_steps(self) -> int:
        """Steps skipped so far because their gradient was not finite; overflows of fp16 do not count."""
        return sum(window.guard.num_skipped for window in self.windows.by_models)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``Accelerator.save_state``, after raising what the device found wrong with the last step."""
        self.windows.raise_pending()
        self.windows.loss_scale.update()
        return super().save_state(*args, **kwargs)

    def end_training(self) -> None:
        """Like ``Accelerator.end_training``, after raising what the device found wrong with the last step."""
        self.windows.raise_pending()
        super().end_training()
