"""Ends a process of a checked program where it would go on to train."""

import logging
import os
import sys
import threading
import time
from pathlib import Path

from hf_gradutils import _environment
from hf_gradutils.programs.outcomes import Outcome, is_launched
from hf_gradutils.programs.settings import Settings

_LEAVE_S = 20.0
"""The longest that leaving the process group may take."""
_STOP_S = 10.0
"""The longest that a process waits for the command to stop what waits for it."""
STOPPED = "stopped"
"""File that the command makes when nothing of the program goes on once a checked process ends."""


def end(settings: Settings, *, is_checked: bool) -> None:
    """End this process at once: more of the program, or its handlers for the exit, might save what was not trained.

    The exit code is 1, at which a launcher ends the other ranks; but 0 if a launcher waits for a check that is done,
    and would report a failure at length, or start again.
    """
    code = 0 if is_checked and is_launched() else 1
    timer = threading.Timer(_LEAVE_S, os._exit, (code,))
    timer.daemon = True
    timer.start()
    try:
        if is_checked:
            _leave_process_group()
        _await_stop(Path(settings.folder))
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end_without_check(reason: str, settings: Settings) -> None:
    """End this process, which trains without a Trainer."""
    launched = _environment.read_launched_rank()
    Outcome(trainer="", rank=launched.global_rank if launched else 0, error=reason).write(Path(settings.folder))
    end(settings, is_checked=False)


def _await_stop(folder: Path) -> None:
    """Wait until the command has stopped the processes that would go on when this one ends."""
    until = time.monotonic() + _STOP_S
    while folder.exists() and not (folder / STOPPED).exists() and time.monotonic() < until:
        time.sleep(0.02)


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # rank 0 may hold the store that the others still need
        dist.destroy_process_group()
