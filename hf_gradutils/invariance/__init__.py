"""Checks, on the user's own samples, that the gradient does not depend on how the batch is cut up and spread."""

from hf_gradutils.invariance._check import (
    CheckBeforeTraining,
    check_in_train,
    check_invariance,
    check_loop_invariance,
    check_window_invariance,
)
from hf_gradutils.invariance._report import InvarianceReport

__all__ = [
    "CheckBeforeTraining",
    "InvarianceReport",
    "check_in_train",
    "check_invariance",
    "check_loop_invariance",
    "check_window_invariance",
]
