"""barrier_and_log: everybody waits, one rank says one line."""

import logging
import os
import time

import pytest
from ranks import run_ranks

from hf_gradutils import barrier_and_log


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
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("hf_gradutils.dist_utils")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
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
