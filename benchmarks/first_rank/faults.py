"""Faults in a first rank, and what the waiting ranks see of them, with three tools in one run.

    python -m benchmarks.first_rank.faults --out docs/first_rank.md

Real ranks under torchrun: one agent with 4, and two agents with 2 each. The table goes between the two markers of
the page. The cases are those of the tests (``tests/harness/first_rank_cases.py``).
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from benchmarks import page
from benchmarks.first_rank.render import render
from tests.harness import first_rank_cases as cases

GROUP_TIMEOUT_S = {"prepares_longer_than_the_group_waits": 4.0, "one_node_is_slower": 4.0}
"""Of the process group; a minute in the other cases."""

STOP_AFTER_S = 25.0
"""A job that runs for so long hangs, and is stopped."""

ROWS = {
    "the first raises": ("fault_in_first", {"fault": "raises"}, 1),
    "it raises on node 0 of 2": ("fault_in_first", {"fault": "raises"}, 2),
    "it catches its own error and goes on": ("fault_in_first", {"fault": "raises", "goes_on": True}, 1),
    "it is killed": ("fault_in_first", {"fault": "is_killed"}, 1),
    "it calls sys.exit(3)": ("fault_in_first", {"fault": "exits_with_3"}, 1),
    "it calls os._exit(0)": ("fault_in_first", {"fault": "ends_with_success"}, 1),
    "Ctrl-C in it": ("fault_in_first", {"fault": "is_interrupted"}, 1),
    "Ctrl-C in a waiting rank, 6 s before the end": ("waiting_rank_is_interrupted", {"prepare_s": 6.0}, 1),
    "8 s of preparation, group timeout 4 s": ("prepares_longer_than_the_group_waits", {"prepare_s": 8.0}, 1),
    "nested": ("nested", {}, 1),
    "node 1 needs 8 s more, group timeout 4 s": ("one_node_is_slower", {"slower_s": 8.0}, 2),
}


def be_a_rank(tool: str, row: str, folder: Path) -> None:
    """Run one case, as one of torchrun's processes."""
    case, options, num_nodes = ROWS[row]
    timeout = timedelta(seconds=GROUP_TIMEOUT_S.get(case, 60.0))
    if case == "fault_in_first":
        # When do they learn by themselves, before the agent that has seen the first rank end ends them too?
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if num_nodes > 1:
        cases.on_a_host_of_its_own()
    if tool == "accelerate":
        from accelerate import PartialState

        PartialState(cpu=True, timeout=timeout)
    elif tool == "transformers" or not options.get("goes_on"):
        # What TrainingArguments would make by itself has another time limit on CPU than it would have on GPU.
        dist.init_process_group("gloo", timeout=timeout)
    cases.CASES[case](folder, tool, **options)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(tool: str, row: str) -> str:
    """The cell of the table."""
    num_nodes = ROWS[row][2]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "story"
        folder.mkdir()
        env = os.environ | {"TMPDIR": scratch, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        port = str(29400 + os.getpid() % 1000)
        me = [sys.executable, "-m", "benchmarks.first_rank.faults", "--rank", tool, row, str(folder)]
        agents = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={4 // num_nodes}"),
                    *(f"--nnodes={num_nodes}", f"--node-rank={node}", "--master-addr=127.0.0.1"),
                    *(f"--master-port={port}", "--monitor-interval=1", *me[1:]),
                ],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for node in range(num_nodes)
        ]
        return judge(row, folder, is_stopped=wait(agents, folder))


def wait(agents: list[subprocess.Popen], folder: Path) -> bool:
    """Wait for a job; True if it hung and was stopped. The clock of a hang starts with the first rank's first line."""
    started = time.time()
    while any(agent.poll() is None for agent in agents):
        files = list(folder.glob("*.jsonl"))
        since = min((file.stat().st_ctime for file in files), default=time.time())
        if time.time() - since > STOP_AFTER_S or time.time() - started > 120:
            for agent in agents:
                stop(agent)
            return True
        time.sleep(0.05)
    return False


def stop(agent: subprocess.Popen) -> None:
    try:
        processes = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    agent.wait()


def judge(row: str, folder: Path, *, is_stopped: bool) -> str:
    """Describe in words how a case ended."""
    story = cases.Story(folder)
    case = ROWS[row][0]
    words = []
    if half := story.num_half():
        words.append(f"**{half} {'rank' if half == 1 else 'ranks'} on half-made data**")
    errors, cause = {}, ""
    if case == "waiting_rank_is_interrupted":
        errors = {rank: when for rank, when in story.errors().items() if rank == 1}
    elif case in ("fault_in_first", "one_node_is_slower") and story.of("fault"):
        errors = story.errors()
        has_cause = all("disk full" in text or "rank 0 of 4 on" in text for _, text in errors.values())
        cause = " with the cause" if has_cause else ", no cause"
        cause += f" ({len(errors)} of 3)" if len(errors) < 3 else ""
    if errors:
        words.append(f"told after {max(after for after, _ in errors.values()):.2f} s{cause}")
    last = "went on" if case == "one_node_is_slower" else "left"
    num_left = len(story.of(last))
    if case == "fault_in_first" and num_left:
        words.append(f"{num_left} went on as if nothing had happened")
    elif case in ("nested", "prepares_longer_than_the_group_waits", "one_node_is_slower"):
        words.append("all four go on" if num_left == 4 else f"**only {num_left} of 4 go on**")
    if is_stopped:
        words.append("**hangs**")
    return "; ".join(words) or "ended by the launcher before any rank was told"


def measure() -> dict[str, dict[str, str]]:
    """Row → tool → what happened; prints as it goes."""
    found: dict[str, dict[str, str]] = {}
    for row in ROWS:
        found[row] = {tool: run(tool, row) for tool in cases.TOOLS}
        print(row, *found[row].values(), sep=" | ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    page.add_arguments(parser)
    parser.add_argument("--rank", nargs=3, metavar=("TOOL", "ROW", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        tool, row, folder = options.rank
        be_a_rank(tool, row, Path(folder))
        return
    data = page.load(options.out)
    if not options.render:
        measured = page.provenance("benchmarks.first_rank.faults", options)
        data["faults"] = {"measured": measured, "rows": measure()}
    page.publish(options.out, data, lambda data: render(data, options.out.read_text()))


if __name__ == "__main__":
    main()
