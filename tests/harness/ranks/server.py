"""What happens inside one rank: the process that is forked for each of them.

The parent sends a `Job`, the rank runs its body and answers with one `Answer`, then waits for the
parent's "go" before it takes its process group down: so no rank closes a connection that another
still needs, and a rank that fails goes at once, as a real one would.
"""

import ctypes
import faulthandler
import gc
import importlib
import inspect
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

STACK_SIGNAL = signal.SIGUSR1
"""Makes a rank write the Python stacks of its threads, even while it holds the GIL."""

_ECHO = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|closed by peer|failed to connect|recvValue"
)
"""What a rank reports when another one went away: an echo of the failure, not the failure."""


@dataclass(kw_only=True, slots=True)
class Job:
    """All that one rank has to know, with `body` still pickled: it may import the test's module."""

    body: bytes
    """Pickled `(function, args, kwargs)`."""
    global_rank: int
    env: dict[str, str]
    """The whole environment, not only what is added."""
    cwd: str
    warning_filters: list[tuple[Any, ...]]
    init: bool
    mesh_dims: dict[str, int]
    timeout_s: float
    """Of the process group; longer than the deadline, which is to speak first."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What a rank reports once its body is over."""

    kind: Literal["finished", "skipped", "raised"]
    time_s: float
    """`time.monotonic()`, one clock for all processes of a machine."""
    value: bytes = b""
    summary: str = ""
    details: str = ""
    is_echo: bool = False


@dataclass(slots=True)
class FileHandle:
    """A file descriptor that survives the way into a rank."""

    fd: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_file, (DupFd(self.fd),)


def _receive_file(sent: Any) -> FileHandle:
    return FileHandle(sent.detach())


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A function by name: the name itself leads to the decorated one, `depth` decorators above."""

    module: str
    qualname: str
    depth: int = 0

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "FunctionName":
        """Name a function.

        Raises:
            ValueError: Its module does not lead back to it.
        """
        found: Any = sys.modules.get(function.__module__)
        for part in function.__qualname__.split("."):
            found = getattr(found, part, None)
        for depth in range(20):
            if found is function:
                return cls(function.__module__, function.__qualname__, depth)
            found = getattr(found, "__wrapped__", None)
        raise ValueError(
            f"the ranks import their function by name, but {function.__module__}.{function.__qualname__} "
            "is not to be found there; define it at the top level of its module"
        )

    def resolve(self) -> Callable[..., Any]:
        found: Any = importlib.import_module(self.module)
        for part in self.qualname.split("."):
            found = getattr(found, part)
        for _ in range(self.depth):
            found = found.__wrapped__
        return found


def serve(packed_job: bytes, connection: Connection, output: FileHandle, stacks: FileHandle) -> None:
    """Be one rank, from the first line to the exit."""
    os.setsid()  # a process group of our own, so that grandchildren can be ended with us
    _end_with_pytest()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a rank that crashes leaves no core file
    faulthandler.register(STACK_SIGNAL, file=stacks.fd, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output.fd, stream.fileno())
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    faulthandler.enable()

    job: Job = pickle.loads(packed_job)
    os.environ.clear()
    os.environ.update(job.env)
    tempfile.tempdir = None  # the forkserver's, if it was asked for already
    os.chdir(job.cwd)
    gc.freeze()  # what was imported stays: a collection takes 4 ms then, not 220, and each Trainer asks for one
    answer = _answer(job)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(pickle.dumps(answer))
    if answer.kind == "raised":
        os._exit(1)  # at once, as a real rank: the others see their connections close
    try:
        connection.recv_bytes()
    except EOFError:
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_pytest() -> None:
    """Let a killed pytest take the ranks along.

    The forkserver ends when no process holds its "alive" pipe any more, and every process it forks
    holds it too; once we do not, pytest's end is the forkserver's end, and that one is ours.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def _answer(job: Job) -> Answer:
    try:
        _install_warning_filters(job.warning_filters)
        import tests.harness.ranks.asserts  # noqa: F401 (loaded already, where the forkserver loads modules)

        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is a semaphore that is never released
        seed()
        function, args, kwargs = pickle.loads(job.body)
        if isinstance(function, FunctionName):
            function = function.resolve()
        if job.init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=job.timeout_s))
        if "mesh" in inspect.signature(function).parameters:
            kwargs["mesh"] = init_device_mesh("cpu", tuple(job.mesh_dims.values()), mesh_dim_names=tuple(job.mesh_dims))
        seed()
        value = pickle.dumps(function(*args, **kwargs))  # plain pickle: bytes, no shared memory
    except pytest.skip.Exception as skipped:
        return Answer(kind="skipped", time_s=time.monotonic(), summary=str(skipped))
    except BaseException as error:
        time_s = time.monotonic()
        first_line = str(error).strip().partition("\n")[0]
        return Answer(
            kind="raised",
            time_s=time_s,
            summary=f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__,
            details="".join(traceback.format_exception(_without_harness_frames(error))),
            is_echo=bool(_ECHO.search(str(error))),
        )
    return Answer(kind="finished", time_s=time.monotonic(), value=value)


def _without_harness_frames(error: BaseException) -> BaseException:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next is not None:
        frames = frames.tb_next
    return error.with_traceback(frames)


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _install_warning_filters(filters: list[tuple[Any, ...]]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, lineno in reversed(filters):
        warnings.filterwarnings(
            action,
            message=message.pattern if message else "",
            category=category,
            module=module.pattern if module else "",
            lineno=lineno,
        )
