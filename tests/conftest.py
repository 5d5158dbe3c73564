"""Tests leave the pytest process as they found it."""

import os
import threading
from collections.abc import Iterator

import psutil
import pytest
from ranks import helper_pids, stop_forkserver

# Before anything imports transformers: no test talks to a hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaks variables, threads, child processes or a process group."""
    before = _traces()
    yield
    after = _traces()
    for kind, left in after.items():
        assert left == before[kind], f"the test leaves {kind} behind: {left} (was {before[kind]})"


def pytest_sessionfinish() -> None:
    stop_forkserver()


def _traces() -> dict[str, object]:
    import torch.distributed as dist

    return {
        "environment variables": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "threads": {thread.name for thread in threading.enumerate()},
        "child processes": {child.pid for child in psutil.Process().children()} - helper_pids(),
        "a process group": dist.is_initialized(),
    }
