"""The optimizer and the engine of DeepSpeed, taken over once accelerate has prepared them."""

import weakref
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper  # accelerate.utils has it beside DeepSpeed alone

from hf_gradutils.accelerator._deepspeed import Engine
from hf_gradutils.accelerator._first_window import NOT_WEIGHTED
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.upstream.accelerate import models_of, optimizers_of
from hf_gradutils.upstream.deepspeed import engine_of, is_engine


class GradUtilsDeepSpeedOptimizer(DeepSpeedOptimizerWrapper):  # type: ignore[misc]
    """accelerate's stand-in for the engine's optimizer; its step ends a window. See :meth:`adopt`."""

    _windows: Any
    """A weak reference: the optimizer does not keep its Accelerator alive."""

    @classmethod
    def adopt(cls, optimizer: DeepSpeedOptimizerWrapper, windows: Windows) -> "GradUtilsDeepSpeedOptimizer":
        """Turn a stand-in of accelerate, which builds it by name, into one of ours, in place."""
        optimizer.__class__ = cls
        optimizer._windows = weakref.ref(windows)
        return optimizer

    def step(self, closure: object = None) -> None:
        """End the window, if it has not ended: the engine steps, clipped as its configuration says.

        Raises:
            InvalidArgumentError: a closure is passed; or as :meth:`Engine.clipping_as_set`.
            TargetCountError: no loss was ever weighted, or another backward has added to the gradients.
        """
        if closure is not None:
            raise InvalidArgumentError("DeepSpeed's engine takes no closure; call backward and then optimizer.step()")
        windows = self._windows()
        if windows is None or windows.engine is None or not self.gradient_state.sync_gradients:
            return
        if not any(window.is_open or window.num_closed for window in windows.by_models):
            raise TargetCountError(NOT_WEIGHTED)
        for window in windows.by_models:
            if window.is_open:
                windows.close(window, windows.engine.clipping_as_set())

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients of a window that was not stepped on after its last backward.

        Else do nothing, as accelerate does here: the engine drops gradients in its step, and those of earlier
        micro-batches are wanted.
        """
        windows = self._windows()
        if windows is None or windows.engine is None or not windows.engine.awaits_step:
            return
        for window in windows.by_models:
            if window.is_open:
                windows.discard(window)

    @property
    def step_was_skipped(self) -> bool:
        """True if the last step was left out, by the engine or for a gradient that was not finite."""
        windows = self._windows()
        engine = None if windows is None else windows.engine
        return super().step_was_skipped or (engine is not None and engine.left_out_step)


def use_engine(windows: Windows, *, clipping_is_set: bool) -> None:
    """Let DeepSpeed's engine run backwards and steps, once the Accelerator has prepared one to train.

    Args:
        windows: Of the Accelerator.
        clipping_is_set: As for :class:`Engine`.

    Raises:
        InvalidArgumentError: there are two of them; or as :class:`Engine`.
    """
    engine = engine_of(windows.accelerator)
    if engine is None:
        return
    if any(model is not engine and is_engine(model) for model in models_of(windows.accelerator)):
        raise InvalidArgumentError(
            "two models were prepared to train with DeepSpeed by one Accelerator, and accelerate sends every loss to "
            "the engine of the first; make a GradUtilsAccelerator for each"
        )
    if windows.engine is None:
        windows.engine = Engine(engine, windows.plugin, clipping_is_set=clipping_is_set)
        windows.outside.running.optimizers.add(engine.basic_optimizer)
        for optimizer in optimizers_of(windows.accelerator):
            GradUtilsDeepSpeedOptimizer.adopt(optimizer, windows)
