"""Stops a program at the first step of an optimizer in a loop of its own, which no Trainer runs."""

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.programs.ending import end_without_check
from hf_gradutils.programs.settings import Settings

_STEP_WITHOUT_TRAINING = ("deepspeed.", "torch.distributed.checkpoint.")
"""Modules that step in a check: an engine that takes no step, and the state of an optimizer that is resumed."""


def watch_loops(register: Callable[[Callable[..., None]], Any], settings: Settings) -> None:
    """Look at the first step of each optimizer.

    Args:
        register: ``torch.optim.optimizer.register_optimizer_step_pre_hook``.
        settings: Of the program.
    """
    if settings.allows_loops:
        return
    of_trainers: weakref.WeakSet[Any] = weakref.WeakSet()

    def before_step(optimizer: Any, args: object, kwargs: object) -> None:
        if optimizer in of_trainers:
            return
        if not _is_trainers(settings):
            _stop(optimizer, settings)
        of_trainers.add(optimizer)

    register(before_step)


def _is_trainers(settings: Settings) -> bool:
    """True if a Trainer has asked for the step. In a check that ends the program, no step may train."""
    may_train = settings.all_trainers or not settings.checks
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "transformers.trainer" if may_train else name.startswith(_STEP_WITHOUT_TRAINING):
            return True
        frame = frame.f_back
    return False


def _stop(optimizer: Any, settings: Settings) -> None:
    name, instead = type(optimizer).__name__, "--allow_loops lets such loops run as they are"
    if not settings.checks:
        raise InvalidArgumentError(
            f"{name} steps in a loop of this program's own, and `hf-gradutils run` makes Trainers exact, no loops; use "
            f"hf_gradutils.GradUtilsAccelerator there, or {instead}"
        )
    end_without_check(
        f"{name} steps in a loop of this program's or its Trainer's own, not of transformers'; check such a loop with "
        f"hf_gradutils.check_loop_invariance, or {instead}",
        settings,
    )
