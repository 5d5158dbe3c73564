"""`@ranks(4)`: a plain test function, run by four real gloo processes.

    @ranks(4, dp=2, tp=2)
    def test_each_rank_has_its_place(mesh):
        assert mesh.get_coordinate() == [dist.get_rank() // 2, dist.get_rank() % 2]

The ranks are forked from a forkserver that has torch loaded, so they start in milliseconds. The
store they meet at lives in the pytest process. A rank that raises, hangs or dies fails the test
with that rank's traceback; the others are ended and nothing is left behind.

Modules that are slow to import (transformers) are loaded once, in the forkserver, if a collected
test module imports them at its top; imported inside a test, every rank pays for them.
"""

import functools
import inspect
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as mp_connection
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import pytest
import torch.distributed as dist

from tests.harness.rank_server import STACK_SIGNAL, Answer, FileHandle, FunctionName, Job, serve

ALWAYS_PRELOADED = (
    "pytest",
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch._dynamo",  # DistributedDataParallel and the optimizers import it: 0.7 s in every rank
    "tests.harness.rank_server",
)
PRELOADED_IF_IMPORTED = (
    "accelerate",
    "datasets",
    "peft",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "hf_gradutils",
    "hf_gradutils.accelerator",
    "hf_gradutils.trainer",
)
"""Loaded in the forkserver if the pytest process has them when the first ranks are wanted."""

UPSTREAM_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("FSDP2-wrapped module .* returned a view tensor", UserWarning),  # torch 2.13, about layers of transformers
    ("Grad strides do not match bucket view strides", UserWarning),  # DDP, of 1 × 1 convolutions
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),  # torch.compile, of what DDP returns
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # peft 0.21, of transformers 5.23
    ("Slicing a flattened dim from root mesh will be deprecated", UserWarning),  # accelerate 1.15, of HSDP's meshes
    (".*Profiler clears events at the end of each cycle", UserWarning),  # torch 2.11
)
"""`(message regex, category)` of warnings that are neither ours nor the test's to avoid; no colon in a message."""

GRACE_S = 0.5
"""After a first failure the other ranks have this long to report theirs."""

OUTPUT_TAIL = 4000
"""Characters of a rank's output that the message repeats."""

EXIT_S = 10.0
"""How long finished ranks may take to leave."""

_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "MPI_", "ACCELERATE_", "HF_GRADUTILS_")
_LAUNCHER_NAMES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)

