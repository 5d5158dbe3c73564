"""accelerate's Accelerator on top of the accumulation window: what it overrides, and what it adds."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_gradutils.accelerator._clipping import Clipping
from hf_gradutils.accelerator._half_precision import reduce_in_float32, reduce_parameters_in_float32
from hf_gradutils.accelerator._micro_batch import MicroBatch, as_number
from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer, check_can_scale, innermost
from hf_gradutils.accelerator._padding import is_padding, padded_to_the_same_number
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.coordination import FirstRankPerNode
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.gradients.partial_sums import sum_increments
from hf_gradutils.upstream.accelerate import (
    dataloaders_of,
    models_of,
    optimizers_of,
    sharding_tied_embeddings_together,
)
from hf_gradutils.upstream.fsdp import fsdp2_keep_losses
from hf_gradutils.window import WindowReport


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

    windows: Windows
    """Of the models that are trained; for Trainers and checks."""

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
        widens = reduce_in_float32(self)
        self.windows = Windows(self, plugin, num_micro_batches=num_micro_batches, widens_gradients=widens)

    # ---- Preparing ----

    def local_main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, but the others learn how it ended, and no process group limits the time."""
        return FirstRankPerNode()

    def main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, with each node's first rank before the rest of its node; see ``FirstRankPerNode``."""
        return FirstRankPerNode(scope="world")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As in accelerate."""
        self.windows.prepared.forget()
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        if self.windows.plugin.accumulate_in_float32 is True:
            for model in models:
                reduce_parameters_in_float32(self, model)
        with sharding_tied_embeddings_together(models) if self.is_fsdp2 else contextlib.nullcontext():
            prepared = super().prepare(*args, **kwargs)
        for model in models_of(self):
            sum_increments(model)
            if self.windows.widens_gradients and isinstance(model, FSDPModule):
                fsdp2_keep_losses(model)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As in accelerate; a model that is sharded already (transformers' ``DistributedConfig``) is left as it is."""
        is_sharded = not self.is_fsdp2 and any(isinstance(p, DTensor) for p in model.parameters())
        prepared = super().prepare_model(model, device_placement, evaluation_mode or is_sharded)
        self.windows.prepared.add(prepared)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> GradUtilsOptimizer:
        """As in accelerate; the optimizer applies the decision made when its windows closed.

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
        if self.windows.plugin.fold_into_optimizer:
            check_can_scale([optimizer], self.scaler)
        prepared = super().prepare_optimizer(optimizer, device_placement)
        return GradUtilsOptimizer.adopt(prepared, self.windows.before_step)

    def free_memory(self, *objects: Any) -> Any:
        """As in accelerate."""
        self.windows.forget()
        self.windows.prepared.forget_models()
        return super().free_memory(*objects)

    # ---- A micro-batch ----

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """As in accelerate, with the communication that ``sync`` asks for. The loss inside trains these models."""
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
        """A micro-batch that does not end its window, whatever wraps the model; ``sync`` says what it communicates."""
        with self.windows.training((model,)), self.windows.sync_context(model, is_last=False):
            yield

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
            TargetCountError: the number of targets was not given.
            InvalidArgumentError: ``num_targets`` is not one number; it is not known which models the loss trains;
                or their window has ended in this micro-batch.
        """
        micro_batch = self.windows.micro_batch or MicroBatch()
        targets, weight = micro_batch.num_targets, micro_batch.weight
        if num_targets is not None:
            targets = weight = as_number(num_targets, loss.device)
        if targets is None or weight is None:
            raise TargetCountError(
                "expected the number of targets of this micro-batch, got none; call "
                "accelerator.backward(loss, num_targets=(labels != -100).sum())"
            )
        if micro_batch.is_padding or is_padding(self.gradient_state.active_dataloader):
            targets = weight = torch.zeros_like(targets)
        window = self.windows.of_loss(model)
        micro_batch.check_one_loss(window, retains_graph=bool(kwargs.get("retain_graph")))
        weighted = self.windows.weigh(window, loss, targets, weight)
        with self.windows.reducing(window) if self.sync_gradients else contextlib.nullcontext():
            # As accelerate, but for its division by the number of micro-batches; what it asks further is refused here.
            weighted.backward(**kwargs)  # type: ignore[no-untyped-call]

    # ---- The end of a window ----

    @property
    def report(self) -> WindowReport | None:
        """Of the window that ended last: loss, number of targets, gradient norm, exact over all ranks.

        Tensors on the device; reading one on the host waits for it.
        """
        return self.windows.report

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
        return Clipping(self, self.windows).by_norm(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Make the gradients the exact mean, and limit every element of these to ±``clip_value``, sharded or not.

        Collectives: one all-reduce over all ranks. Host syncs: as :meth:`close_window`.

        Raises:
            InvalidArgumentError: as :meth:`clip_grad_norm_`; ``clip_value`` ≤ 0; or a gradient is not summed over its
                mesh yet.
        """
        Clipping(self, self.windows).by_value(parameters, clip_value)

    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Ranks with fewer batches than others go through their last one again, and it counts for nothing.

        As accelerate's, but in every layout, and also with accumulation. ``even_batches=False`` is what makes ranks
        differ; otherwise accelerate fills them up with samples that count twice.
        """
        return padded_to_the_same_number(
            dataloaders_of(self), self.even_batches if even_batches is None else even_batches
        )

    def discard_window(self, model: nn.Module | Sequence[nn.Module] | None = None) -> None:
        """Give up the micro-batches of a window, after an exception say: their gradients, sent or not, and their sums.

        Args:
            model: As in :meth:`backward`.

        Collectives: none; every rank calls it.
        """
        self.windows.discard(self.windows.of_loss(model))
        self.step = 0

    # ---- After the step ----

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """As in accelerate, once per optimizer and step however often it is called."""
        if optimizer is None:
            optimizer = optimizers_of(self)
        self.windows.loss_scale.unscale([optimizer] if isinstance(optimizer, Optimizer) else list(optimizer))

    @property
    def num_skipped_steps(self) -> int:
        """Steps skipped so far because of gradients that were not finite; fp16's overflows not counted."""
        return self.windows.num_skipped_steps

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """As in accelerate, once it is sure that the last step was a good one."""
        self.windows.settle()
        self.windows.loss_scale.update()
        return super().save_state(*args, **kwargs)

    def end_training(self) -> None:
        """As in accelerate, once it is sure that the last step was a good one."""
        self.windows.settle()
        super().end_training()
