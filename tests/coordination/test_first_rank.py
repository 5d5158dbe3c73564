"""FirstRankPerNode on one node: order, failures, and every way of being launched."""

import contextlib
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from hf_gradutils import FirstRankPerNode
from hf_gradutils.errors import FirstRankError, InvalidArgumentError
from tests.harness.first_rank_cases import Metronome, logged_lines, meet, rank, wait_for
from tests.harness.ranks import RankFailure, ranks, run_ranks

PREPARE_S = 0.4
LAUNCHES = [
    pytest.param({"init": True}, id="after init"),
    pytest.param({"init": False}, id="before init, agent store"),
    pytest.param({"init": False, "agent": False}, id="variables only"),
]


def prepare(folder):
    """Write a file in two steps; whoever looks in between sees half of it."""
    (folder / "data").write_text("half")
    time.sleep(PREPARE_S)
    (folder / "data").write_text("whole")


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_others_see_only_what_the_first_has_finished(launch, tmp_path):
    seen = run_ranks(_prepare_and_read, 4, tmp_path, **launch)
    assert seen == [(True, "whole"), *[(False, "whole")] * 3]


def _prepare_and_read(folder):
    with FirstRankPerNode() as is_first:
        if is_first:
            prepare(folder)
        return is_first, (folder / "data").read_text()


@ranks(2)
def test_control_without_it_the_others_see_half(tmp_path):
    data, has_looked = tmp_path / "data", tmp_path / "looked"
    if rank() == 0:
        data.write_text("half")
        wait_for([has_looked])
    else:
        wait_for([data])
        time.sleep(0.05)
        assert data.read_text() == "half"
        has_looked.touch()


def test_without_a_launcher_the_only_rank_is_first(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with FirstRankPerNode() as is_first:
        assert is_first
    assert FirstRankPerNode()._try_bootstrap_pg() is False


@ranks(4, nodes=2)
def test_every_node_has_its_own_first(tmp_path):
    with FirstRankPerNode() as is_first:
        assert is_first == (os.environ["LOCAL_RANK"] == "0")
        folder = tmp_path / os.environ["GROUP_RANK"]
        folder.mkdir(exist_ok=True)
        if is_first:
            prepare(folder)
        assert (folder / "data").read_text() == "whole"


@ranks(2, init=False)
def test_bootstrap_says_whether_it_set_something_up():
    assert FirstRankPerNode()._try_bootstrap_pg() is True
    assert FirstRankPerNode()._try_bootstrap_pg() is False
    assert not dist.is_initialized()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_exception_in_the_first_reaches_all_others(launch, tmp_path):
    kinds = (RuntimeError, SystemExit, KeyboardInterrupt)
    with Metronome() as clock:
        results = run_ranks(_fail_in_first, 4, kinds, tmp_path, **launch)
    for kind, (first, *others) in zip(kinds, zip(*results, strict=True), strict=True):
        name, raised_at, _ = first
        assert name == kind.__name__, "the first keeps its own exception"
        for name, noticed_at, (message, global_rank, reason, notes) in others:
            assert name == "FirstRankError"
            assert clock.seconds(raised_at, noticed_at) < 1.0
            assert message.startswith("rank 0 of 4 on host")
            assert message.endswith(f": {kind.__name__}: disk full"), "one line"
            assert (global_rank, reason) == (0, f"{kind.__name__}: disk full")
            assert "_fail_in_first" in notes, "the original traceback"


def _fail_in_first(kinds, folder):
    meet(folder, 4)
    outcomes = []
    for kind in kinds:
        try:
            with FirstRankPerNode() as is_first:
                if not is_first:
                    raise AssertionError("a follower got in")
                (folder / "data").write_text("half")
                time.sleep(PREPARE_S)
                raised_at = time.monotonic()
                raise kind("disk full")
        except FirstRankError as error:
            told = (str(error), error.global_rank, error.reason, "".join(error.__notes__))
            outcomes.append((type(error).__name__, time.monotonic(), told))
        except BaseException as error:
            outcomes.append((type(error).__name__, raised_at, ""))
    return outcomes


DEATHS = [
    *LAUNCHES,
    # Rank 0 takes the store down with it.
    pytest.param({"init": True, "agent": False}, id="after init, no agent"),
]


@pytest.mark.parametrize("launch", DEATHS)
def test_the_death_of_the_first_reaches_all_others(launch, tmp_path):
    with Metronome() as clock, pytest.raises(RankFailure, match="rank 0 of 3 died"):
        run_ranks(_kill_first, 3, tmp_path, grace_s=3, **launch)
    died_at = float((tmp_path / "died").read_text())
    for follower in (1, 2):
        noticed_at, error = (tmp_path / str(follower)).read_text().split(maxsplit=1)
        assert clock.seconds(died_at, float(noticed_at)) < 2.0
        assert error.startswith("rank 0 of 3 on host")
        assert "has ended (killed, or left early) before it was done" in error


def _kill_first(folder):
    meet(folder, 3)  # the others have found the store, which may end with rank 0
    try:
        with FirstRankPerNode(poll_s=0.1) as is_first:
            if is_first:
                time.sleep(0.2)
                (folder / "died").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / str(rank())).write_text("0 entered")
    except FirstRankError as error:
        (folder / str(rank())).write_text(f"{time.monotonic()} {error}")


