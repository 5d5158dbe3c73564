"""Faults in a block that one rank is to run first: what each rank does.

The tests start the ranks as forks, quickly; ``benchmarks/first_rank/faults.py`` starts them with torchrun and does the
same with other tools.
"""

import logging
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.harness.first_rank_story import Metronome as Metronome
from tests.harness.first_rank_story import Story as Story
from tests.harness.first_rank_story import note, rank

PREPARE_S = 0.3


def is_node_first() -> bool:
    return os.environ["LOCAL_RANK"] == "0"


def ours():
    from hf_gradutils import FirstRankPerNode

    return FirstRankPerNode()


def accelerates():
    from accelerate import PartialState

    return PartialState().local_main_process_first()


def transformers_own():
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=os.environ["TMPDIR"], use_cpu=True, report_to=[]).main_process_first()


TOOLS = {"ours": ours, "accelerate": accelerates, "transformers": transformers_own}


def raises():
    raise RuntimeError("disk full")


def exits_with_3():
    sys.exit(3)


def ends_with_success():
    os._exit(0)  # the launcher sees nothing wrong


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def is_interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


FAULTS = {f.__name__: f for f in (raises, exits_with_3, ends_with_success, is_killed, is_interrupted)}


def data_file(folder: Path) -> Path:
    """The cache of this node."""
    return folder / f"data-{os.environ.get('GROUP_RANK', '0')}"


def logged_lines(name: str = "hf_gradutils", level: int = logging.WARNING) -> list[str]:
    """A list that gets every line that this process logs from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    logging.getLogger(name).setLevel(level)
    return lines


def wait_for(paths: list[Path], *, limit_s: float = 60.0) -> None:
    """Return when all the files are there, or after ``limit_s``."""
    until_s = time.monotonic() + limit_s
    while not all(path.exists() for path in paths) and time.monotonic() < until_s:
        time.sleep(0.01)


def meet(folder: Path, num_ranks: int) -> None:
    """Return when all ranks are here, with the channel open: none is late for what follows, on a busy machine either.

    A rank 0 that hosts the store may otherwise end before a slow rank has found it: then no rank can learn of it.
    """
    from hf_gradutils.coordination.store import open_channel

    open_channel()
    (folder / f"here-{rank()}").touch()
    wait_for([folder / f"here-{other}" for other in range(num_ranks)])


def prepare(folder: Path, fault=None, *, seconds: float = PREPARE_S) -> None:
    data_file(folder).write_text("half")
    time.sleep(seconds)
    if fault is not None:
        note(folder, "fault")
        fault()
    data_file(folder).write_text("whole")


def on_a_host_of_its_own(node: str | None = None) -> None:
    """Let this node's ranks look like those of another machine: they see the processes of their node only."""
    from hf_gradutils.coordination import process

    boot_id = f"boot of node {node or os.environ['GROUP_RANK']}"
    assert process._boot_id() != boot_id
    process._boot_id = lambda: boot_id


def fault_in_first(folder: Path, tool: str, fault: str, *, goes_on: bool = False) -> None:
    """The first rank of node 0 prepares and meets a fault; other nodes' first ranks prepare well."""
    context = TOOLS[tool]()
    note(folder, "starts")
    try:
        with context:
            if is_node_first():
                prepare(folder, FAULTS[fault] if rank() == 0 else None)
            else:
                note(folder, "entered", data_file(folder).read_text())
    except BaseException as error:
        note(folder, "error", f"{type(error).__name__}: {error}")
        note(folder, "notes", "".join(getattr(error, "__notes__", ())))
        if not (goes_on and rank() == 0):
            raise
    if goes_on:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher may end a rank that waits for the others now
        if tool == "ours":
            dist.init_process_group("gloo", timeout=timedelta(seconds=1))
        dist.barrier()
    note(folder, "left")


def follower_raises(folder: Path, tool: str) -> None:
    """No rank may hang in the block; a collective follows, where the others notice."""
    with TOOLS[tool]():
        if is_node_first():
            prepare(folder)
        elif rank() == 1:
            note(folder, "fault")
            raise ValueError("follower's own")
        else:
            note(folder, "entered", data_file(folder).read_text())
    note(folder, "left")
    dist.barrier()


def prepares_longer_than_the_group_waits(folder: Path, tool: str, *, prepare_s: float) -> None:
    with TOOLS[tool]():
        if is_node_first():
            note(folder, "fault")
            prepare(folder, seconds=prepare_s)
        else:
            note(folder, "entered", data_file(folder).read_text())
    note(folder, "left")


def one_node_is_slower(folder: Path, tool: str, *, slower_s: float) -> None:
    """Followed by a collective under the time limit of the process group."""
    with TOOLS[tool]():
        if is_node_first():
            prepare(folder, seconds=0.1 + slower_s * (os.environ["GROUP_RANK"] == "1"))
            note(folder, "prepared")
        else:
            note(folder, "entered", data_file(folder).read_text())
    note(folder, "left")
    dist.barrier()
    note(folder, "went on")


def nested(folder: Path, tool: str) -> None:
    with TOOLS[tool]():
        if not is_node_first():
            note(folder, "entered", data_file(folder).read_text() if data_file(folder).exists() else "nothing")
        with TOOLS[tool]():
            note(folder, "inner")
        if is_node_first():
            prepare(folder)
    note(folder, "left")


def waiting_rank_is_interrupted(folder: Path, tool: str, *, prepare_s: float) -> None:
    """SIGINT to rank 1 while rank 0 prepares: for as long as that takes, or until rank 1 is out."""
    part = folder / f"pid-{rank()}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"pid-{rank()}")
    try:
        with TOOLS[tool]():
            if is_node_first():
                if rank() == 0:
                    wait_for([folder / "pid-1"])
                    time.sleep(0.5)
                    note(folder, "fault")
                    os.kill(int((folder / "pid-1").read_text()), signal.SIGINT)
                data_file(folder).write_text("half")
                wait_for([folder / "1.jsonl"], limit_s=prepare_s - PREPARE_S)
                prepare(folder)
            else:
                note(folder, "entered", data_file(folder).read_text())
    except BaseException as error:
        note(folder, "error", f"{type(error).__name__}: {error}")
        raise
    note(folder, "left")


CASES = {
    f.__name__: f
    for f in (
        fault_in_first,
        follower_raises,
        prepares_longer_than_the_group_waits,
        one_node_is_slower,
        nested,
        waiting_rank_is_interrupted,
    )
}
