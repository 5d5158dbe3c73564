"""Starts an unmodified program with its Trainers checked or made exact: ``hf-gradutils check`` and ``run``.

Both wait for it: this process keeps out of its way, and tells if no Trainer was met.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.programs.ending import STOPPED
from hf_gradutils.programs.outcomes import Outcome, read_outcomes
from hf_gradutils.programs.settings import Settings

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.05
_OTHER_RANKS_S = 5.0
"""How long the first rank's outcome may come after that of another, if the program was stopped."""
_NOT_SEEN = (
    "at least in no Python that started with the PYTHONPATH it was given (python -I, a container or a cleared "
    "environment do without)"
)


def words_of(program: Sequence[str]) -> list[str]:
    """The command line of a program: of a script, a module after ``-m``, or a command on the PATH.

    Raises:
        InvalidArgumentError: there is no such file or command.
    """
    if not program:
        raise InvalidArgumentError("no program; give a script with its arguments, -m and a module, or a command")
    first = program[0]
    if first == "-m":
        if len(program) == 1:
            raise InvalidArgumentError("-m needs the name of a module")
        return [sys.executable, *program]
    if first.endswith((".py", ".pyc", ".pyz")) and os.path.exists(first):
        return [sys.executable, *program]
    found = shutil.which(first) or shutil.which(first, path=str(Path(sys.executable).parent))  # not activated
    if found is not None:
        return [found, *program[1:]]
    if os.path.isfile(Path(first, "__main__.py")):
        return [sys.executable, *program]
    raise InvalidArgumentError(f"no file or command {first!r}; give a script, -m and a module, or a command")


def run_exact(words: list[str], *, allows_loops: bool) -> int:
    """Run the program with every Trainer exact that it or a process of it builds; returns its exit code.

    Raises:
        InvalidArgumentError: it cannot be started; or it has ended well, and none was built.
    """
    with tempfile.TemporaryDirectory(prefix="hf-gradutils-", ignore_cleanup_errors=True) as folder:
        settings = Settings(folder=folder, makes_exact=True, checks=False, allows_loops=allows_loops)
        settings = settings.inside_of_others()
        code = _run(words, settings.environment())
        if code == 0 and not settings.has_made_exact and not settings.checks:
            raise InvalidArgumentError(
                f"no transformers.Trainer was built in this program, {_NOT_SEEN}; nothing was made exact"
            )
        return code


def check_program(
    words: list[str],
    *,
    makes_exact: bool,
    num_samples: int | None,
    all_trainers: bool,
    timeout_s: float,
    allows_loops: bool,
) -> list[Outcome]:
    """Run the program until its first Trainer is about to train, and check that one.

    Returns:
        Outcomes of the ranks that ran below this process, in their order. With ``all_trainers`` one more if the program
        has failed.

    Raises:
        InvalidArgumentError: it cannot be started, or it has ended before a Trainer began to train.
    """
    with tempfile.TemporaryDirectory(prefix="hf-gradutils-", ignore_cleanup_errors=True) as folder:
        settings = Settings(
            folder=folder,
            makes_exact=makes_exact,
            checks=True,
            num_samples=num_samples,
            all_trainers=all_trainers,
            timeout_s=timeout_s,
            allows_loops=allows_loops,
        )
        environment = settings.inside_of_others().environment()
        code = _run(words, environment, None if all_trainers else _Stopper(Path(folder)))
        outcomes = read_outcomes(Path(folder))
    how = f"ended by signal {code - 128}" if code > 128 else f"ended with code {code}"
    if not outcomes:
        raise InvalidArgumentError(
            f"no transformers.Trainer began to train in this program, {_NOT_SEEN}; it {how}, and nothing was checked"
        )
    if all_trainers and code:
        outcomes.append(Outcome(trainer="", rank=0, error=f"the program {how}, perhaps before further Trainers"))
    return outcomes


class _Stopper:
    """Ends a program, once one of its processes has been checked, so that nothing goes on with what was not trained.

    A process that has been checked waits until it may end. A launcher of ranks ends by itself after them.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._stopped_at: float | None = None

    def __call__(self, process: "subprocess.Popen[bytes]") -> None:
        """Look for an outcome; called again and again until the program has ended."""
        if self._stopped_at is not None or not (outcomes := read_outcomes(self._folder)):
            return
        self._stopped_at = time.monotonic()
        ends_by_itself = {outcome.pid for outcome in outcomes}
        ends_by_itself |= {outcome.parent_pid for outcome in outcomes if outcome.is_launched}
        if process.pid not in ends_by_itself:
            process.terminate()
        (self._folder / STOPPED).touch()

    def wait_for_first_rank(self) -> None:
        """Wait for the outcome of the first rank, whose launcher may have been stopped at that of another."""
        while self._stopped_at is not None and time.monotonic() < self._stopped_at + _OTHER_RANKS_S:
            if any(outcome.rank == 0 for outcome in read_outcomes(self._folder)):
                return
            time.sleep(_LOOK_EVERY_S)


def _run(words: list[str], environment: dict[str, str], stopper: _Stopper | None = None) -> int:
    """Run a process, and pass on the signals that this one gets."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        elif process.poll() is None and not (number == signal.SIGINT and _has_terminal()):
            process.send_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, forward) for number in _FORWARDED}
    sys.stdout.flush()
    try:
        try:
            process = subprocess.Popen(words, env=environment, preexec_fn=_end_with_parent)
        except OSError as error:
            raise InvalidArgumentError(f"cannot start {words[0]!r}: {error.strerror}") from None
        for number in early:
            process.send_signal(number)
        if stopper is None:
            code = process.wait()
        else:
            code = _wait(process, stopper)
            stopper.wait_for_first_rank()
        return 128 - code if code < 0 else code  # as a shell has it for a signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_terminal() -> bool:
    """True if this is the job in front of a terminal, whose Ctrl-C reaches the program by itself."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _wait(process: "subprocess.Popen[bytes]", look: Callable[["subprocess.Popen[bytes]"], None]) -> int:
    while True:
        try:
            return process.wait(_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            look(process)


def _end_with_parent() -> None:
    """Let the kernel end this process with its parent, which a launcher may kill."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
