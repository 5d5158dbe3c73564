"""The gradient of one device with the whole batch, in every parallel layout.

A name is imported at its first use, with what it needs and no more: first ranks and barriers load torch alone, the
utilities DTensor as well, Trainer, Accelerator and plugin also transformers and accelerate.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_gradutils import dist_utils as dist_utils
    from hf_gradutils import errors as errors
    from hf_gradutils import grad_utils as grad_utils
    from hf_gradutils.accelerator import GradUtilsAccelerator, GradUtilsPlugin, WholeBatchLoss
    from hf_gradutils.coordination import FirstRankPerNode, barrier_and_log
    from hf_gradutils.coordination.route import route_first_rank
    from hf_gradutils.dist_utils import clip_gradients, get_sync_ctx, reduce_loss, rescale_gradients
    from hf_gradutils.grad_utils import clip_grad_by_total_norm_, get_grad_norm
    from hf_gradutils.invariance import (
        InvarianceReport,
        check_invariance,
        check_loop_invariance,
        check_window_invariance,
    )
    from hf_gradutils.programs.blocks import check_trainers, exact_trainers
    from hf_gradutils.trainer import GradUtilsSeq2SeqTrainer, GradUtilsTrainer, GradUtilsTrainerMixin, exact

__all__ = [
    "FirstRankPerNode",
    "GradUtilsAccelerator",
    "GradUtilsPlugin",
    "GradUtilsSeq2SeqTrainer",
    "GradUtilsTrainer",
    "GradUtilsTrainerMixin",
    "InvarianceReport",
    "WholeBatchLoss",
    "barrier_and_log",
    "check_invariance",
    "check_loop_invariance",
    "check_trainers",
    "check_window_invariance",
    "clip_grad_by_total_norm_",
    "clip_gradients",
    "exact",
    "exact_trainers",
    "get_grad_norm",
    "get_sync_ctx",
    "reduce_loss",
    "rescale_gradients",
    "route_first_rank",
]

__version__ = "0.2.0"

_MODULES = ("dist_utils", "errors", "grad_utils")
"""Documented modules, which are attributes of the package as well."""

_PLACES = {
    "accelerator": ("GradUtilsAccelerator", "GradUtilsPlugin", "WholeBatchLoss"),
    "coordination": ("FirstRankPerNode", "barrier_and_log"),
    "coordination.route": ("route_first_rank",),
    "dist_utils": ("clip_gradients", "get_sync_ctx", "reduce_loss", "rescale_gradients"),
    "grad_utils": ("clip_grad_by_total_norm_", "get_grad_norm"),
    "invariance": ("InvarianceReport", "check_invariance", "check_loop_invariance", "check_window_invariance"),
    "programs.blocks": ("check_trainers", "exact_trainers"),
    "trainer": ("GradUtilsSeq2SeqTrainer", "GradUtilsTrainer", "GradUtilsTrainerMixin", "exact"),
}
"""Module → its public names."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hf_gradutils.{name}")
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"hf_gradutils.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
