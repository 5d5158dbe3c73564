"""The fault table of FirstRankPerNode: every fault under torchrun's agent, on two nodes, and without a launcher.

The launches are 1: one agent with 4 ranks, 2: two agents with 2 ranks each, which see no processes of each other's,
P: 4 plain processes with environment variables only, A: ``accelerate launch`` as a command. Where a row stands for less
than all of 1, 2 and P, the rest says why.

| row | launches | test |
|---|---|---|
| the first raises; exits; ends with success; is killed; Ctrl-C | 1 2 P | what_ends_the_first_rank |
| it raises, it is killed | A | accelerate_launch |
| it catches its own error and goes on | 1 2 P | a_first_that_catches_its_own_error |
| a follower raises | 1 2 P | a_follower_that_raises |
| Ctrl-C in a waiting follower | 1 2 P | a_waiting_rank_is_interrupted |
| preparation longer than the group's timeout | 1 2 P | preparation_may_take_longer |
| before init, after init, init in between | 1 2 P | blocks_are_kept_before_and_after_the_making_of_a_group |
| nested | 1 2 P | nested_blocks |
| decorator, repeatedly, from several sites, skipped at one | 1 2 P | calls_of_a_decorated_function |
| one node slower than the other | 2: there are two | the_ranks_of_a_fast_node |
| restart with --max-restarts | 1 2: P has none | after_a_restart, nodes_whose_restarts, a_node_that_is_not_restarted |
| no launcher | one process | test_first_rank.py: without_a_launcher |
| every rank with LOCAL_RANK 0 | 1 2 P | every_rank_says_local_rank_0 |
| forked workers alive when the first dies | 1 P: nothing of it is between nodes | workers_that_the_first_has_forked |
| processor time, the log, what is left behind | forks of a test | test_first_rank.py, test_first_rank_nodes.py |

Times are taken by a :class:`first_rank_cases.Metronome`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination.store import leave, open_channel
from hf_gradutils.errors import FirstRankError, LauncherError
from tests.harness import first_rank_cases as cases
from tests.harness.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.slow  # each launch starts processes of its own

LAUNCHES = ["one agent with 4 ranks", "two agents with 2 ranks each", "4 plain processes"]
ONE_AGENT, TWO_AGENTS, PLAIN = LAUNCHES


def launch(
    how: str,
    body,
    folder: Path,
    *args,
    init_timeout_s: float | None = None,
    local_rank: str | None = None,
    max_restarts: int = 0,
    rendezvous: str = "static",
    opens: bool = True,
    **kwargs,
) -> cases.Story:
    """Run ``body(folder, …)`` on 4 ranks, which may die; return what they wrote down."""
    call = (body, folder, args, kwargs, init_timeout_s, local_rank, how == TWO_AGENTS, opens)
    (folder / "started").mkdir()
    (folder / "open").mkdir()
    with cases.Metronome() as clock:
        if how == PLAIN:
            with contextlib.suppress(RankFailure):
                run_ranks(_in_plain_rank, 4, *call, init=False, agent=False, env={"LOCAL_WORLD_SIZE": None}, grace_s=4)
        else:
            num_agents = 2 if how == TWO_AGENTS else 1
            run_ranks(_in_agent, num_agents, *call, max_restarts, rendezvous, init=False, agent=False)
    return cases.Story(folder, clock)


def _in_rank(body, folder, args, kwargs, init_timeout_s, local_rank, hosts_differ, opens):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not the agent's handlers
    # The agent ends the others soon after one has ended: they are to tell first what they have learnt by themselves.
    is_to_end = []
    signal.signal(signal.SIGTERM, lambda *_: is_to_end.append(True))
    if hosts_differ:
        cases.on_a_host_of_its_own()
    if local_rank is not None:
        os.environ["LOCAL_RANK"] = local_rank
    # A rank that connects to its agent's store while the agent forks the next one may leave that a locked lock.
    _meet(folder / "started")
    if init_timeout_s is not None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=init_timeout_s))
    if opens:
        open_channel()  # as cases.meet has it
        _meet(folder / "open")
    try:
        body(folder, *args, **kwargs)
    except KeyboardInterrupt:
        sys.exit(130)  # torch's wrapper of functions would end well without a result, and its agent wait for that
    if dist.is_initialized():
        dist.destroy_process_group()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch's wrapper of functions waits for the other ranks
    if is_to_end:
        sys.exit(128 + signal.SIGTERM)


def _meet(folder):
    attempt = len(list(folder.glob(f"{cases.rank()}-*")))
    (folder / f"{cases.rank()}-{attempt}").write_text(str(os.getpid()))
    size, node = int(os.environ.get("LOCAL_WORLD_SIZE", 4)), int(os.environ["GROUP_RANK"])
    ranks = range(size * node, size * (node + 1)) if attempt else range(4)  # a node may be restarted alone
    cases.wait_for([folder / f"{other}-{attempt}" for other in ranks])


def _in_plain_rank(*call):
    try:
        _in_rank(*call)
    except BaseException:
        leave()  # as at the end of any process, which those of the harness leave out when they raise
        raise


def _in_agent(*call_and_options):
    """Be torchrun on one node: its own agent, whose ranks are forks of this process."""
    *call, max_restarts, rendezvous = call_and_options
    num_agents, node_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    by_number = {"rank": node_rank} if rendezvous == "static" else {"is_host": str(node_rank == 0)}
    config = LaunchConfig(
        min_nodes=num_agents,
        max_nodes=num_agents,
        nproc_per_node=4 // num_agents,
        rdzv_backend=rendezvous,
        rdzv_endpoint=f"127.0.0.1:{os.environ['MASTER_PORT']}",
        rdzv_configs={"timeout": 60, **by_number},
        local_addr="127.0.0.1",
        run_id="faults",
        max_restarts=max_restarts,
        monitor_interval=0.05,
        start_method="fork",
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        elastic_launch(config, _in_rank)(*call)
    except ChildFailedError:
        if node_rank == 0:
            # The traceback keeps the agent, and the agent the store: the other node's ranks may have to read it yet.
            _wait_until_all_have_ended(call[1] / "started")


def _wait_until_all_have_ended(folder, limit_s=20.0):
    until_s = time.monotonic() + limit_s
    pids = [int(path.read_text()) for path in folder.iterdir()]
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < until_s:
        time.sleep(0.02)


@pytest.mark.parametrize("fault", cases.FAULTS)
@pytest.mark.parametrize("how", LAUNCHES)
def test_what_ends_the_first_rank_reaches_all_that_wait(how, fault, tmp_path):
    story = launch(how, cases.fault_in_first, tmp_path, "ours", fault)
    errors = story.errors()
    assert story.num_half() == 0
    assert set(errors) == {1, 2, 3}, story.events
    limit_s = 2.0 if fault in ("is_killed", "ends_with_success") else 1.0
    for global_rank, (after_s, error) in errors.items():
        assert after_s < limit_s, (global_rank, error)
        assert error.startswith("FirstRankError: rank 0 of 4 on host"), error
        assert "\n" not in error
    if limit_s == 1.0:
        notes = [e.text for e in story.of("notes") if e.rank != 0]
        assert len(notes) == 3
        assert all("prepare" in note for note in notes), "the original traceback"
    # The other node has prepared well, and has learnt of the failure at its end.
    assert {e.rank for e in story.of("entered")} == ({3} if how == TWO_AGENTS else set())
    assert not story.of("left")


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_first_that_catches_its_own_error_meets_the_others_errors(how, tmp_path):
    story = launch(how, cases.fault_in_first, tmp_path, "ours", "raises", goes_on=True)
    assert story.num_half() == 0
    assert set(story.errors()) == {1, 2, 3}
    assert not story.of("left"), "no rank gets past the collective that follows"


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_follower_that_raises_holds_no_rank_in_the_block(how, tmp_path):
    story = launch(how, cases.follower_raises, tmp_path, "ours", init_timeout_s=20)
    assert story.num_half() == 0
    assert {e.rank for e in story.of("left")} == {0, 2, 3}


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_waiting_rank_is_interrupted_within_a_second(how, tmp_path):
    story = launch(how, cases.waiting_rank_is_interrupted, tmp_path, "ours", prepare_s=30)
    after_s, error = story.errors()[1]
    assert error.startswith("KeyboardInterrupt")
    assert after_s < 1.0
    assert story.num_half() == 0


@pytest.mark.parametrize("how", LAUNCHES)
def test_preparation_may_take_longer_than_the_group_waits(how, tmp_path):
    body = cases.prepares_longer_than_the_group_waits
    story = launch(how, body, tmp_path, "ours", prepare_s=1.5, init_timeout_s=1.0)
    assert story.num_half() == 0
    assert len(story.of("left")) == 4


@pytest.mark.parametrize("how", LAUNCHES)
def test_nested_blocks_keep_their_order_everywhere(how, tmp_path):
    story = launch(how, cases.nested, tmp_path, "ours")
    assert story.num_half() == 0
    assert len(story.of("left")) == 4


@pytest.mark.parametrize("how", LAUNCHES)
def test_blocks_are_kept_before_and_after_the_making_of_a_group(how, tmp_path):
    """The last rank leaves out the block before: it chooses its channel when there is a group, the others before."""
    story = launch(how, _blocks_around_init, tmp_path, opens=False)
    _check_firsts(story, how, {"before": {0, 1, 2}, "after": {0, 1, 2, 3}})


def _blocks_around_init(folder):
    if cases.rank() != 3:
        with FirstRankPerNode() as is_first:
            _prepare_and_look(folder, "before", is_first)
        assert not dist.is_initialized()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with FirstRankPerNode() as is_first:
        _prepare_and_look(folder, "after", is_first)
    dist.barrier()


@pytest.mark.parametrize("how", LAUNCHES)
def test_calls_of_a_decorated_function_pair_up_by_place_and_number(how, tmp_path):
    """A rank that leaves out a call gets what the others have at the next place, not what they had at that one."""
    story = launch(how, _calls, tmp_path)
    all_ranks = {0, 1, 2, 3}
    _check_firsts(story, how, {"0": all_ranks, "1": all_ranks, "skipped by 1": all_ranks - {1}, "then": all_ranks})


def _calls(folder):
    for call in range(2):
        _decorated(folder, str(call))
    if cases.rank() != 1:
        _decorated(folder, "skipped by 1")
    _decorated(folder, "then")


@FirstRankPerNode()
def _decorated(folder, call):
    _prepare_and_look(folder, call, cases.is_node_first())


def _prepare_and_look(folder, what, is_first):
    path = folder / f"{what} on node {os.environ['GROUP_RANK']}"
    if is_first:
        path.write_text("half")
        time.sleep(0.15)
        path.write_text("whole")
        cases.note(folder, f"first: {what}")
    cases.note(folder, "entered", path.read_text() if path.exists() else "nothing")
    cases.note(folder, f"entered: {what}")


def _check_firsts(story, how, ranks_of):
    """One rank of each node was first in each block, and the right ranks have been there, with whole data."""
    assert story.num_half() == 0
    for what, global_ranks in ranks_of.items():
        assert {e.rank for e in story.of(f"entered: {what}")} == global_ranks
        assert [e.rank for e in story.of(f"first: {what}")] == ([0, 2] if how == TWO_AGENTS else [0])


@pytest.mark.parametrize("how", LAUNCHES)
def test_one_rank_of_each_node_is_first_where_every_rank_says_local_rank_0(how, tmp_path):
    story = launch(how, _the_first_to_come, tmp_path, local_rank="0")
    assert story.num_half() == 0
    firsts = [e.rank for e in story.of("first: any")]
    assert [first // 2 for first in firsts] == [0, 1] if how == TWO_AGENTS else len(firsts) == 1
    (fault,) = story.of("fault")
    assert fault.rank in firsts
    errors = story.errors(but=fault.rank)
    assert len(errors) == 3
    for after_s, error in errors.values():
        assert after_s < 2.0
        assert error.startswith(f"rank {fault.rank} of 4 on host")


def _the_first_to_come(folder):
    with FirstRankPerNode() as is_first:
        _prepare_and_look(folder, "any", is_first)
    try:
        with FirstRankPerNode() as is_first:
            if is_first and os.environ["GROUP_RANK"] == "0":
                time.sleep(0.2)
                cases.note(folder, "fault")
                cases.is_killed()
    except FirstRankError as error:
        cases.note(folder, "error", str(error))
        raise


def test_the_ranks_of_a_fast_node_outlive_the_preparation_on_a_slow_one(tmp_path):
    story = launch(TWO_AGENTS, cases.one_node_is_slower, tmp_path, "ours", slower_s=3.0, init_timeout_s=1.5)
    assert story.num_half() == 0
    assert {e.rank for e in story.of("went on")} == {0, 1, 2, 3}
    prepared = {e.rank: e.time_s for e in story.of("prepared")}
    assert prepared[2] - prepared[0] > 2.0, "control: the group's timeout lies in between"
    entered = {e.rank: e.time_s for e in story.of("entered")}
    assert entered[1] < prepared[2], "the blocks themselves are not coupled"
    left = [e.time_s for e in story.of("left")]
    assert story.seconds(min(left), max(left)) < 1.0


@pytest.mark.parametrize("how", [ONE_AGENT, TWO_AGENTS])
def test_after_a_restart_nothing_of_the_attempt_before_is_believed(how, tmp_path):
    story = launch(how, _fails_at_first, tmp_path, max_restarts=1)
    assert story.num_half() == 0
    assert {e.rank for e in story.of("left") if e.text == "1"} == {0, 1, 2, 3}
    assert not [e for e in story.of("left") if e.text == "0"]


def _fails_at_first(folder):
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with FirstRankPerNode():
        pass  # its outcome stays in the agent's store
    with FirstRankPerNode():
        if cases.is_node_first():
            fails = attempt == "0" and cases.rank() == 0
            cases.prepare(folder, cases.raises if fails else None)
        else:
            cases.note(folder, "entered", cases.data_file(folder).read_text())
    cases.note(folder, "left", attempt)


@pytest.mark.parametrize("host", ["agent", "rank 0"])
def test_nodes_whose_restarts_are_counted_apart_meet_again(host, tmp_path, monkeypatch):
    """torchrun counts a restart on the node at fault only (pytorch#108158)."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", str(int(host == "rank 0")))
    story = launch(TWO_AGENTS, _ends_between_blocks, tmp_path, max_restarts=1, rendezvous="c10d")
    left = story.of("left")
    assert {e.rank for e in left} == {0, 1, 2, 3}
    assert sorted(e.text for e in left) == ["0", "0", "1", "1"], "control: the counts do differ"


def _ends_between_blocks(folder):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the other node's agent ends ranks that are well
    is_again = (folder / "ended").exists()
    with FirstRankPerNode():
        pass
    if not is_again:
        (folder / f"out-{cases.rank()}").touch()
        if cases.rank() == 0:
            cases.wait_for([folder / f"out-{other}" for other in range(4)])
            (folder / "ended").touch()
            os._exit(1)
        time.sleep(60)
    with FirstRankPerNode():
        pass
    cases.note(folder, "left", os.environ["TORCHELASTIC_RESTART_COUNT"])


def test_a_node_that_is_not_restarted_with_the_others_is_an_error(tmp_path):
    """As with the static rendezvous, where each agent restarts its own ranks only."""
    story = launch(TWO_AGENTS, _only_node_0_again, tmp_path, max_restarts=1, opens=False)
    errors = {e.rank: e.text for e in story.of("error")}
    assert set(errors) == {2, 3}
    for error in errors.values():
        assert error.startswith("LauncherError")
        assert "is in attempt 0 of the job" in error
    assert {e.rank for e in story.of("left")} == {0, 1, 2, 3}, "the agent of node 1 restarts its ranks, too"


def _only_node_0_again(folder):
    is_again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
    open_channel()
    if is_again:
        (folder / f"again-{cases.rank()}").touch()
    elif cases.rank() < 2:
        sys.exit(1)
    else:
        cases.wait_for([folder / "again-0"])
    try:
        with FirstRankPerNode():
            pass
    except LauncherError as error:
        cases.note(folder, "error", f"{type(error).__name__}: {error}")
        raise
    cases.note(folder, "left")


@pytest.mark.parametrize("how", [ONE_AGENT, PLAIN])
def test_workers_that_the_first_has_forked_do_not_hide_its_death(how, tmp_path):
    """The store of plain processes lives in rank 0, and its connections in all children of rank 0."""
    story = launch(how, _dies_with_workers, tmp_path)
    errors = story.errors()
    for worker in (tmp_path / "workers").iterdir():
        assert os.path.exists(f"/proc/{worker.name}"), "control: the workers outlive their parent"
        os.kill(int(worker.name), signal.SIGKILL)
    assert set(errors) == {1, 2, 3}
    assert max(after_s for after_s, _ in errors.values()) < 2.0
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
        cases.note(folder, "error", str(error))
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


SCRIPT = """
import signal, sys
from pathlib import Path

sys.path.insert(0, {root!r})
from tests.harness import first_rank_cases as cases

signal.signal(signal.SIGTERM, signal.SIG_IGN)
cases.meet(Path({folder!r}), 2)
for fault in ("raises", "is_killed"):
    folder = Path({folder!r}, fault)
    try:
        cases.fault_in_first(folder, "ours", fault)
    except BaseException:
        pass
"""


def test_accelerate_launch_as_a_command_tells_both(tmp_path):
    """One command, two blocks: the first rank raises in the first one, and is killed in the second."""
    for fault in ("raises", "is_killed"):
        (tmp_path / fault).mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    env = os.environ | {"TMPDIR": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    with cases.Metronome() as clock:
        port = "--main_process_port=0"
        ended = subprocess.run([*command, port, str(script)], env=env, capture_output=True, text=True, timeout=120)
    for fault, limit_s in (("raises", 1.0), ("is_killed", 2.0)):
        story = cases.Story(tmp_path / fault, clock)
        assert story.num_half() == 0
        assert set(story.errors()) == {1}, ended.stderr
        after_s, error = story.errors()[1]
        assert after_s < limit_s
        assert error.startswith("FirstRankError: rank 0 of 2 on host")
        assert ("disk full" in error) == (fault == "raises")
    assert ended.returncode == 1
