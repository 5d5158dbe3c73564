"""accelerate's Accelerator with exact gradients, and its settings."""

from hf_gradutils.accelerator._accelerator import GradUtilsAccelerator
from hf_gradutils.accelerator._micro_batch import MicroBatch
from hf_gradutils.accelerator._padding import Padding
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._rollback import Counters

__all__ = ["Counters", "GradUtilsAccelerator", "GradUtilsPlugin", "MicroBatch", "Padding"]
