"""Blocks for notebooks and scripts in which Trainers are made inside of functions of a framework."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from transformers import Trainer

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance import InvarianceReport, check_in_train
from hf_gradutils.programs.hooks import Start, hook_new, hook_train
from hf_gradutils.trainer import GradUtilsTrainerMixin, exact


class _BlockIsDone(BaseException):
    """Leaves a block after its check, through any ``except Exception`` in it."""


@contextlib.contextmanager
def exact_trainers(grad_plugin: GradUtilsPlugin | None = None) -> Iterator[None]:
    """Make every Trainer exact that is built in the block.

    Args:
        grad_plugin: Settings of those that are given none, by their class neither.

    Raises:
        InvalidArgumentError: in the block, where a Trainer is built that cannot be made exact, or where one trains
            that was built before.

    Collectives: none.
    """

    def make(cls: Any) -> Any:
        return exact(cls, grad_plugin=None if getattr(cls, "default_plugin", None) else grad_plugin)

    def refuse(trainer: Any, start: Start) -> None:
        if not isinstance(trainer, GradUtilsTrainerMixin):
            raise InvalidArgumentError(
                f"this {type(trainer).__name__} was built before the block `with exact_trainers()`, so it is not "
                "exact; build it in the block"
            )

    with contextlib.ExitStack() as at_end:
        at_end.callback(hook_new(Trainer, make))
        at_end.callback(hook_train(Trainer, refuse))
        yield


@contextlib.contextmanager
def check_trainers(*, num_samples: int | None = None, all_trainers: bool = False) -> Iterator[list[InvarianceReport]]:
    """Check the first Trainer that trains in the block, in place of its training, and leave the block.

    Trainers may have been built before. The block is left by an exception that ``except Exception`` lets pass; a bare
    ``except`` does not. A process that the block starts needs a block of its own.

    Args:
        num_samples: As in :func:`hf_gradutils.check_invariance`.
        all_trainers: Check each Trainer before its first training, and train it as usual.

    Yields:
        The reports so far.

    Raises:
        InvalidArgumentError: as in :func:`hf_gradutils.check_invariance`; or a Trainer trains in another process, or
            none in the block.

    Collectives: those of :func:`hf_gradutils.check_invariance`.
    """
    process = os.getpid()
    reports: list[InvarianceReport] = []

    def check(trainer: Any, start: Start) -> None:
        if os.getpid() != process:
            raise InvalidArgumentError(
                "this Trainer trains in a process that the block `with check_trainers()` has started; put the block "
                "into the function that the process runs"
            )
        reports.append(check_in_train(trainer, start, num_samples=num_samples))
        if not all_trainers:
            raise _BlockIsDone

    take_out = hook_train(Trainer, check)
    try:
        yield reports
        if not reports:
            raise InvalidArgumentError(
                "no Trainer began to train in the block `with check_trainers()`: none was checked"
            )
    except _BlockIsDone:
        pass
    finally:
        take_out()
