"""The channel: where ranks meet, and what happens at its ends."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination.store import current_channel, leave, open_channel
from hf_gradutils.errors import LauncherError
from tests.harness.first_rank_cases import rank
from tests.harness.ranks import ranks, run_ranks


@pytest.mark.parametrize(
    ("launch", "origin"),
    [
        ({"init": False}, "the agent store of the launcher"),
        ({"init": True}, "the agent store of the launcher"),
        ({"init": False, "agent": False}, "the store that global rank 0 hosts"),
        ({"init": True, "agent": False}, "the store of the default process group"),
    ],
)
def test_ranks_meet_at_the_agent_else_the_group_else_rank_0(launch, origin):
    for own, others in run_ranks(_exchange, 3, **launch):
        assert own.startswith(origin)
        assert others == ["from 0", "from 1", "from 2"]


def _exchange():
    channel = open_channel()
    assert open_channel() is channel, "chosen once"
    channel.write(f"test/{rank()}", f"from {rank()}")
    while None in (others := [channel.read(f"test/{other}") for other in range(3)]):
        time.sleep(0.01)
    return channel.origin, others


@ranks(2, init=False, agent=False)
def test_ranks_that_choose_before_and_after_init_see_the_same_keys(tmp_path):
    if rank() == 0:
        with FirstRankPerNode():
            pass
        assert "hosts" in current_channel().origin
    dist.init_process_group("gloo")
    with FirstRankPerNode() as is_first:
        assert is_first == (rank() == 0)
        if is_first:
            time.sleep(0.2)
            (tmp_path / "data").touch()
        assert (tmp_path / "data").exists()
    if rank() == 1:
        assert "process group" in current_channel().origin


@ranks(2, init=False, agent=False, env={"MASTER_ADDR": None})
def test_a_group_that_met_in_a_file_serves_too(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank(), world_size=2)
    with FirstRankPerNode() as is_first:
        assert is_first == (rank() == 0)


@ranks(2, init=False, agent=False, env={"MASTER_ADDR": None})
def test_ranks_that_cannot_meet_learn_what_to_set():
    hint = r"RANK=\d and WORLD_SIZE=2 say that this is one of 2 processes: if it is the only one, unset both"
    with pytest.raises(LauncherError, match=r"set MASTER_ADDR .* and MASTER_PORT .*" + hint), FirstRankPerNode():
        pass


@ranks(2, init=False, agent=False, env={"LOCAL_RANK": None, "GROUP_RANK": None})
def test_a_group_without_local_ranks_has_one_first_per_host(tmp_path):
    with FirstRankPerNode() as is_first:
        (tmp_path / f"{rank()}-{is_first}").touch()
    dist.init_process_group("gloo")
    dist.barrier()
    assert len(list(tmp_path.glob("*-True"))) == 1


def test_two_processes_with_one_rank_are_an_error():
    outcomes = run_ranks(_open_or_explain, 2, init=False, env={"RANK": "0"})
    assert sorted(outcome[:40] for outcome in outcomes) == ["opened", "two processes call themselves global ran"]


def _open_or_explain():
    try:
        open_channel()
        time.sleep(0.3)
    except LauncherError as error:
        return str(error)
    return "opened"


@ranks(2, init=False)
def test_a_forked_child_learns_that_it_is_no_rank():
    open_channel()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            FirstRankPerNode().__enter__()
        except LauncherError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert f"was forked from global rank {rank()}" in os.read(reader, 1000).decode()


@ranks(2, init=False, agent=False)
def test_the_rank_that_hosts_the_store_leaves_after_the_others():
    with FirstRankPerNode():
        pass
    start = time.monotonic()
    if rank() == 1:
        time.sleep(0.5)
    leave()
    if rank() == 0:
        assert time.monotonic() - start > 0.3


@ranks(2, init=False, agent=False)
def test_after_leaving_a_second_group_can_be_made():
    with FirstRankPerNode():
        pass
    for attempt in range(2):
        dist.init_process_group("gloo")
        with FirstRankPerNode() as is_first:
            assert is_first == (rank() == 0)
        total = torch.ones(())
        dist.all_reduce(total)
        assert total.item() == 2
        if attempt == 0:
            leave()
            dist.destroy_process_group()
            time.sleep(0.3 * rank())  # rank 0 listens anew before rank 1 asks


def test_a_world_of_one_needs_no_channel(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert open_channel() is None
    leave()
