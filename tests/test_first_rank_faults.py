"""The fault table of FirstRankPerNode: every fault under torchrun's agent, on two nodes, and without a launcher."""

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import first_rank_cases as cases
import pytest
import torch.distributed as dist
from ranks import RankFailure, run_ranks
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hf_gradutils import FirstRankPerNode
from hf_gradutils.errors import FirstRankError
from hf_gradutils.store import leave

LAUNCHES = ["one agent with 4 ranks", "two agents with 2 ranks each", "4 plain processes"]


def launch(how: str, body, folder: Path, *args, init_timeout_s: float | None = None, max_restarts: int = 0, **kwargs):
    """Run ``body(folder, …)`` on 4 ranks, which may die; return what they wrote down."""
    call = (body, folder, args, kwargs, init_timeout_s, "two" in how)
    if how == "4 plain processes":
        with contextlib.suppress(RankFailure):
            run_ranks(_in_plain_rank, 4, *call, init=False, agent=False, env={"LOCAL_WORLD_SIZE": None}, grace_s=4)
    else:
        num_agents = 2 if "two" in how else 1
        run_ranks(_in_agent, num_agents, *call, max_restarts, init=False, agent=False)
    return cases.Story(folder)


def _in_rank(body, folder, args, kwargs, init_timeout_s, hosts_differ):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not the agent's handlers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hosts_differ:
        cases.on_a_host_of_its_own()
    if init_timeout_s is not None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=init_timeout_s))
    try:
        body(folder, *args, **kwargs)
    except KeyboardInterrupt:
        sys.exit(130)  # torch's wrapper of functions would end well without a result, and its agent wait for that
    if dist.is_initialized():
        dist.destroy_process_group()


def _in_plain_rank(*call):
    try:
        _in_rank(*call)
    except BaseException:
        leave()  # as at the end of any process, which those of the harness leave out when they raise
        raise


