"""accelerate's Accelerator on top of the accumulation window."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_gradutils import upstream
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.first_rank import FirstRankPerNode
from hf_gradutils.nonfinite import StepGuard
from hf_gradutils.optimizer import GradUtilsOptimizer, StepOrder, as_flag, why_not_on_device
from hf_gradutils.plugin import GradUtilsPlugin
from hf_gradutils.sync import SyncContext, find_wrappers
from hf_gradutils.sync_auto import PolicyChoice
from hf_gradutils.window import AccumulationWindow, WindowReport


class GradUtilsAccelerator(Accelerator):  # type: ignore[misc]
    """An Accelerator whose ``backward`` weighs each micro-batch by its targets.

    ``GradUtilsTrainer`` makes one of the Accelerator that ``Trainer`` has built; see :meth:`adopt`.
    """

    window: AccumulationWindow
    guard: StepGuard
    _plugin: GradUtilsPlugin
    _counted: "_Counted | None"
    _policy_choice: PolicyChoice
    _wrappers: dict[nn.Module, list[tuple[str, nn.Module]]]
    """Of each model, for the window that is open: looking for them takes a walk over all modules."""

    @classmethod
    def adopt(cls, accelerator: Accelerator, plugin: GradUtilsPlugin) -> "GradUtilsAccelerator":
        """Turn an Accelerator, as the Trainer builds it by name, into one of ours, in place."""
        accelerator.__class__ = cls
        accelerator.window = AccumulationWindow(accelerator.device)
        accelerator.guard = plugin.guard()
        accelerator._plugin = plugin
        accelerator._counted = None
        accelerator._wrappers = {}
        each_batch = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        accelerator._policy_choice = PolicyChoice(plugin.effective_sync(each_batch=each_batch), accelerator.device)
        return accelerator

    def local_main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, but the others learn how it ended, and no process group limits the time."""
        return FirstRankPerNode()

    def main_process_first(self) -> FirstRankPerNode:
        """As in accelerate, with each node's first rank before the rest of its node; see ``FirstRankPerNode``."""
        return FirstRankPerNode(scope="world")

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> GradUtilsOptimizer:
        """As in accelerate; the optimizer takes its steps the way the windows were closed.

        Raises:
            InvalidArgumentError: the scaling is to be folded into an optimizer that cannot do it.
        """
        self._check_folding([optimizer])
        return GradUtilsOptimizer.adopt(super().prepare_optimizer(optimizer, device_placement))

    def _check_folding(self, optimizers: Sequence[Optimizer]) -> None:
        if not self._plugin.fold_into_optimizer:
            return
        reasons = [reason for optimizer in optimizers if (reason := why_not_on_device(optimizer)) is not None]
        if self.scaler is not None:
            reasons.append("fp16's GradScaler puts its own scale in the same place")
        if reasons:
            raise InvalidArgumentError(
                f"expected an optimizer that scales gradients itself for fold_into_optimizer=True, but {reasons[0]}; "
                "leave out fold_into_optimizer, or use optim='adamw_torch_fused'"
            )

    @contextlib.contextmanager
    def one_micro_batch(self) -> Iterator[None]:
        """What :meth:`count` says inside holds for every ``backward`` inside, and is forgotten at the end."""
        try:
            yield
        finally:
            self._counted = None

    def count(self, num_targets: Tensor, weight: Tensor) -> None:
        """Say how many targets the micro-batch has, and what turns its loss into the sum over them."""
        self._counted = _Counted(num_targets, weight)

    def backward(self, loss: Tensor, num_targets: Tensor | None = None, **kwargs: Any) -> None:
        """Backward of a micro-batch's own mean loss, weighted by its targets.

        Raises:
            TargetCountError: nobody said how many targets the micro-batch has.
        """
        counted = self._counted if num_targets is None else _Counted(num_targets, num_targets)
        if counted is None:
            raise TargetCountError(
                "expected the number of targets of this micro-batch, got none; call "
                "accelerator.backward(loss, num_targets=(labels != -100).sum())"
            )
        super().backward(self.window.weigh(loss, *counted), **kwargs)

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """As in accelerate, with the communication that ``sync`` asks for."""
        with super().accumulate(*models), contextlib.ExitStack() as contexts:
            for model in models:
                contexts.enter_context(self.sync_context(model))
            yield

    def sync_context(self, model: nn.Module) -> SyncContext:
        """The forward and backward of one micro-batch; it ends its window if ``sync_gradients`` says so."""
        return self._sync_context(model, is_last=self.sync_gradients)

    def no_sync(self, model: nn.Module) -> SyncContext:
        """A micro-batch that does not end its window, whatever wraps the model; ``sync`` says what it communicates."""
        return self._sync_context(model, is_last=False)

    def _sync_context(self, model: nn.Module, *, is_last: bool) -> SyncContext:
        policy = self._policy_choice.policy(model, is_last=is_last)
        if model not in self._wrappers:
            self._wrappers[model] = find_wrappers(model)
        return SyncContext(model, policy, is_last=is_last, wrappers=self._wrappers[model])

    def close_window(
        self, model: nn.Module, max_norm: float = math.inf, *, step: int, has_data_left: bool | None = None
    ) -> tuple[WindowReport, bool]:
        """Unscale (fp16), make ``.grad`` the exact mean gradient, clip it, and decide whether the step is taken.

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
        plugin = self._plugin
        optimizers = [o for o in upstream.optimizers_of(self) if isinstance(o, GradUtilsOptimizer)]
        self._check_folding(optimizers)  # again: loading a checkpoint may change what is fused
        self._policy_choice.window_closed()
        self._wrappers.clear()
        self.unscale_gradients()
        report = self.window.close(
            model,
            max_norm,
            norm_type=plugin.norm_type,
            ownership=plugin.ownership,
            norm_groups=plugin.grad_norm_groups,
            scales=not plugin.fold_into_optimizer,
            has_data_left=has_data_left,
        )
        order = self._judge(report, optimizers, step)
        if plugin.fold_into_optimizer:
            order = replace(order, divisor=report.multiplier.reciprocal().to(torch.float32))
        for optimizer in optimizers:
            optimizer.order = order
        return report, not order.skip

    def _judge(self, report: WindowReport, optimizers: Sequence[GradUtilsOptimizer], step: int) -> StepOrder:
        if self.scaler is not None:
            return StepOrder()  # it skips by itself, and lowers its scale
        on_device = bool(optimizers) and all(why_not_on_device(optimizer) is None for optimizer in optimizers)
        if self.guard.on_nonfinite == "raise" and on_device:
            self.guard.judge_later(report, step)
            return StepOrder(skip_flag=as_flag(report.is_finite))
        return StepOrder(skip=not self.guard.judge(report, step))


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
