"""One process a rank, watched by pytest's until each has reported, died, or hung for too long."""

import multiprocessing
import os
import pickle
import re
import signal
import time
from contextlib import suppress
from multiprocessing import connection as mp_connection
from typing import Any

import psutil

from tests.harness.ranks.launch import Plan
from tests.harness.ranks.reports import Kind, RankReport
from tests.harness.ranks.server import STACK_SIGNAL, Answer, FileHandle, Job, serve

EXIT_S = 10.0
"""How long finished ranks may take to leave."""


class Worker:
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
        # A rank in a collective waits for another one, which must be named first.
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


def watch(workers: list[Worker], plan: Plan) -> list[RankReport]:
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


def _watch_exits(workers: list[Worker], reports: dict[int, RankReport]) -> None:
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


def end(workers: list[Worker]) -> None:
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
    harness = re.compile(r'File "([^"]*/multiprocessing/[^"]*|[^"]*/harness/ranks/server\.py|<string>)"')
    return "".join(line for line in stacks.splitlines(keepends=True) if not harness.search(line))
