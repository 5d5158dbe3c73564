"""Passages through one block again and again: in epochs, on several nodes, nested, tried again, and with limits."""

import contextlib
import os
import time

import pytest

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination import turn
from hf_gradutils.errors import FirstRankError
from tests.harness.first_rank_cases import meet, rank, wait_for
from tests.harness.ranks import ranks, run_ranks

pytestmark = pytest.mark.slow


def node() -> str:
    return os.environ["GROUP_RANK"]


def test_nodes_wait_for_each_other_in_each_of_several_passages_with_the_same_values(tmp_path):
    """Node 1 comes late to its second passage, and fails there."""
    outcomes = run_ranks(_fail_in_the_second, 4, tmp_path, nodes=2, init=False)
    assert [message for _, message in outcomes[2:]] == ["disk full", outcomes[3][1]]
    for waited_s, message in outcomes[:2]:
        assert waited_s > 0.7, "the first passage's end is not taken for the second's"
        assert message.startswith("rank 2 of 4 on host")


def _fail_in_the_second(folder):
    meet(folder, 4)
    path = "x"
    for number in range(2):
        if number and node() == "1":
            time.sleep(1.0)
        start_s = time.monotonic()
        try:
            with FirstRankPerNode() as is_first:
                if number and node() == "1" and is_first:
                    raise OSError("disk full")
                assert path
        except (OSError, FirstRankError) as error:
            return time.monotonic() - start_s, str(error)
    return 0.0, "no error"


def test_a_work_of_an_earlier_epoch_is_not_taken_for_that_of_this_one(tmp_path):
    """The files of each epoch are new; in the second, rank 1 skips the first, and comes to the second before rank 0."""
    seen = run_ranks(_epochs, 2, tmp_path, init=False)
    assert seen[1] == ["0 a", "0 b", "1 b"]


def _epochs(folder):
    seen = []
    for epoch in range(2):
        for item in "ab":
            if epoch == 1 and item == "a" and rank() == 1:
                continue
            if epoch == 1 and item == "b" and rank() == 0:
                time.sleep(0.7)
            with FirstRankPerNode() as is_first:
                if is_first:
                    (folder / item).write_text(f"{epoch} {item}")
                seen.append((folder / item).read_text())
        (folder / f"done-{epoch}-{rank()}").touch()
        wait_for([folder / f"done-{epoch}-{other}" for other in range(2)])
    return seen


@pytest.mark.parametrize("name", [None, "files"])
def test_an_own_error_that_is_left_alone_shifts_nothing(name, tmp_path):
    """Each epoch writes the file anew; a generator that rank 1 leaves early ends its block with an error, too."""
    seen = run_ranks(_leave_errors_alone, 2, tmp_path, name, init=False)[1]
    assert seen == [f"whole {epoch}" for epoch in range(1, 5)]


def _leave_errors_alone(folder, name):
    seen, path = [], folder / "data"

    def read_lines(epoch):
        with FirstRankPerNode(name=name) as is_first:
            if is_first:
                path.write_text(f"whole {epoch}")
            yield path.read_text()
            yield "not read by rank 1"

    for epoch in range(1, 5):
        if rank() == 0 and epoch > 1:
            time.sleep(0.3)
        for line in read_lines(epoch):
            seen.append(line)
            if rank() == 1:
                break
        (folder / f"read-{epoch}-{rank()}").touch()
        wait_for([folder / f"read-{epoch}-{other}" for other in range(2)])
    return seen


def test_a_first_rank_that_fails_in_a_later_passage_has_not_failed_in_an_earlier_one(tmp_path):
    assert run_ranks(_fail_later, 2, tmp_path, init=False) == [["c"], ["c"]]


def _fail_later(folder):
    failed = []
    if rank() == 1:
        wait_for([folder / "c"])
    for item in "abc":
        try:
            with FirstRankPerNode() as is_first:
                if is_first:
                    (folder / item).touch()
                if item == "c":
                    time.sleep(0.2)
                    raise OSError("disk full")
        except (OSError, FirstRankError):
            failed.append(item)
    return failed


def test_limits_are_for_a_ranks_own_passage(tmp_path):
    """Six passages, of which each takes longer than half of the limit, and the pauses for values that differ."""
    assert run_ranks(_with_limits, 2, tmp_path, init=False) == [6 + 4] * 2


def _with_limits(folder):
    num_passages = 0
    for number in range(6):
        with FirstRankPerNode(timeout_s=1.0) as is_first:
            if is_first:
                time.sleep(0.6)
            num_passages += number >= 0
    for shard in range(rank(), 8, 2):
        with FirstRankPerNode(timeout_s=1.0):
            num_passages += shard >= 0
    return num_passages


def test_a_helper_that_ranks_enter_from_different_places_is_one_block(tmp_path):
    assert run_ranks(_from_two_places, 2, tmp_path, init=False) == ["made", "made"]


@contextlib.contextmanager
def first_of_all():
    with FirstRankPerNode() as is_first:
        yield is_first


def _from_two_places(folder):
    turn.HOLD_S = 0.5
    path = folder / "data"
    if rank() == 0:
        with first_of_all():
            time.sleep(0.3)
            path.write_text("made")
            return path.read_text()
    with first_of_all():
        return path.read_text()


def test_ranks_with_certain_values_overlap(tmp_path):
    """The first may be in a later passage, about something else, while another is in an earlier one."""
    both_inside = run_ranks(_overlap, 2, tmp_path, init=False)[1]
    assert both_inside == "first is in b"


def _overlap(folder):
    for item in "ab":
        with FirstRankPerNode() as is_first:
            if is_first and item == "b":
                (folder / "b").touch()
                wait_for([folder / "seen"], limit_s=5.0)
            if not is_first and item == "a":
                wait_for([folder / "b"], limit_s=5.0)
                (folder / "seen").touch()
                return "first is in b"
    return "no overlap"


@ranks(3, nodes=3, init=False)
def test_a_node_that_is_past_the_block_and_gone_is_not_missed(tmp_path):
    """Node 1 skips the first block and ends, while node 2 is slow in it."""
    if node() != "1":
        with FirstRankPerNode(name="one"):
            time.sleep(2.0 if node() == "2" else 0.0)
    if node() == "1":
        with FirstRankPerNode(name="two", waits_for_nodes=False):
            pass


@ranks(2, nodes=2, init=False)
def test_a_node_in_a_block_within_the_block_has_not_skipped_it(tmp_path):
    meet(tmp_path, 2)
    start_s = time.monotonic()
    with FirstRankPerNode():
        if node() == "1":
            with FirstRankPerNode():
                time.sleep(1.0)
    assert time.monotonic() - start_s > 0.8


def test_a_limit_that_is_shorter_than_the_pause_ends_the_pause(tmp_path):
    assert run_ranks(_limited, 2, tmp_path, init=False) == [True, False]


def _limited(folder):
    meet(folder, 2)
    for own in [f"folder of rank {rank()}"]:
        with FirstRankPerNode(timeout_s=1.0) as is_first:
            assert own
    return is_first


@ranks(2, init=False)
def test_passages_within_passages_at_one_place(tmp_path):
    def prepare(depth):
        with FirstRankPerNode() as is_first:
            path = tmp_path / str(depth)
            if is_first:
                time.sleep(0.1)
                path.touch()
            assert path.exists()
            if depth:
                prepare(depth - 1)

    for _ in range(2):
        prepare(3)
        (tmp_path / f"left-{rank()}").touch()
        wait_for([tmp_path / "left-0", tmp_path / "left-1"])
