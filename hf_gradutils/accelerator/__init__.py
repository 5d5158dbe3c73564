"""accelerate's Accelerator with exact gradients, and its settings."""

from hf_gradutils.accelerator._accelerator import GradUtilsAccelerator
from hf_gradutils.accelerator._first_window import check_weighted
from hf_gradutils.accelerator._micro_batch import Division, MicroBatch
from hf_gradutils.accelerator._padding import another
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._readers import reader_of_gradients
from hf_gradutils.accelerator._rollback import Counters
from hf_gradutils.accelerator._weighing import expect

__all__ = [
    "Counters",
    "Division",
    "GradUtilsAccelerator",
    "GradUtilsPlugin",
    "MicroBatch",
    "another",
    "check_weighted",
    "expect",
    "reader_of_gradients",
]
