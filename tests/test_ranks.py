"""The multi-process harness: what it gives a test, and what it does with ranks that misbehave."""

import os
import signal
import subprocess
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, ranks, run_ranks
from torch import nn


@ranks(4)
def test_ranks_talk_to_each_other_over_gloo():
    assert dist.get_backend() == "gloo"
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert total == 6


@ranks(4, dp=2, tp=2)
def test_a_mesh_has_the_dims_that_were_asked_for(mesh):
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


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match="must multiply to the 3 ranks, got dp=2, tp=2: 4"):
        ranks(3, dp=2, tp=2)


def test_a_rank_that_raises_fails_the_test_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 of 4 raised ValueError: no good\n(.|\n)*in _one_raises\n"):
        run_ranks(_one_raises, 4)
    assert time.monotonic() - start < 20, "the others were waiting in a barrier"


def _one_raises():
    print("before the error")
    if dist.get_rank() == 1:
        raise ValueError("no good")
    dist.barrier()


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


def test_nothing_is_left_behind_of_ended_ranks_and_what_they_started(tmp_path):
    with pytest.raises(RankFailure):
        run_ranks(_start_a_child_and_fail, 2, str(tmp_path))
    pids = [int(p.name) for p in tmp_path.iterdir()]
    assert len(pids) == 4
    time.sleep(0.2)
    alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    assert not alive


def _start_a_child_and_fail(folder):
    child = subprocess.Popen(["sleep", "1000"])
    for pid in (os.getpid(), child.pid):
        open(f"{folder}/{pid}", "w").close()
    dist.barrier()
    if dist.get_rank() == 0:
        raise RuntimeError("enough")
    time.sleep(1000)


def test_ranks_skip_together_or_not_at_all():
    with pytest.raises(pytest.skip.Exception, match="not today"):
        run_ranks(_skip, 2, everywhere=True)
    with pytest.raises(RankFailure, match="rank 0 of 2 skipped: not today, but not every rank did"):
        run_ranks(_skip, 2, everywhere=False)


def _skip(everywhere):
    if everywhere or dist.get_rank() == 0:
        pytest.skip("not today")


def test_a_warning_in_a_rank_is_an_error():
    with pytest.raises(RankFailure, match="UserWarning: careful"):
        run_ranks(_warn, 1)


def _warn():
    import warnings

    warnings.warn("careful", stacklevel=1)


def test_four_ranks_of_a_tiny_model_take_about_a_second():
    run_ranks(_train_a_step, 4)  # the server is up now
    start = time.monotonic()
    run_ranks(_train_a_step, 4)
    assert time.monotonic() - start < 6, "about one second on two free cores"


def _train_a_step():
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    assert model.module.weight.grad is not None
