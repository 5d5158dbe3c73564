"""The gradient of one device with the whole batch, in every parallel layout.

The utilities need torch alone and are imported at once; Trainer, Accelerator and plugin bring transformers and
accelerate along and are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_gradutils.dist_utils import (
    FirstRankPerNode,
    barrier_and_log,
    clip_gradients,
    get_sync_ctx,
    reduce_loss,
    rescale_gradients,
)
from hf_gradutils.grad_utils import clip_grad_by_total_norm_, get_grad_norm

if TYPE_CHECKING:
    from hf_gradutils.accelerator import GradUtilsAccelerator
    from hf_gradutils.first_rank_upstream import route_first_rank
    from hf_gradutils.invariance import check_invariance, check_loop_invariance, check_window_invariance
    from hf_gradutils.invariance_report import InvarianceReport
    from hf_gradutils.plugin import GradUtilsPlugin
    from hf_gradutils.trainer import GradUtilsSeq2SeqTrainer, GradUtilsTrainer, GradUtilsTrainerMixin

__all__ = [
    "FirstRankPerNode",
    "GradUtilsAccelerator",
    "GradUtilsPlugin",
    "GradUtilsSeq2SeqTrainer",
    "GradUtilsTrainer",
    "GradUtilsTrainerMixin",
    "InvarianceReport",
    "barrier_and_log",
    "check_invariance",
    "check_loop_invariance",
    "check_window_invariance",
    "clip_grad_by_total_norm_",
    "clip_gradients",
    "get_grad_norm",
    "get_sync_ctx",
    "reduce_loss",
    "rescale_gradients",
    "route_first_rank",
]

__version__ = "0.1.0"

_LAZY = {
    "route_first_rank": "hf_gradutils.first_rank_upstream",
    "GradUtilsAccelerator": "hf_gradutils.accelerator",
    "InvarianceReport": "hf_gradutils.invariance_report",
    "check_invariance": "hf_gradutils.invariance",
    "check_loop_invariance": "hf_gradutils.invariance",
    "check_window_invariance": "hf_gradutils.invariance",
    "GradUtilsPlugin": "hf_gradutils.plugin",
    "GradUtilsSeq2SeqTrainer": "hf_gradutils.trainer",
    "GradUtilsTrainer": "hf_gradutils.trainer",
    "GradUtilsTrainerMixin": "hf_gradutils.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
