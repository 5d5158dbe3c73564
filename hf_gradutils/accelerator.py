"""accelerate's Accelerator on top of the accumulation window, and the plugin that configures it."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.sync import SyncContext
from hf_gradutils.sync_auto import SYNCS, PolicyChoice, Sync
from hf_gradutils.targets import CountTargets, LossUnit, TargetCounter
from hf_gradutils.window import AccumulationWindow, WindowReport


@dataclass
class GradUtilsPlugin(GradientAccumulationPlugin):  # type: ignore[misc]
    """How gradients are accumulated, for ``GradUtilsTrainer(grad_plugin=…)``."""

    loss_unit: LossUnit = "auto"
    """What the loss is a mean over; ``auto`` asks the labels and the loss itself."""
    count_targets: CountTargets | None = None
    """Batch → number of targets, a 0-d tensor; overrides ``loss_unit``."""
    check_loss_unit: bool = True
    """Verify on the first batch, with three forwards, that the loss is a mean over what is counted."""
    sync: Sync = "defer"
    """When gradients are communicated: ``defer`` to the last micro-batch, ``every`` one, ``reduce_scatter`` shards in
    every one and replicas in the last, or ``auto``, by what memory allows. See ``docs/sync.md``."""

    def __post_init__(self) -> None:
        self.counter()
        if self.sync not in SYNCS:
            raise InvalidArgumentError(f"sync must be one of {', '.join(SYNCS)}, got {self.sync!r}")
        _sync_of(self.sync, each_batch=self.sync_each_batch)

    def counter(self) -> TargetCounter:
        """Counts a batch's targets as these settings say. InvalidArgumentError where they say nothing sensible."""
        return TargetCounter(self.loss_unit, self.count_targets)

    def accumulation_settings(self) -> list[str]:
        """``name=value`` of everything set that accelerate's own plugin has, which a Trainer takes elsewhere."""
        own = {field.name: field.default for field in fields(GradientAccumulationPlugin)}
        return [f"{name}={getattr(self, name)!r}" for name, default in own.items() if getattr(self, name) != default]


class GradUtilsAccelerator(Accelerator):  # type: ignore[misc]
    """An Accelerator whose ``backward`` weighs each micro-batch by its targets.

    ``GradUtilsTrainer`` makes one of the Accelerator that ``Trainer`` has built; see :meth:`adopt`.
    """

    window: AccumulationWindow
    _counted: "_Counted | None"
    _policy_choice: PolicyChoice

    @classmethod
    def adopt(cls, accelerator: Accelerator, sync: Sync = "defer") -> "GradUtilsAccelerator":
        """Turn an Accelerator, as the Trainer builds it by name, into one of ours, in place."""
        accelerator.__class__ = cls
        accelerator.window = AccumulationWindow(accelerator.device)
        accelerator._counted = None
        each_batch = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        accelerator._policy_choice = PolicyChoice(_sync_of(sync, each_batch=each_batch), accelerator.device)
        return accelerator

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
        is_last = self.sync_gradients
        return SyncContext(model, self._policy_choice.policy(model, is_last=is_last), is_last=is_last)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """A micro-batch that does not end its window, whatever wraps the model; ``sync`` says what it communicates."""
        with SyncContext(model, self._policy_choice.policy(model, is_last=False), is_last=False):
            yield

    def close_window(
        self, model: nn.Module, max_norm: float = math.inf, *, has_data_left: bool | None = None
    ) -> WindowReport:
        """Unscale (fp16), then make ``.grad`` the exact mean gradient and clip it; once per optimizer step.

        Collectives: one all-reduce over all ranks.
        """
        self._policy_choice.window_closed()
        self.unscale_gradients()
        return self.window.close(model, max_norm, has_data_left=has_data_left)


class _Counted(NamedTuple):
    num_targets: Tensor
    weight: Tensor


def _sync_of(sync: Sync, *, each_batch: bool) -> Sync:
    """The policy, with accelerate's own option ``sync_each_batch`` taken for ``every``."""
    if each_batch and sync not in ("defer", "every"):
        raise InvalidArgumentError(
            f"expected sync or accelerate's sync_each_batch, got sync={sync!r} and sync_each_batch=True; leave out "
            "sync_each_batch, which means sync='every'"
        )
    return "every" if each_batch else sync


def uses_exact_arithmetic(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether a loss is the same however its batch is composed, up to float32 rounding."""
    return (
        accelerator.mixed_precision == "no"
        and all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
        and not (accelerator.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest")
    )