def _in_agent(*call_and_restarts):
    """Be torchrun on one node: its own agent, whose ranks are forks of this process."""
    *call, max_restarts = call_and_restarts
    num_agents, node_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    endpoint = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    config = LaunchConfig(
        min_nodes=num_agents,
        max_nodes=num_agents,
        nproc_per_node=4 // num_agents,
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": node_rank, "timeout": 60},
        run_id="faults",
        max_restarts=max_restarts,
        # Late, so that it is not the agent that ends the others before they have learnt anything.
        monitor_interval=0.05 if max_restarts else 3.0,
        start_method="fork",
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    with contextlib.suppress(ChildFailedError):
        elastic_launch(config, _in_rank)(*call)


@pytest.mark.parametrize("fault", cases.FAULTS)
@pytest.mark.parametrize("how", LAUNCHES)
def test_what_ends_the_first_rank_is_told_to_all_that_wait(how, fault, tmp_path):
    story = launch(how, cases.fault_in_first, tmp_path, "ours", fault)
    told = story.told()
    assert story.num_half() == 0
    assert set(told) == {1, 2, 3}, story.events
    limit_s = 2.0 if fault in ("is_killed", "ends_with_success") else 1.0
    for global_rank, (after_s, error) in told.items():
        assert after_s < limit_s, (global_rank, error)
        assert error.startswith("FirstRankError: rank 0 of 4 on host"), error
        if limit_s == 1.0:
            assert "prepare" in error, "the original traceback"
    # The other node has prepared well, and has learnt of the failure at its end.
    assert {e.rank for e in story.of("entered")} == ({3} if "two" in how else set())
    assert not story.of("left")


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_first_that_catches_its_own_error_meets_the_others_errors(how, tmp_path):
    story = launch(how, cases.fault_in_first, tmp_path, "ours", "raises", goes_on=True)
    assert story.num_half() == 0
    assert set(story.told()) == {1, 2, 3}
    assert not story.of("left"), "nobody gets past the collective that follows"


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_follower_that_raises_holds_nobody_in_the_block(how, tmp_path):
    story = launch(how, cases.follower_raises, tmp_path, "ours", init_timeout_s=20)
    assert story.num_half() == 0
    assert {e.rank for e in story.of("left")} == {0, 2, 3}


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_waiting_rank_is_interrupted_within_a_second(how, tmp_path):
    story = launch(how, cases.waiting_rank_is_interrupted, tmp_path, "ours", prepare_s=1.5)
    after_s, error = story.told()[1]
    assert error.startswith("KeyboardInterrupt")
    assert after_s < 1.0
    assert story.num_half() == 0


@pytest.mark.parametrize("how", LAUNCHES)
def test_preparation_may_take_longer_than_the_group_waits(how, tmp_path):
    body = cases.prepares_longer_than_the_group_waits
    story = launch(how, body, tmp_path, "ours", prepare_s=2.0, init_timeout_s=1.0)
    assert story.num_half() == 0
    assert len(story.of("left")) == 4


@pytest.mark.parametrize("how", LAUNCHES)
def test_nested_blocks_keep_their_order_everywhere(how, tmp_path):
    story = launch(how, cases.nested, tmp_path, "ours")
    assert story.num_half() == 0
    assert len(story.of("left")) == 4


def test_the_ranks_of_a_fast_node_outlive_the_preparation_on_a_slow_one(tmp_path):
    how = LAUNCHES[1]
    story = launch(how, cases.one_node_is_slower, tmp_path, "ours", slower_s=2.5, init_timeout_s=1.0)
    assert story.num_half() == 0
    assert {e.rank for e in story.of("went on")} == {0, 1, 2, 3}
    prepared = {e.rank: e.time_s for e in story.of("prepared")}
    assert prepared[2] - prepared[0] > 1.5, "control: the group's timeout lies in between"
    entered = {e.rank: e.time_s for e in story.of("entered")}
    assert entered[1] < prepared[2], "the blocks themselves are not coupled"
    left = [e.time_s for e in story.of("left")]
    assert max(left) - min(left) < 1.0


def test_after_a_restart_nothing_of_the_attempt_before_is_believed(tmp_path):
    story = launch(LAUNCHES[0], _fails_at_first, tmp_path, max_restarts=1)
    assert story.num_half() == 0
    assert {e.rank for e in story.of("left") if e.text == "1"} == {0, 1, 2, 3}
    assert not [e for e in story.of("left") if e.text == "0"]


def _fails_at_first(folder):
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with FirstRankPerNode():
        pass  # its outcome stays in the agent's store
    with FirstRankPerNode():
        if cases.is_node_first():
            cases.prepare(folder, cases.raises if attempt == "0" else None)
        else:
            cases.note(folder, "entered", cases.data_file(folder).read_text())
    cases.note(folder, "left", attempt)


@pytest.mark.parametrize("how", [LAUNCHES[0], LAUNCHES[2]])
def test_workers_that_the_first_has_forked_do_not_hide_its_death(how, tmp_path):
    """The store of plain processes lives in rank 0, and its connections in all children of rank 0."""
    story = launch(how, _dies_with_workers, tmp_path)
    told = story.told()
    for worker in (tmp_path / "workers").iterdir():
        assert os.path.exists(f"/proc/{worker.name}"), "control: the workers outlive their parent"
        os.kill(int(worker.name), signal.SIGKILL)
    assert set(told) == {1, 2, 3}
    assert max(after_s for after_s, _ in told.values()) < 2.0
    assert story.num_half() == 0


def _dies_with_workers(folder):
    (folder / "workers").mkdir(exist_ok=True)
    try:
        with FirstRankPerNode():
            if not cases.is_node_first():
                cases.note(folder, "entered", "half")
            rows = datasets.Dataset.from_dict({"x": [1, 2]})
            rows.map(partial(_kill_the_first, folder, os.getpid()), num_proc=2)
    except FirstRankError as error:
        cases.note(folder, "told", str(error))
        raise


def _kill_the_first(folder, first, row):
    """In a worker: the second one to come kills the rank that has forked them, and stays."""
    os.setsid()  # out of reach of who clears away the processes of a rank
    (folder / "workers" / str(os.getpid())).touch()
    while len(list((folder / "workers").iterdir())) < 2:
        time.sleep(0.01)
    with contextlib.suppress(FileExistsError):
        (folder / "0.jsonl").open("x").close()
        cases.note(folder, "fault")
        os.kill(first, signal.SIGKILL)
    time.sleep(60)
