"""The multi-process harness: what it gives a test, and what it does with ranks that misbehave."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness.ranks import RankFailure, ranks, run_ranks

TESTS = Path(__file__).parents[1]


@ranks(4)
def test_ranks_talk_to_each_other_over_gloo():
    assert dist.get_backend() == "gloo"
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert total == 6


@ranks(4, dp=2, tp=2)
def test_a_mesh_has_the_dims_that_were_asked_for(mesh):
    assert mesh.mesh_dim_names == ("dp", "tp")
    assert mesh.get_local_rank("dp") * 2 + mesh.get_local_rank("tp") == dist.get_rank()


@pytest.mark.parametrize("factor", [2, 3])
@ranks(2)
def test_parameters_and_fixtures_reach_the_ranks(factor, tmp_path):
    (tmp_path / f"{dist.get_rank()}").write_text(str(factor))
    dist.barrier()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]
    assert factor in (2, 3)


@ranks(4, nodes=2, init=False, env={"EXTRA": "1", "TORCHELASTIC_RUN_ID": None})
def test_two_nodes_are_simulated_by_their_variables():
    rank = int(os.environ["RANK"])
    assert (os.environ["LOCAL_RANK"], os.environ["GROUP_RANK"]) == (str(rank % 2), str(rank // 2))
    assert os.environ["EXTRA"] == "1"
    assert "TORCHELASTIC_RUN_ID" not in os.environ
    assert not dist.is_initialized()


@pytest.mark.parametrize("agent", [True, False])
def test_a_rank_may_make_the_group_itself(agent):
    assert run_ranks(_init_from_the_environment, 2, init=False, agent=agent) == [1.0, 1.0]


def _init_from_the_environment():
    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def test_results_come_back_in_rank_order():
    assert [t.tolist() for t in run_ranks(_own_rank, 3)] == [[0], [1], [2]]


def _own_rank():
    return torch.tensor([dist.get_rank()])


def test_results_larger_than_a_pipe_arrive_whole():
    first, second = run_ranks(_large, 2)
    assert (first == 0).all()
    assert (second == 1).all()
    assert len(second) == 3_000_000


def _large():
    return torch.full((3_000_000,), dist.get_rank(), dtype=torch.float64)


def test_a_function_that_a_rank_cannot_import_is_refused():
    def local():
        pass

    with pytest.raises(ValueError, match="define it at the top level of its module"):
        run_ranks(local, 2)


def test_runs_leave_no_file_open_and_nobody_listening():
    run_ranks(_own_rank, 2)
    before = psutil.Process().num_fds()
    run_ranks(_own_rank, 2)
    run_ranks(_init_from_the_environment, 2, init=False, agent=False)
    with pytest.raises(RankFailure):
        run_ranks(_assert_no_rank, 2)
    assert psutil.Process().num_fds() == before
    assert not [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match="must multiply to the 3 ranks, got dp=2, tp=2: 4"):
        ranks(3, dp=2, tp=2)


def test_a_rank_that_raises_fails_the_test_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 of 4 raised ValueError: no good\n(.|\n)*in _one_raises\n"):
        run_ranks(_one_raises, 4)
    assert time.monotonic() - start < 20, "the others were waiting in a barrier"


def _one_raises():
    print("before the error")
    if dist.get_rank() == 1:
        raise ValueError("no good")
    dist.barrier()


def test_the_cause_is_named_before_the_ranks_that_saw_their_connection_close():
    with pytest.raises(RankFailure) as failure:
        run_ranks(_one_is_killed, 4, grace_s=5)
    assert str(failure.value).startswith("rank 2 of 4 died (killed by SIGKILL)")
    assert [report.kind for report in failure.value.reports] == ["raised", "raised", "died", "raised"]


def _one_is_killed():
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def test_a_failed_assertion_shows_its_values():
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised AssertionError: assert \(1 \* 2\) == 0"):
        run_ranks(_assert_no_rank, 2)


def _assert_no_rank():
    assert dist.get_rank() * 2 == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exit", "rank 0 of 1 raised SystemExit: 3"),
        ("segfault", "rank 0 of 1 died .killed by SIGSEGV.(.|\n)*in _end_oddly"),
        ("unpicklable", "rank 0 of 1 raised .*[Pp]ickl"),
        ("stays", "rank 0 of 1 hangs: its body is over, but it has not left"),
    ],
)
def test_odd_ends_are_told_apart(how, message, monkeypatch):
    monkeypatch.setattr("tests.harness.ranks.EXIT_S", 2.0)
    with pytest.raises(RankFailure, match=message):
        run_ranks(_end_oddly, 1, how)


def _end_oddly(how):
    if how == "exit":
        sys.exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "stays":
        threading.Thread(target=time.sleep, args=(1000,)).start()
    return (lambda: None) if how == "unpicklable" else None


def test_what_a_failed_rank_printed_is_shown():
    with pytest.raises(RankFailure, match="before the error"):
        run_ranks(_one_raises, 2)


def test_a_rank_that_hangs_fails_the_test_with_its_stack():
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 2 of 3 hangs: not finished after 3 s\n(.|\n)*in _one_hangs"):
        run_ranks(_one_hangs, 3, deadline_s=3)
    assert time.monotonic() - start < 15


def _one_hangs():
    if dist.get_rank() == 2:
        time.sleep(1000)


def test_of_several_ranks_that_hang_the_one_the_others_wait_for_is_named_first():
    with pytest.raises(RankFailure) as failure:
        run_ranks(_one_holds_the_interpreter, 3, deadline_s=3)
    first, _, others = str(failure.value).partition("rank 0 of 3 hangs")
    assert first.startswith("rank 1 of 3 hangs: not finished after 3 s")
    assert "in _one_holds_the_interpreter" in first
    assert "in all_reduce" in others


def _one_holds_the_interpreter():
    if dist.get_rank() == 1:
        ctypes.PyDLL(None).sleep(1000)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "message"),
    [("kill", "killed by SIGKILL"), ("exit", "exit code 3"), ("quiet", "exit code 0")],
)
def test_a_rank_that_dies_fails_the_test(how, message):
    with pytest.raises(RankFailure, match=rf"rank 1 of 2 died \({message}\)"):
        run_ranks(_one_dies, 2, how)


def _one_dies(how):
    if dist.get_rank() == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3 if how == "exit" else 0)
    time.sleep(1000)


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


def test_ranks_skip_together_or_not_at_all():
    with pytest.raises(pytest.skip.Exception, match="not today"):
        run_ranks(_skip, 2, everywhere=True)
    with pytest.raises(RankFailure, match="rank 0 of 2 skipped: not today, but not every rank did"):
        run_ranks(_skip, 2, everywhere=False)


def _skip(everywhere):
    if everywhere or dist.get_rank() == 0:
        pytest.skip("not today")


def test_a_warning_in_a_rank_is_an_error():
    with pytest.raises(RankFailure, match="UserWarning: careful"):
        run_ranks(_warn, 1)


@pytest.mark.filterwarnings("ignore:careful")
def test_a_tests_own_warning_filters_reach_its_ranks():
    run_ranks(_warn, 1)


def _warn():
    warnings.warn("careful", stacklevel=1)


def test_four_ranks_of_a_tiny_model_take_about_a_second():
    run_ranks(_train_a_step, 4)  # the server is up now
    start = time.monotonic()
    run_ranks(_train_a_step, 4)
    assert time.monotonic() - start < 5, "under half a second on two free cores"


def _train_a_step():
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    assert model.module.weight.grad is not None


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

    def start(source):
        (tmp_path / "test_inner.py").write_text(source)
        options = ["-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider"]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "."],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(TESTS.parent), "TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    with tempfile.TemporaryDirectory() as scratch:  # what a killed pytest leaves; a short path, for its sockets
        yield start


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
from tests.harness.ranks import helper_pids, ranks

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


def test_pytest_reports_the_rank_and_ends_with_nothing_left(inner_pytest, tmp_path):
    report = inner_pytest(FAILING.replace("HERE", "raise ValueError('no good')")).communicate(timeout=120)[0]
    assert "RankFailure: rank 1 of 4 raised ValueError: no good" in report
    assert "in test_fails" in report
    assert "1 failed, 1 passed" in report
    assert len(list(tmp_path.glob("helper-*"))) == 2
    _assert_all_end(tmp_path)


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