def test_a_first_that_ends_without_reaching_the_block_is_noticed(tmp_path):
    with pytest.raises(RankFailure, match="rank 0 of 2 died"):
        run_ranks(_never_come_back, 2, tmp_path, grace_s=3, init=False)
    assert "before it was done with" in (tmp_path / "1").read_text()


def _never_come_back(folder):
    with FirstRankPerNode():
        pass
    if rank() == 0:
        time.sleep(0.3)
        os._exit(0)  # a launcher sees success and ends no rank
    try:
        with FirstRankPerNode():
            (folder / "1").write_text("entered")
    except FirstRankError as error:
        (folder / "1").write_text(str(error))


@ranks(2, init=False)
def test_no_process_group_timeout_limits_the_preparation(tmp_path):
    (tmp_path / f"here{rank()}").touch()
    wait_for([tmp_path / "here0", tmp_path / "here1"])  # the group does not wait for who starts late
    dist.init_process_group("gloo", timeout=timedelta(seconds=0.6))
    with FirstRankPerNode() as is_first:
        if is_first:
            time.sleep(1.2)
            (tmp_path / "data").touch()
        assert (tmp_path / "data").exists()
    if rank() == 1:  # control: a collective that rank 0 is late for does give up
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.barrier()


def test_a_message_that_cannot_be_encoded_reaches_the_others():
    name, message = run_ranks(_fail_unencodably, 2)[1]
    assert name == "FirstRankError"
    assert "\\udcff" in message


def _fail_unencodably():
    try:
        with FirstRankPerNode():
            raise OSError(f"no such file: {os.fsdecode(b'data' + bytes([255]))}")
    except (OSError, FirstRankError) as error:
        return type(error).__name__, str(error).encode(errors="backslashreplace").decode()


@ranks(2)
def test_threads_keep_their_blocks_apart(tmp_path):
    context = FirstRankPerNode(name="shared")
    contexts = {"a": FirstRankPerNode(name="a"), "b": FirstRankPerNode(name="b")}

    def work(name):
        with contexts[name] as is_first, context:
            assert is_first == (rank() == 0)
            if is_first:
                time.sleep(0.1)
                (tmp_path / name).touch()
            assert (tmp_path / name).exists()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, contexts))


@ranks(2)
def test_an_exit_stack_tells_blocks_apart_by_their_own_line(tmp_path):
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(FirstRankPerNode()) == (rank() == 0)
    if rank() == 0:
        with contextlib.ExitStack() as stack:
            stack.enter_context(FirstRankPerNode())
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(FirstRankPerNode()) == (rank() == 0)


def test_waiting_is_logged_and_may_be_limited(tmp_path):
    lines = run_ranks(_wait_with_log, 2, tmp_path)[1]
    running = re.compile(
        r"rank 1 waits for rank 0 on host \S+, running for \d+ s \(\S*test_first_rank\._wait_with_log:\d+ with .*\)"
    )
    assert any(running.fullmatch(line) for line in lines), lines
    assert "gave up after 0.6 s" in lines[-1]


def _wait_with_log(folder):
    lines = logged_lines()
    runs, has_given_up = folder / "runs", folder / "given up"
    if rank() == 1:
        wait_for([runs])
    try:
        with FirstRankPerNode(log_every_s=0.1, timeout_s=0.6) as is_first:
            assert is_first
            runs.touch()
            wait_for([has_given_up])
    except FirstRankError as error:
        lines.append(str(error))
        has_given_up.touch()
    return lines


def test_a_child_that_the_first_forks_does_not_end_the_block(tmp_path):
    assert run_ranks(_fork_inside, 2, tmp_path) == ["whole", "whole"]


def _fork_inside(folder):
    context = FirstRankPerNode()
    with context as is_first:
        if is_first:
            (folder / "data").write_text("half")
            child = os.fork()
            if child == 0:
                context.__exit__(None, None, None)  # as if the child had run to the end of the block
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(PREPARE_S)
            (folder / "data").write_text("whole")
        return (folder / "data").read_text()


def test_bad_options_and_functions_are_refused():
    with pytest.raises(InvalidArgumentError, match="poll_s must be > 0, got 0"):
        FirstRankPerNode(poll_s=0)

    def generator():
        yield

    async def coroutine():
        pass

    for function in (generator, coroutine):
        with pytest.raises(InvalidArgumentError, match="whose body runs after the call has returned"):
            FirstRankPerNode()(function)
