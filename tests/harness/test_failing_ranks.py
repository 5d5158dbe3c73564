"""Ranks that raise, hang or die: the harness names the cause and leaves nothing of them."""

import ctypes
import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness.ranks import RankFailure, run_ranks


def test_a_rank_that_raises_fails_the_test_with_its_traceback():
    run_ranks(os.getpid, 1, init=False)  # the server is up now
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
    monkeypatch.setattr("tests.harness.ranks.processes.EXIT_S", 2.0)
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


@pytest.mark.slow
def test_ranks_skip_together_or_not_at_all():
    with pytest.raises(pytest.skip.Exception, match="not today"):
        run_ranks(_skip, 2, everywhere=True)
    with pytest.raises(RankFailure, match="rank 0 of 2 skipped: not today, but not every rank did"):
        run_ranks(_skip, 2, everywhere=False)


def _skip(everywhere):
    if everywhere or dist.get_rank() == 0:
        pytest.skip("not today")
