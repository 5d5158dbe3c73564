"""Nothing is left of ranks that are ended, and a test that leaks fails alone."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.harness.ranks import RankFailure, run_ranks

TESTS = Path(__file__).parents[1]


def test_nothing_is_left_behind_of_ended_ranks_and_what_they_started(tmp_path):
    with pytest.raises(RankFailure):
        run_ranks(_start_a_child_and_fail, 2, str(tmp_path))
    pids = [int(p.name) for p in tmp_path.iterdir()]
    assert len(pids) == 4
    time.sleep(0.2)
    assert not [pid for pid in pids if _is_alive(pid)]


def _start_a_child_and_fail(folder):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=dist.get_rank() == 1)
    for pid in (os.getpid(), child.pid):
        open(f"{folder}/{pid}", "w").close()
    dist.barrier()
    if dist.get_rank() == 0:
        raise RuntimeError("enough")
    time.sleep(1000)


def test_temporary_files_of_ranks_go_with_them(tmp_path):
    with pytest.raises(RankFailure):
        run_ranks(_make_a_folder_and_die, 2, tmp_path)
    folders = [Path(path.read_text()) for path in tmp_path.iterdir()]
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


def _make_a_folder_and_die(notes):
    (notes / str(dist.get_rank())).write_text(tempfile.mkdtemp())
    dist.barrier()
    os._exit(3)


LEAKS = {
    "changed environment variables ['LEAKED', 'PATH']": "os.environ['LEAKED'] = os.environ['PATH'] = 'secret'",
    "the working directory": "os.chdir('/')",
    "files ['leaked.txt']": "open('leaked.txt', 'w').close()",
    "threads ['leaked']": "threading.Thread(target=time.sleep, args=(3,), name='leaked', daemon=True).start()",
    "child processes": "children.append(subprocess.Popen(['sleep', '1000']))",
    "a process group": "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
}


@pytest.fixture
def inner_pytest(tmp_path):
    """Start pytest on one test file beside a copy of our conftest."""
    shutil.copy(TESTS / "conftest.py", tmp_path)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # as of one process

    def start(source):
        (tmp_path / "test_inner.py").write_text(source)
        options = ["-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider"]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "."],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(TESTS.parent), "TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    with tempfile.TemporaryDirectory() as scratch:  # what a killed pytest leaves; a short path, for its sockets
        yield start


@pytest.mark.slow
def test_what_a_test_leaks_fails_that_test_alone(inner_pytest):
    leaking = "".join(
        f"def test_{i}():\n    {code}\ndef test_{i}_clean(): pass\n" for i, code in enumerate(LEAKS.values())
    )
    imports = "import os, subprocess, threading, time\nimport torch.distributed as dist\nchildren = []\n"
    report = inner_pytest(imports + leaking).communicate(timeout=120)[0]
    assert f"{2 * len(LEAKS)} passed, {len(LEAKS)} errors" in report
    assert "secret" not in report
    for number, leak in enumerate(LEAKS):
        assert f"ERROR at teardown of test_{number} _" in report
        assert f"the test leaves behind {leak}" in report


FAILING = """
import os, time
from pathlib import Path
from tests.harness.ranks import ranks
from tests.harness.ranks.forkserver import helper_pids

@ranks(4, deadline_s=40)
def test_fails():
    (Path(__file__).parent / f"rank-{os.getpid()}").touch()
    if os.environ["RANK"] == "1":
        HERE
    time.sleep(1000)

def test_helpers():
    for pid in helper_pids():
        (Path(__file__).parent / f"helper-{pid}").touch()
"""


@pytest.mark.slow
def test_pytest_reports_the_rank_and_ends_with_nothing_left(inner_pytest, tmp_path):
    report = inner_pytest(FAILING.replace("HERE", "raise ValueError('no good')")).communicate(timeout=120)[0]
    assert "RankFailure: rank 1 of 4 raised ValueError: no good" in report
    assert "in test_fails" in report
    assert "1 failed, 1 passed" in report
    assert len(list(tmp_path.glob("helper-*"))) == 2
    _assert_all_end(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_the_ranks_end_when_pytest_is_stopped(how, inner_pytest, tmp_path):
    with inner_pytest(FAILING.replace("HERE", "pass")) as process:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("rank-*"))) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(how)
        process.communicate(timeout=60)
    assert len(list(tmp_path.glob("rank-*"))) == 4
    _assert_all_end(tmp_path)


def _assert_all_end(folder):
    pids = [int(path.name.partition("-")[2]) for path in folder.glob("*-*")]
    until = time.monotonic() + 10
    while (alive := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert pids
    assert not alive


def _is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
