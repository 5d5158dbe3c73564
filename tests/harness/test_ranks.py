"""The harness, as a test sees it that runs in several processes."""

import os
import time
import warnings

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness.ranks import RankFailure, ranks, run_ranks


@ranks(4)
def test_ranks_talk_to_each_other_over_gloo():
    assert dist.get_backend() == "gloo"
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert total == 6


@ranks(4, dp=2, tp=2)
def test_a_mesh_has_the_requested_dims(mesh):
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


def test_runs_leave_no_file_and_no_port_open():
    run_ranks(_own_rank, 2)
    before = psutil.Process().num_fds()
    run_ranks(_own_rank, 2)
    run_ranks(_init_from_the_environment, 2, init=False, agent=False)
    with pytest.raises(RankFailure):
        run_ranks(_fail, 2)
    assert psutil.Process().num_fds() == before
    assert not [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def _fail():
    raise ValueError("no good")


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match="must multiply to the 3 ranks, got dp=2, tp=2: 4"):
        ranks(3, dp=2, tp=2)


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
