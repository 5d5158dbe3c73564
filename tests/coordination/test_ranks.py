"""Ranks and nodes from a launcher, from a process group, or from nothing."""

import dataclasses
import os

import pytest
import torch.distributed as dist

from hf_gradutils._environment import LAUNCHERS, read_rendezvous
from hf_gradutils.coordination.process import current_process, is_alive
from hf_gradutils.coordination.ranks import current_ranks
from hf_gradutils.errors import LauncherError
from tests.harness.ranks import ranks


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for launcher in LAUNCHERS:
        for name in (launcher.global_rank, launcher.world_size, launcher.local_rank, launcher.node_rank):
            if name:
                monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)


@pytest.mark.parametrize(
    ("variables", "node"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, "1"),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, "1"),
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, None),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}, None),
    ],
    ids=["torchrun", "SLURM", "Open MPI", "Intel MPI"],
)
def test_each_launcher_is_understood(monkeypatch, variables, node):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    here = current_ranks()
    assert (here.global_rank, here.world_size, here.local_rank) == (5, 8, 1)
    assert here.node == node if node else here.node.startswith(os.uname().nodename)


def test_no_launcher_is_a_world_of_one(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # accelerate launch --cpu sets it for one process
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script that is no step
    assert (current_ranks().global_rank, current_ranks().world_size) == (0, 1)


def test_rank_and_world_size_come_from_one_launcher(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (current_ranks().global_rank, current_ranks().world_size) == (0, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be at least 0 and below WORLD_SIZE"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK must be an integer, got 'zero'"),
    ],
)
def test_variables_that_contradict_each_other_are_an_error(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LauncherError, match=message):
        current_ranks()


def test_a_port_out_of_range_is_an_error(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "70000")
    with pytest.raises(LauncherError, match="MASTER_PORT must be from 1 to 65535, got 70000"):
        read_rendezvous()


@ranks(2, env={"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": None}, init=False)
def test_the_process_group_is_believed_without_a_launcher():
    index = int(os.environ["ROLE_RANK"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group("gloo", store=store, rank=index, world_size=2)
    assert (current_ranks().global_rank, current_ranks().world_size) == (index, 2)
    assert current_ranks().local_rank is None


def test_a_process_is_alive_until_it_has_ended():
    assert is_alive(current_process()) is True
    child = os.fork()
    if child == 0:
        os._exit(0)
    ended = dataclasses.replace(current_process(), pid=child)
    os.waitpid(child, 0)
    assert is_alive(ended) is False
    elsewhere = dataclasses.replace(current_process(), boot_id="another machine")
    assert is_alive(elsewhere) is None
