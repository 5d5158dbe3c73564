"""Waits end when their limit says, and a rank that waits for ranks that never come says so."""

import math
import os
import socket
import threading
import time

import pytest

from hf_gradutils import FirstRankPerNode
from hf_gradutils.cli import main
from hf_gradutils.coordination import tcp_store
from hf_gradutils.coordination.store import leave, open_channel
from hf_gradutils.errors import FirstRankError, LauncherError
from tests.harness.first_rank_cases import Metronome, logged_lines, meet, rank, wait_for
from tests.harness.ranks import ranks


@ranks(2, init=False, agent=False)
def test_the_limit_of_a_block_holds_where_no_rank_hosts_the_store():
    if rank() == 1:
        with Metronome() as clock:
            start = time.monotonic()
            with pytest.raises(LauncherError, match=r"gave up after 0.5 s: nothing listens there"):
                FirstRankPerNode(timeout_s=0.5).__enter__()
            assert clock.seconds(start, time.monotonic()) < 1.5


@ranks(1, init=False, agent=False, env={"WORLD_SIZE": "2", "MASTER_ADDR": "198.51.100.1"})
def test_the_limit_of_rank_0_holds_where_master_addr_is_another_host():
    """MASTER_ADDR is a documentation address (RFC 5737), where nothing answers; by default torch waits 30 s."""
    with Metronome() as clock:
        start = time.monotonic()
        with pytest.raises(LauncherError, match=r"^cannot host .*MASTER_ADDR must name"):
            open_channel(timeout_s=2.0)
        assert clock.seconds(start, time.monotonic()) < 4.0


@ranks(2, init=False)
def test_a_limit_may_be_infinite():
    open_channel(timeout_s=math.inf)
    with FirstRankPerNode(timeout_s=math.inf) as is_first:
        assert is_first == (rank() == 0)


@ranks(2, init=False, agent=False)
def test_a_listener_that_says_nothing_is_given_up(tmp_path):
    """torch 2.13 ignores its timeout there."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank() == 0:
        with socket.create_server(address):
            (tmp_path / "listens").touch()
            with pytest.raises(LauncherError, match=rf"port {address[1]} is taken on this host"):
                open_channel()
            wait_for([tmp_path / "given up"])
    else:
        wait_for([tmp_path / "listens"])
        tcp_store.CONNECT_TIMEOUT_S = 1.0
        with Metronome() as clock:
            start = time.monotonic()
            with pytest.raises(LauncherError, match=r"has not answered within 1 s: what listens there is no store"):
                open_channel()
            assert clock.seconds(start, time.monotonic()) < 3.0
        (tmp_path / "given up").touch()


@ranks(2, init=False, agent=False)
def test_two_threads_that_open_the_channel_have_a_limit_each():
    if rank() == 1:
        errors = []

        def enter(timeout_s):
            try:
                open_channel(timeout_s=timeout_s)
            except LauncherError as error:
                errors.append((time.monotonic() - start, str(error)))

        threads = [threading.Thread(target=enter, args=[timeout_s]) for timeout_s in (1.2, 0.3)]
        with Metronome() as clock:
            start = time.monotonic()
            for thread in threads:
                thread.start()
                time.sleep(0.1)
            for thread in threads:
                thread.join()
        (first_s, first), (last_s, last) = errors
        assert clock.seconds(start, start + first_s) < 0.8
        assert "another thread of this process waits" in first
        assert last_s > 1.0
        assert clock.seconds(start, start + last_s) < 2.2
        assert "nothing listens there" in last


@ranks(2, init=False)
def test_the_waits_of_one_entry_share_its_limit(tmp_path):
    """For the first rank to come, then for its turn to end."""
    meet(tmp_path, 2)
    if rank() == 0:
        time.sleep(0.6)
        with FirstRankPerNode():
            wait_for([tmp_path / "given up"])
        return
    with Metronome() as clock:
        start = time.monotonic()
        with pytest.raises(FirstRankError, match=r"gave up after 0.8 s"):
            FirstRankPerNode(timeout_s=0.8).__enter__()
        assert clock.seconds(start, time.monotonic()) < 1.2, "control: two limits are 1.4 s"
    (tmp_path / "given up").touch()


@ranks(2, nodes=2, init=False)
def test_the_block_itself_does_not_count_against_the_limit_of_leaving(tmp_path):
    meet(tmp_path, 2)
    with FirstRankPerNode(timeout_s=1.0):
        time.sleep(1.1 + 0.2 * rank())


@ranks(2, init=False, agent=False)
def test_rank_0_says_for_whom_it_stays():
    if rank() == 0:
        lines = logged_lines("hf_gradutils.store")
        open_channel()
        leave(grace_s=1.2)
        (line,) = lines
        assert "stays up to 1.2 s for ranks that have not come yet: 1" in line
        assert "RANK=0 and WORLD_SIZE=2 say that this is one of 2 processes: if it is the only one, unset both" in line


@ranks(2, init=False, agent=False)
def test_rank_0_says_nothing_while_it_stays_for_ranks_that_have_come(tmp_path):
    lines = logged_lines("hf_gradutils.store")
    meet(tmp_path, 2)
    if rank() == 0:
        leave(grace_s=1.2)
        assert lines == []
        (tmp_path / "left").touch()
    wait_for([tmp_path / "left"])


@pytest.mark.parametrize("who", [0, 1])
def test_env_ends_when_its_limit_says(who, capfd):
    _env_alone(who)


@ranks(2, init=False, agent=False)
def _env_alone(who):
    if rank() == who:
        with Metronome() as clock:
            start = time.monotonic()
            assert main(["env", "--timeout_s", "0.5"]) == 2
            assert clock.seconds(start, time.monotonic()) < 1.5
