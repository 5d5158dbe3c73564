"""Checks a Trainer of a program at the start of its first ``train``."""

import contextlib
import faulthandler
import functools
import os
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_gradutils.errors import GradUtilsError
from hf_gradutils.invariance import InvarianceReport, check_in_train
from hf_gradutils.programs.ending import end
from hf_gradutils.programs.hooks import Start
from hf_gradutils.programs.outcomes import Outcome
from hf_gradutils.programs.settings import Settings


def check_and_end(trainer: Any, start: Start, settings: Settings) -> None:
    """Check a Trainer that is about to train, and end this process, unless all Trainers are to be checked."""
    outcome = functools.partial(Outcome, trainer=name_of(trainer), rank=trainer.args.process_index)
    folder = Path(settings.folder)

    def finish(report: InvarianceReport) -> None:
        outcome(report=report.to_dict(), text=str(report)).write(folder)
        if not settings.all_trainers:
            end(settings, is_checked=True)  # now: code of the program's may catch all exceptions

    with _time_limit(trainer, settings):
        try:
            check_in_train(trainer, start, num_samples=settings.num_samples, when_done=finish)
            return
        except GradUtilsError as error:
            reason = str(error)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        outcome(error=reason).write(folder)
        end(settings, is_checked=False)


def name_of(trainer: Any) -> str:
    """The class of a Trainer, as it is imported."""
    return f"{type(trainer).__module__}.{type(trainer).__qualname__}"


@contextlib.contextmanager
def _time_limit(trainer: Any, settings: Settings) -> Iterator[None]:
    """End this process if a check hangs: another rank may have died in it."""

    def give_up() -> None:
        faulthandler.dump_traceback(all_threads=True)
        reason = f"the check took more than {settings.timeout_s:g} s (--timeout_s); the threads were printed"
        Outcome(trainer=name_of(trainer), rank=trainer.args.process_index, error=reason).write(Path(settings.folder))
        os._exit(2)

    timer = threading.Timer(settings.timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
