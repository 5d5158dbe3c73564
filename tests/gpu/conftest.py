"""Tests that need a GPU: run when they are requested by path, as `make test-gpu` does, and where there is one.

The pytest process never touches CUDA: everything runs in ranks of `tests/harness/ranks`, which are forked
from a process that must not have touched it either.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.cuda_cases import DEVICE
from tests.harness.cuda_ranks import let_ranks_start_cuda, one_gpu

HERE = Path(__file__).parent
NO_GPU = "No GPU here: the GPU tests were not run."


def _are_requested(config: pytest.Config) -> bool:
    paths = [Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args]
    return all(path == HERE or HERE in path.parents for path in paths)


def _can_run() -> bool:
    return DEVICE == "cpu" or torch.cuda.device_count() > 0  # asks the driver without starting CUDA


def pytest_configure(config: pytest.Config) -> None:
    if not _are_requested(config):
        return
    if not _can_run():
        pytest.exit(NO_GPU, returncode=0)
    os.environ.update(one_gpu())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if HERE in collection_path.parents and not _are_requested(config) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            # Warnings of drivers and builds of torch that were never seen here do not fail a test.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def _ranks_can_use_cuda() -> None:
    if DEVICE == "cuda":
        let_ranks_start_cuda()
