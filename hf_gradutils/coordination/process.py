"""Identities of processes, and a look at whether one still runs."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessIdentity:
    """Names one process among all hosts, containers and reuses of its pid."""

    host: str
    pid: int
    start_time: int | None
    """Clock ticks after boot (``/proc/<pid>/stat``): a reused pid starts later. None without ``/proc``."""

    pid_namespace: str
    boot_id: str

    def __str__(self) -> str:
        return f"host {self.host} (process {self.pid})"


def current_process() -> ProcessIdentity:
    """The identity of this process."""
    try:
        stat = _read_stat(os.getpid())
    except OSError:
        stat = None
    return ProcessIdentity(
        host=socket.gethostname(),
        pid=os.getpid(),
        start_time=None if stat is None else stat[1],
        pid_namespace=_pid_namespace(),
        boot_id=_boot_id(),
    )


def is_alive(process: ProcessIdentity) -> bool | None:
    """True while that process runs, False once it has ended, None when it cannot be seen from here.

    It can be seen from its own pid namespace on Linux. A zombie has ended. No signal is sent.
    """
    seen = process.start_time is not None and process.pid_namespace and process.boot_id
    if not seen or (process.pid_namespace, process.boot_id) != (_pid_namespace(), _boot_id()):
        return None
    try:
        stat = _read_stat(process.pid)
    except OSError:
        return None  # no file descriptors left, for one: not a reason to declare it dead
    return stat is not None and stat[1] == process.start_time and stat[0] not in "ZXx"


def has_ended(process: ProcessIdentity, *, grace_s: float = 0.0) -> bool:
    """True if that process can be seen to have ended, now or within ``grace_s``."""
    deadline = time.monotonic() + grace_s
    while is_alive(process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return is_alive(process) is False


def host_node() -> str:
    """The name of this process's node where no launcher gives it one."""
    # Pods on one machine share the boot id, cloned images share the host name.
    return f"{socket.gethostname()}-{_boot_id()}-{_pid_namespace()}"


def host_network() -> str:
    """Names the network that this process's addresses belong to, its host's or its container's; "" if unknown."""
    try:
        return f"{_boot_id()}/{os.readlink(PROC / 'self/ns/net')}" if _boot_id() else ""
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


def _boot_id() -> str:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _read_stat(pid: int) -> tuple[str, int] | None:
    """``(state, start time)`` of a process, None when there is no such process to see."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2 is the command in parentheses and may hold spaces and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
