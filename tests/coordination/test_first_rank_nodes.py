"""FirstRankPerNode on several nodes: scopes, launchers, and waiting for each other."""

import logging
import os
import re
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from hf_gradutils import FirstRankPerNode
from hf_gradutils._environment import read_launched_rank
from hf_gradutils.coordination import heartbeat
from hf_gradutils.coordination.store import current_channel, leave
from hf_gradutils.errors import FirstRankError, InvalidArgumentError
from tests.harness.first_rank_cases import Metronome, meet, on_a_host_of_its_own, rank, wait_for
from tests.harness.ranks import ranks, run_ranks


def node() -> str:
    return os.environ["GROUP_RANK"]


def test_in_the_world_rank_0_comes_first_then_the_firsts_of_the_nodes_then_the_rest(tmp_path):
    results = run_ranks(_run_in_world, 6, tmp_path, nodes=3, init=False)
    firsts, starts, ends = zip(*results, strict=True)
    assert firsts == (True, False, False, False, False, False)
    assert ends[0] <= min(starts[1:])
    for first, follower in ((2, 3), (4, 5)):
        assert ends[first] <= starts[follower]
    assert starts[4] < ends[2], "the other nodes' firsts do not wait for each other"


def _run_in_world(folder):
    """The first ranks of the other two nodes stay until both are in."""
    with FirstRankPerNode(scope="world") as is_first:
        start = time.monotonic()
        (folder / str(rank())).touch()
        if rank() in (2, 4):
            wait_for([folder / "2", folder / "4"])
        time.sleep(0.05)
        return is_first, start, time.monotonic()


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_auto_finds_out_whether_the_nodes_share_the_directory(shared, init, tmp_path):
    firsts = run_ranks(_run_in_auto, 4, tmp_path, shared, nodes=2, init=init)
    assert firsts == ([True, False, False, False] if shared else [True, False, True, False])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "the file it looked at is gone"


def _run_in_auto(folder, shared):
    firsts = set()
    for _ in range(2):
        with FirstRankPerNode(scope="auto", cache_dir=folder if shared else folder / node()) as is_first:
            firsts.add(is_first)
    (is_first,) = firsts
    return is_first


@ranks(2, init=False)
def test_auto_on_one_node_is_that_node(tmp_path):
    with FirstRankPerNode(scope="auto", cache_dir=tmp_path) as is_first:
        assert is_first == (rank() == 0)


def test_a_failure_of_rank_0_ends_the_world(tmp_path):
    with Metronome() as clock:
        (raised_at, _), *others = run_ranks(_fail_in_the_world, 4, tmp_path, nodes=2, init=False)
    for noticed_at, error in others:
        assert "rank 0 of 4 on host" in error
        assert "disk full" in error
        assert clock.seconds(raised_at, noticed_at) < 1.0


def _fail_in_the_world(folder):
    meet(folder, 4)
    try:
        with FirstRankPerNode(scope="world"):
            assert rank() == 0
            time.sleep(0.2)
            raised_at = time.monotonic()
            raise RuntimeError("disk full")
    except FirstRankError as error:
        return time.monotonic(), str(error)
    except RuntimeError as error:
        return raised_at, str(error)


@ranks(4, nodes=2, init=False)
def test_nested_blocks_of_the_world_do_not_wait_for_each_other():
    with FirstRankPerNode(scope="world") as outer, FirstRankPerNode(scope="world") as inner:
        assert outer == inner == (rank() == 0)


@ranks(4, nodes=2, init=False)
def test_a_block_for_some_nodes_only_need_not_wait_for_the_others():
    if node() == "0":
        with FirstRankPerNode(waits_for_nodes=False) as is_first:
            assert is_first == (rank() == 0)


RUNNING = r"rank 1 waits for rank 0 on host \S+, running for \d+ s \(\S+:\d+.*\)"
MISSING = r"rank 1 waits for rank 0 on host \S+, which has not reached it"
OTHER_NODE = r"rank 2 has finished \S+: rank 2 waits for rank 0 on host \S+, running for \d+ s"


def test_the_rank_that_a_node_waits_for_is_logged(tmp_path):
    run_ranks(_come_late, 4, tmp_path, nodes=2, init=False)  # ends when all has been logged, or hangs


def _come_late(folder):
    awaited = {"running": (1, RUNNING), "other node": (2, OTHER_NODE), "missing": (1, MISSING)}

    def look_for(record):
        for name, (who, pattern) in awaited.items():
            if rank() == who and re.search(pattern, record.getMessage()):
                (folder / name).touch()

    handler = logging.Handler()
    handler.emit = look_for
    logging.getLogger("hf_gradutils").addHandler(handler)
    with FirstRankPerNode(log_every_s=0.1):
        if rank() == 0:
            wait_for([folder / "running", folder / "other node"])
    if rank() == 0:
        wait_for([folder / "missing"])
    with FirstRankPerNode(log_every_s=0.1):
        pass
    assert all((folder / name).exists() for name in awaited)


