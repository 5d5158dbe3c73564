"""barrier_and_log: all ranks wait, one logs a line."""

import logging
import os
import signal
import time

import pytest

from hf_gradutils import barrier_and_log
from hf_gradutils.coordination.barrier import wait_for_all
from hf_gradutils.errors import GradUtilsError
from tests.harness.first_rank_cases import logged_lines
from tests.harness.ranks import RankFailure, run_ranks


@pytest.mark.parametrize("launch", [{"init": True}, {"init": False}, {"init": False, "agent": False}])
def test_all_ranks_wait_and_rank_0_logs_one_line_with_the_time(launch):
    results = run_ranks(_wait_and_log, 3, **launch)
    slowest_arrived_at = max(arrived for arrived, _, _ in results)
    assert all(left >= slowest_arrived_at for _, left, _ in results)
    lines = [line for _, _, lines in results for line in lines]
    assert len(lines) == 2
    assert lines[0].endswith("] data is ready")
    assert lines[0].startswith("[2")
    assert results[0][2] == lines


def _wait_and_log():
    lines = logged_lines("hf_gradutils.dist_utils", logging.INFO)
    if os.environ["RANK"] == "1":
        time.sleep(0.4)
    arrived = time.time()
    barrier_and_log("data is ready")
    left = time.time()
    barrier_and_log("once more")
    return arrived, left, lines


def test_a_single_process_logs_too(caplog):
    with caplog.at_level(logging.INFO, logger="hf_gradutils.dist_utils"):
        barrier_and_log("alone")
    assert [record.getMessage().endswith("] alone") for record in caplog.records] == [True]


def test_a_rank_that_ends_without_coming_is_an_error_for_the_others(tmp_path):
    with pytest.raises(RankFailure, match="rank 1 of 3 died"):
        run_ranks(_one_never_comes, 3, tmp_path, grace_s=3, init=False)
    for other in (0, 2):
        assert "not every rank came to barrier_and_log: rank 1 of 3 on host" in (tmp_path / str(other)).read_text()


def _one_never_comes(folder):
    barrier_and_log("all here")
    if os.environ["RANK"] == "1":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        barrier_and_log("never all here")
    except GradUtilsError as error:
        (folder / os.environ["RANK"]).write_text(str(error))


def test_who_is_missing_is_logged():
    assert "rank 0 waits at here for 1 of 3 ranks: 2" in run_ranks(_describe_missing, 3, init=False)[0]


def _describe_missing():
    if os.environ["RANK"] == "2":
        time.sleep(0.5)
    lines = logged_lines()
    wait_for_all("here", log_every_s=0.3)
    return lines
