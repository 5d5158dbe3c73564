"""Tests leave the pytest process as they found it."""

import os
import threading
from collections.abc import Iterator

import psutil
import pytest

# Before anything imports transformers: no test talks to a hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

_SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
_PYTEST_VARIABLES = ("PYTEST_CURRENT_TEST",)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaks variables, threads, child processes or a process group."""
    before = _traces()
    yield
    after = _traces()
    for kind, left in after.items():
        assert left == before[kind], f"the test leaves {kind} behind: {left} (was {before[kind]})"


def _traces() -> dict[str, object]:
    import torch.distributed as dist

    return {
        "environment variables": {k: v for k, v in os.environ.items() if k not in _PYTEST_VARIABLES},
        "threads": {thread.name for thread in threading.enumerate()},
        "child processes": {c.pid for c in psutil.Process().children() if not _is_server(c)},
        "a process group": dist.is_initialized(),
    }


def _is_server(child: psutil.Process) -> bool:
    try:
        return any(server in part for part in child.cmdline() for server in _SERVERS)
    except psutil.NoSuchProcess:
        return True
