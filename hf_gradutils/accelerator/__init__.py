"""accelerate's Accelerator with exact gradients, and its settings."""

from hf_gradutils.accelerator._accelerator import GradUtilsAccelerator
from hf_gradutils.accelerator._counted_first import expect, num_averaged, split_terms
from hf_gradutils.accelerator._first_window import check_weighted
from hf_gradutils.accelerator._loss_parameters import LossParameters
from hf_gradutils.accelerator._micro_batch import Division, MicroBatch, as_number
from hf_gradutils.accelerator._padding import another
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._readers import reader_of_gradients
from hf_gradutils.accelerator._rollback import Counters
from hf_gradutils.accelerator._whole_batch import WholeBatchLoss

__all__ = [
    "Counters",
    "Division",
    "GradUtilsAccelerator",
    "GradUtilsPlugin",
    "LossParameters",
    "MicroBatch",
    "WholeBatchLoss",
    "another",
    "as_number",
    "check_weighted",
    "expect",
    "num_averaged",
    "reader_of_gradients",
    "split_terms",
]