Kind = Literal["finished", "skipped", "raised", "died", "hangs", "ended"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(kw_only=True, slots=True)
class RankReport:
    """How it went for one rank."""

    global_rank: int
    kind: Kind
    """`ended`: still running when another rank had failed."""
    time_s: float
    """`time.monotonic()` of the outcome."""
    summary: str
    """One line without the rank: `raised ValueError: boom`."""
    details: str = ""
    """The traceback, or the stacks of a rank that hangs."""
    value: Any = None
    """What the function returned."""
    output: str = ""
    """What the rank wrote to stdout and stderr."""
    is_echo: bool = False
    """Reports only that another rank went away."""

    @property
    def is_failure(self) -> bool:
        return self.kind in ("raised", "died", "hangs")


class RankFailure(AssertionError):  # noqa: N818
    """A rank raised, hung or died; `reports` has every rank's story in rank order."""

    def __init__(self, message: str, reports: list[RankReport]) -> None:
        super().__init__(message)
        self.reports = reports


@dataclass(kw_only=True, slots=True)
class _Plan:
    """A checked request."""

    world_size: int
    nodes: int
    deadline_s: float
    grace_s: float
    init: bool
    agent: bool
    env: Mapping[str, str | None]
    mesh_dims: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.nodes < 1 or self.world_size % self.nodes:
            raise ValueError(f"{self.world_size} ranks do not split evenly over {self.nodes} nodes")
        for name, size in self.mesh_dims.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh dims are sizes, got {name}={size!r}")
        product = math.prod(self.mesh_dims.values())
        if self.mesh_dims and product != self.world_size:
            dims = ", ".join(f"{name}={size}" for name, size in self.mesh_dims.items())
            raise ValueError(f"the mesh dims must multiply to the {self.world_size} ranks, got {dims}: {product}")

    def check_mesh(self, function: Callable[..., Any]) -> None:
        if "mesh" in inspect.signature(function).parameters and not (self.mesh_dims and self.init):
            raise ValueError(
                f"{function.__name__} wants a mesh: name its dims, as in @ranks(4, dp=2, tp=2), with init=True"
            )


def ranks(
    world_size: int,
    *,
    nodes: int = 1,
    deadline_s: float = 60,
    grace_s: float = GRACE_S,
    init: bool = True,
    agent: bool = True,
    env: Mapping[str, str | None] | None = None,
    **mesh_dims: int,
) -> Callable[[F], F]:
    """Run a test function in `world_size` processes, all of which must succeed.

    Args:
        world_size: How many ranks.
        nodes: Simulated nodes; the ranks are split evenly over them.
        deadline_s: From the start of the ranks to the end of the last; then they hang.
        grace_s: Time for the others to report after a first failure.
        init: Initialise the default gloo process group before the body.
        agent: The parent hosts the store, as torchrun's agent does. Without, nobody listens at
            MASTER_PORT until rank 0 does, as with plain processes; the port is kept free.
        env: Variables to add, or to unset where None.
        **mesh_dims: Of the `DeviceMesh` that a parameter called `mesh` receives, outermost first.

    Raises:
        RankFailure: When the test runs and a rank raises, hangs or dies.
        ValueError: The nodes or the mesh dims do not fit `world_size`.
    """
    plan = _Plan(
        world_size=world_size,
        nodes=nodes,
        deadline_s=deadline_s,
        grace_s=grace_s,
        init=init,
        agent=agent,
        env=env or {},
        mesh_dims=mesh_dims,
    )

    def decorate(function: F) -> F:
        plan.check_mesh(function)

        @functools.wraps(function)
        def in_ranks(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            _run(plan, function, args, kwargs)

        signature = inspect.signature(function)
        visible = [parameter for name, parameter in signature.parameters.items() if name != "mesh"]
        in_ranks.__signature__ = signature.replace(parameters=visible)  # type: ignore[attr-defined]
        return in_ranks  # type: ignore[return-value]

    return decorate


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    nodes: int = 1,
    deadline_s: float = 60,
    grace_s: float = GRACE_S,
    init: bool = True,
    agent: bool = True,
    env: Mapping[str, str | None] | None = None,
    mesh_dims: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call a function in `world_size` processes and return what each returned, in rank order.

    See `ranks` for the arguments; `args` and `kwargs` are pickled to every rank.
    """
    __tracebackhide__ = True
    plan = _Plan(
        world_size=world_size,
        nodes=nodes,
        deadline_s=deadline_s,
        grace_s=grace_s,
        init=init,
        agent=agent,
        env=env or {},
        mesh_dims=mesh_dims or {},
    )
    plan.check_mesh(function)
    return [report.value for report in _run(plan, function, args, kwargs)]


def _run(plan: _Plan, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[RankReport]:
    __tracebackhide__ = True
    named = FunctionName.of(function) if isinstance(function, types.FunctionType) else function
    body = pickle.dumps((named, args, kwargs))
    start_forkserver()
    workers: list[_Worker] = []
    with _meeting_point(plan.agent) as port, tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        try:
            for global_rank in range(plan.world_size):
                job = Job(
                    body=body,
                    global_rank=global_rank,
                    env=_environment(plan, global_rank, port, scratch),
                    cwd=str(Path.cwd()),
                    warning_filters=_warning_filters(),
                    init=plan.init,
                    mesh_dims=dict(plan.mesh_dims),
                    timeout_s=plan.deadline_s + 60,
                )
                workers.append(_Worker(job))
            reports = _watch(workers, plan)
        finally:
            _end(workers)
    for report in reports:
        for line in report.output.splitlines():
            print(f"[rank {report.global_rank}] {line}")
    _judge(reports)
    return reports


class _Worker:
    """One rank as the parent sees it."""

    def __init__(self, job: Job) -> None:
        self.global_rank = job.global_rank
        self.output_fd = os.memfd_create(f"rank{job.global_rank}-output")
        self.stacks_fd = os.memfd_create(f"rank{job.global_rank}-stacks")
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=serve,
            args=(pickle.dumps(job), theirs, FileHandle(self.output_fd), FileHandle(self.stacks_fd)),
            name=f"rank{job.global_rank}",
        )
        self.process.start()
        theirs.close()

    def report(self, kind: Kind, summary: str, **more: Any) -> RankReport:
        more.setdefault("time_s", time.monotonic())
        return RankReport(global_rank=self.global_rank, kind=kind, summary=summary, **more)

    def poll(self) -> RankReport | None:
        """The rank's own report, or that of its death, if there is one yet."""
        is_dead = not self.process.is_alive()  # before the last look for an answer
        try:
            if self.connection.poll():
                answer: Answer = pickle.loads(self.connection.recv_bytes())
                return self._report_of(answer)
        except (EOFError, OSError):  # closed, perhaps in the middle of an answer: it is about to be dead
            self.process.join(EXIT_S)
            is_dead = not self.process.is_alive()
        return self.report("died", f"died ({_exit_text(self.process.exitcode)})") if is_dead else None

    def _report_of(self, answer: Answer) -> RankReport:
        if answer.kind == "finished":
            return self.report("finished", "finished", time_s=answer.time_s, value=pickle.loads(answer.value))
        summary = f"skipped: {answer.summary}" if answer.kind == "skipped" else f"raised {answer.summary}"
        return self.report(answer.kind, summary, time_s=answer.time_s, details=answer.details, is_echo=answer.is_echo)

    def let_go(self) -> None:
        with suppress(OSError):  # it died meanwhile: its exit code says so
            self.connection.send_bytes(b"go")

    def stacks(self) -> str:
        """Ask for the Python stacks of all threads."""
        try:
            os.kill(self.process.pid, STACK_SIGNAL)
        except ProcessLookupError:
            return ""
        size, until = 0, time.monotonic() + 2
        while time.monotonic() < until:
            time.sleep(0.05)
            previous, size = size, os.fstat(self.stacks_fd).st_size
            if size and size == previous:
                break
        return _read(self.stacks_fd)

    def report_hang(self, why: str) -> RankReport:
        stacks = _without_harness_frames(self.stacks())
        # Who waits in a collective waits for somebody else: that one is to be named first.
        return self.report("hangs", f"hangs: {why}", details=stacks, is_echo="distributed_c10d.py" in stacks)

    def end(self) -> None:
        """Kill the rank and what it started, whether or not that shares its process group."""
        started: list[psutil.Process] = []
        if self.process.is_alive():
            with suppress(psutil.NoSuchProcess):
                started = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        self.process.join(EXIT_S)
        self.process.close()
        self.connection.close()
        os.close(self.output_fd)
        os.close(self.stacks_fd)


def _watch(workers: list[_Worker], plan: _Plan) -> list[RankReport]:
    """Wait for every rank's outcome; a first failure leaves the others only a short grace."""
    deadline = until = time.monotonic() + plan.deadline_s
    reports: dict[int, RankReport] = {}
    while missing := [worker for worker in workers if worker.global_rank not in reports]:
        if (left := until - time.monotonic()) <= 0:
            break
        mp_connection.wait([end for worker in missing for end in (worker.connection, worker.process.sentinel)], left)
        for worker in missing:
            if report := worker.poll():
                reports[worker.global_rank] = report
                if report.is_failure:
                    until = min(until, time.monotonic() + plan.grace_s)
    for worker in missing:
        if until < deadline:
            report = worker.report("ended", "was still running and was ended")
        else:
            report = worker.report_hang(f"not finished after {plan.deadline_s:g} s")
        reports[worker.global_rank] = report
    if not any(report.is_failure for report in reports.values()):
        _watch_exits(workers, reports)
    for worker in workers:
        reports[worker.global_rank].output = _read(worker.output_fd)
    return [reports[worker.global_rank] for worker in workers]


def _watch_exits(workers: list[_Worker], reports: dict[int, RankReport]) -> None:
    """Let the finished ranks leave, together."""
    for worker in workers:
        worker.let_go()
    until = time.monotonic() + EXIT_S
    for worker in workers:
        worker.process.join(max(0, until - time.monotonic()))
        if worker.process.exitcode is None:
            reports[worker.global_rank] = worker.report_hang(
                f"its body is over, but it has not left after {EXIT_S:g} s"
            )
        elif worker.process.exitcode:
            summary = f"died after its body ({_exit_text(worker.process.exitcode)})"
            reports[worker.global_rank] = worker.report("died", summary)


def _judge(reports: list[RankReport]) -> None:
    """Fail with the failure that came first, skip if every rank skipped."""
    __tracebackhide__ = True
    skipped = [report for report in reports if report.kind == "skipped"]
    if len(skipped) == len(reports):
        pytest.skip(skipped[0].summary.removeprefix("skipped: "))
    failures = [report for report in reports if report.is_failure] or skipped
    if failures:
        first = min(failures, key=lambda report: (report.is_echo, report.time_s))
        raise RankFailure(_message(first, reports), reports)


_EXTENSIONS = re.compile(r"^Extension modules: .*$", re.MULTILINE)
"""What faulthandler ends with: longer than the stacks, and it grows with what has been imported."""


def _message(first: RankReport, reports: list[RankReport]) -> str:
    parts = [f"rank {first.global_rank} of {len(reports)} {first.summary}"]
    if first.kind == "skipped":
        parts[0] += ", but not every rank did"
    if first.details:
        parts.append(first.details.rstrip())
    if output := _EXTENSIONS.sub("", first.output).strip():
        parts.append(f"rank {first.global_rank} wrote:\n{output[-OUTPUT_TAIL:]}")
    for other in reports:
        if other is not first and other.kind not in ("finished", "skipped"):
            parts.append(f"rank {other.global_rank} of {len(reports)} {other.summary}")
            if other.kind == "hangs":
                parts.append(other.details.rstrip())
    return "\n\n".join(parts)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    for worker in workers:
        worker.close()


def _read(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


def _exit_text(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _without_harness_frames(stacks: str) -> str:
    harness = re.compile(r'File "([^"]*/multiprocessing/[^"]*|[^"]*/harness/rank_server\.py|<string>)"')
    return "".join(line for line in stacks.splitlines(keepends=True) if not harness.search(line))


@contextmanager
def _meeting_point(agent: bool) -> Iterator[int]:
    """A port on the loopback interface: our own store listens there, or nobody does.

    Without agent the port is bound, but not listened on, until the ranks are gone: no other
    process is given it, while rank 0 may listen there, since both sides set SO_REUSEADDR.
    """
    with socket.socket() as meeting:
        meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meeting.bind(("127.0.0.1", 0))
        port = meeting.getsockname()[1]
        if not agent:
            yield port
            return
        meeting.listen(1024)
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach()
        )
        yield port
        del store


def _environment(plan: _Plan, global_rank: int, port: int, scratch: str) -> dict[str, str]:
    """What torchrun (or, without agent, a plain launcher) would set, upon our own environment."""
    num_local = plan.world_size // plan.nodes
    env: dict[str, str | None] = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    env |= {
        "RANK": str(global_rank),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_RANK": str(global_rank % num_local),
        "LOCAL_WORLD_SIZE": str(num_local),
        "GROUP_RANK": str(global_rank // num_local),
        "GROUP_WORLD_SIZE": str(plan.nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": scratch,  # ranks end without cleaning up, so we do it for them
        "GLOO_SOCKET_IFNAME": "lo",  # no look-up of the host name, nothing visible outside
    }
    if plan.agent:
        env |= {
            "ROLE_NAME": "default",
            "ROLE_RANK": str(global_rank),
            "ROLE_WORLD_SIZE": str(plan.world_size),
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    env |= plan.env
    return {name: value for name, value in env.items() if value is not None}


def _warning_filters() -> list[tuple[Any, ...]]:
    """The filters of the running test (its marks, the command line), then upstream's, then "error"."""
    own: list[tuple[Any, ...]] = []
    for entry in warnings.filters:
        _, message, category, module, lineno = entry
        if message is None and module is None and lineno == 0 and category is Warning:
            own += [] if entry[0] == "error" else [entry]
            break
        own.append(entry)
    else:
        own = []  # not under pytest: only Python's defaults
    upstream = [("ignore", re.compile(message), category, None, 0) for message, category in UPSTREAM_WARNINGS]
    return [*own, *upstream, ("error", None, Warning, None, 0)]


def start_forkserver() -> None:
    """Start the forkserver, once per session, with the modules that this session needs."""
    global _is_started
    if _is_started:
        return
    multiprocessing.set_forkserver_preload(
        [*ALWAYS_PRELOADED, *(name for name in PRELOADED_IF_IMPORTED if name in sys.modules)]
    )
    prior = dict(os.environ)
    # One thread each: a pool of threads would not survive the fork.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # Python 3.11 does not hand sys.path to what it preloads.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(prior)
    _is_started = True


def stop_forkserver() -> None:
    """End the forkserver and multiprocessing's resource tracker, if they run."""
    global _is_started
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()
    _is_started = False


def helper_pids() -> set[int]:
    """The processes that are there to stay until the session ends."""
    pids = (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)
    return {pid for pid in pids if pid is not None}


_is_started = False