@ranks(2, nodes=2, init=False)
def test_a_rank_alone_on_its_node_may_be_silent_between_blocks():
    on_a_host_of_its_own()
    heartbeat.BEAT_S, heartbeat.SILENCE_S = 0.1, 0.5
    with FirstRankPerNode():
        time.sleep(0.2)  # it has beaten once
    if rank() == 1:
        time.sleep(1.0)  # longer than the silence that counts in a block
    with FirstRankPerNode():
        pass


SLURM = {
    "SLURM_PROCID": "{rank}",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "{local}",
    "SLURM_NODEID": "{node}",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "{rank}",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{local}",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "{rank}", "PMI_SIZE": "4", "MPI_LOCALRANKID": "{local}", "MPI_LOCALNRANKS": "2"}
SIZES_UNKNOWN = {"PMI_RANK": "{rank}", "PMI_SIZE": "4", "MPI_LOCALRANKID": "{local}"}


@pytest.mark.parametrize(
    "variables", [SLURM, OPEN_MPI, INTEL_MPI, SIZES_UNKNOWN], ids=["SLURM", "Open MPI", "Intel MPI", "no sizes"]
)
def test_every_launcher_gets_one_first_per_node(variables, tmp_path):
    results = run_ranks(_launched_by, 4, tmp_path, variables, init=False, agent=False)
    assert [is_first for is_first, _ in results] == [True, False, True, False]
    assert [launcher for _, launcher in results] == [results[0][1]] * 4
    assert results[0][1] != "torchrun"


def _launched_by(folder, variables):
    places = {"rank": rank(), "local": rank() % 2, "node": rank() // 2}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        del os.environ[name]
    os.environ.update({name: value.format(**places) for name, value in variables.items()})
    on_a_host_of_its_own(str(places["node"]))
    with FirstRankPerNode() as is_first:
        data = folder / str(places["node"])
        if is_first:
            time.sleep(0.2)
            data.touch()
        assert data.exists()
    return is_first, read_launched_rank().launcher


@ranks(2, nodes=2, init=False, agent=False, env={"LOCAL_WORLD_SIZE": None})
def test_where_no_sizes_are_known_no_rank_waits_for_a_node_that_never_comes():
    if rank() == 0:
        for _ in range(2):
            with FirstRankPerNode():
                pass
        leave(grace_s=0)  # the other one never comes


def test_a_waiting_rank_needs_next_to_no_processor_time(tmp_path):
    for waited_s, used_s in run_ranks(_wait_and_measure, 4, tmp_path, nodes=2, init=False):
        assert waited_s > 1.4
        assert used_s < 0.02 * waited_s


def _wait_and_measure(folder):
    with FirstRankPerNode():
        pass
    start, used = time.monotonic(), time.process_time()
    (folder / str(rank())).touch()
    if rank() == 0:
        while len(list(folder.iterdir())) < 4:
            time.sleep(0.1)
    with FirstRankPerNode():
        if rank() == 0:
            time.sleep(1.5)
    return time.monotonic() - start, time.process_time() - used


@ranks(4, nodes=2, init=False)
def test_nothing_is_left_behind(tmp_path):
    with FirstRankPerNode():  # opens the channel
        pass
    threads, files = threading.enumerate(), sorted(os.listdir("/proc/self/fd"))
    for scope in ("node", "world", "auto"):
        with FirstRankPerNode(scope=scope, cache_dir=tmp_path):
            pass
    assert threading.enumerate() == threads
    assert sorted(os.listdir("/proc/self/fd")) == files
    assert not list(tmp_path.iterdir())
    assert not os.listdir(os.environ["TMPDIR"])
    assert not dist.is_initialized()
    assert not torch.cuda.is_initialized()
    assert current_channel().server is None


@ranks(2, init=False, agent=False)
def test_the_port_at_which_rank_0_hosts_the_store_is_free_after_leaving():
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with FirstRankPerNode():
        pass
    if rank() == 0:
        socket.create_connection(address).close()  # control: it is in use
    leave()
    if rank() == 0:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_a_scope_that_does_not_exist_is_refused():
    with pytest.raises(InvalidArgumentError, match="scope must be 'node', 'world' or 'auto', got 'nodes'"):
        FirstRankPerNode(scope="nodes")
