"""One accumulation window: from micro-batches to the exact mean gradient, and whether the step is taken."""

from hf_gradutils.window._nonfinite import OnNonfinite, StepGuard
from hf_gradutils.window._report import WindowReport
from hf_gradutils.window._two_passes import TwoPasses
from hf_gradutils.window._window import AccumulationWindow, loss_scale_for

__all__ = ["AccumulationWindow", "OnNonfinite", "StepGuard", "TwoPasses", "WindowReport", "loss_scale_for"]
