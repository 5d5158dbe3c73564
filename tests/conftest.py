"""Tests leave the pytest process as they found it."""

import gc
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import decorator
from tests.harness.ranks.forkserver import helper_pids, stop_forkserver
from tests.harness.ranks.launch import UPSTREAM_WARNINGS

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # as DeepSpeed sets it, which accelerate imports
# Before anything imports transformers: no test talks to a hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

# Every connection to a TCPStore looks up the name of ::ffff:127.0.0.1 in the DNS, in the server's only thread too.
# Where a name server loses one packet in a hundred, all ranks stand still for 5 s then. Over TCP it answers or refuses.
os.environ["RES_OPTIONS"] = "use-vc timeout:1 attempts:1"

FILES_BEFORE = pytest.StashKey[set[str]]()

tqdm.monitor_interval = 0  # its monitor is a thread that stays
torch.set_num_threads(1)  # as in the ranks: these models are too small to be split up


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what is marked slow or starts several ranks")
    parser.addoption("--wide", action="store_true", help="run all combinations of what is marked wide")
    parser.addoption("--browser", action="store_true", help="run what is marked browser, which fails without one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of many combinations keep some, at least one, always the same; a test that is asked for by its name keeps all.

    An eighth of what is marked wide, and half of the cases of a test that starts several ranks in four or more. What
    needs a browser is kept with ``--browser`` alone, so that a run without one has not skipped it.
    """
    if not config.getoption("browser"):
        _leave_out({item for item in items if item.get_closest_marker("browser")}, config, items)
    if config.getoption("wide") or any("::" in arg for arg in config.args) or config.option.keyword:
        return
    by_function: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        part = 8 if item.get_closest_marker("wide") else 2 if _num_ranks(item) > 1 else 1
        if part == 1:
            continue
        by_function.setdefault((item.nodeid.partition("[")[0], part), []).append(item)
    left_out: set[pytest.Item] = set()
    for (name, part), cases in by_function.items():
        if part == 8 or len(cases) >= 4:
            left_out.update(random.Random(name).sample(cases, len(cases) - max(1, len(cases) // part)))
    _leave_out(left_out, config, items)


def _leave_out(left_out: set[pytest.Item], config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _num_ranks(item: pytest.Item) -> int:
    """Ranks that a test starts, as far as its parameters tell."""
    layout = item.callspec.params.get("layout") if hasattr(item, "callspec") else None
    return LAYOUTS[layout].num_ranks if layout in LAYOUTS else 1


def pytest_configure(config: pytest.Config) -> None:
    paths = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    if not all("gpu" in path.parts for path in paths):
        # All others are for CPUs, also where there is a GPU. DeepSpeed would compile operators for minutes.
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # as DeepSpeed sets it, whenever accelerate first imports it
    for message, category in UPSTREAM_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")
    if config.getoption("fast"):
        decorator.most_ranks = 1
        config.option.markexpr = "not slow"


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # as in each rank


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaks, and clear the leak away where it could fail the next test too."""
    cwd, env = Path.cwd(), _environment()
    threads, pids, files = _threads(), _child_pids(), _files(cwd)
    yield
    logging.disable(logging.NOTSET)  # by benchmarks, whose functions some tests call
    leaks = []
    if Path.cwd() != cwd:
        leaks.append(f"the working directory {Path.cwd()}")
        os.chdir(cwd)
    if changed := {name for name, _ in _environment().items() ^ env.items()}:
        leaks.append(f"changed environment variables {sorted(changed)}")  # names only: values may be secret
        _restore(env)
    if dist.is_initialized():
        leaks.append("a process group")
        dist.destroy_process_group()
    if started := _settled(threads):
        leaks.append(f"threads {sorted(thread.name for thread in started)}")
    if children := _child_pids() - pids:
        leaks.append(f"child processes {[_end(pid) for pid in sorted(children)]}")
    # Two files of tests at a time: what the other one writes for a moment is not this one's. Looked at in the end.
    if (written := _files(cwd) - files) and "PYTEST_XDIST_WORKER" not in os.environ:
        leaks.append(f"files {sorted(written)} in {cwd}")
    if leaks:
        pytest.fail("the test leaves behind " + "; ".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, shared by the tests of all recipes."""
    return tmp_path_factory.mktemp("hf_home")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[FILES_BEFORE] = _files(Path.cwd())


def pytest_sessionfinish(session: pytest.Session) -> None:
    stop_forkserver()
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and (written := _files(Path.cwd()) - session.config.stash[FILES_BEFORE]):
        session.config.get_terminal_writer().line(f"\nthe tests leave behind files {sorted(written)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _environment() -> dict[str, str]:
    # The second is torch's own, set when something first needs its compiler.
    return {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")}


def _restore(env: dict[str, str]) -> None:
    for name in _environment().keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def _settled(before: set[threading.Thread], patience_s: float = 1.0) -> set[threading.Thread]:
    """The new threads, once those that are about to end have ended."""
    until = time.monotonic() + patience_s
    while (started := _threads() - before) and time.monotonic() < until:
        time.sleep(0.02)
    return started


def _child_pids() -> set[int]:
    return {child.pid for child in psutil.Process().children()} - helper_pids()


def _end(pid: int) -> str:
    child = psutil.Process(pid)
    text = f"{pid} ({child.name()}, {child.status()})"
    child.kill()
    child.wait(10)
    return text


def _files(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith((".", "__pycache__"))}
