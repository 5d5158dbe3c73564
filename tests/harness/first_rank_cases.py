"""Faults in a block that one rank is to run first: what each rank does, and what is read from what they wrote down.

The ranks write lines to files, because some of them are killed. The tests start the ranks as forks, quickly;
``benchmarks/first_rank/faults.py`` starts them with torchrun and does the same with other tools.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

PREPARE_S = 0.3

BEAT_S = 0.01
"""Of a :class:`Metronome`."""


def rank() -> int:
    return int(os.environ["RANK"])


def is_node_first() -> bool:
    return os.environ["LOCAL_RANK"] == "0"


def note(folder: Path, event: str, text: str = "") -> None:
    with (folder / f"{rank()}.jsonl").open("a") as lines:
        lines.write(json.dumps({"rank": rank(), "event": event, "time_s": time.monotonic(), "text": text}) + "\n")


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
        if not (goes_on and rank() == 0):
            raise
    if goes_on:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever waits for the others now may be ended
        if tool == "ours":
            dist.init_process_group("gloo", timeout=timedelta(seconds=1))
        dist.barrier()
    note(folder, "left")


def follower_raises(folder: Path, tool: str) -> None:
    """Nobody may hang in the block; what follows is a collective, where the others notice."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of one rank."""

    rank: int
    event: str
    time_s: float
    text: str


class Metronome:
    """Seconds as this machine lets a process have them.

    A thread beats every 10 ms, or later when the machine is too busy to wake it. A bar on the time between two ranks is
    in seconds on a quiet machine; counted in beats it moves away elsewhere, by as much as a process is kept waiting
    that does nothing but sleep and wake, as a waiting rank does.
    """

    def __init__(self) -> None:
        self._beats: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def __enter__(self) -> "Metronome":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beats.append(time.monotonic())

    def seconds(self, begin_s: float, end_s: float) -> float:
        """Between two times of ``time.monotonic()``, from whichever process."""
        return BEAT_S * sum(begin_s < beat_s < end_s for beat_s in self._beats)


class Story:
    """What the ranks wrote into a folder."""

    def __init__(self, folder: Path, clock: Metronome | None = None) -> None:
        self._clock = clock
        self.events: list[Event] = []
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # killed while it wrote
                    self.events.append(Event(**json.loads(line)))

    def of(self, event: str) -> list[Event]:
        return [e for e in self.events if e.event == event]

    def fault_s(self) -> float:
        (fault,) = self.of("fault")
        return fault.time_s

    def num_half(self) -> int:
        """Ranks that entered before the data was whole."""
        return sum(e.text != "whole" for e in self.of("entered"))

    def seconds(self, begin_s: float, end_s: float) -> float:
        """Between two events."""
        return end_s - begin_s if self._clock is None else self._clock.seconds(begin_s, end_s)

    def errors(self, *, but: int = 0) -> dict[int, tuple[float, str]]:
        """Rank → (seconds after the fault, error), but for the rank at fault."""
        fault_s = self.fault_s()
        return {e.rank: (self.seconds(fault_s, e.time_s), e.text) for e in self.of("error") if e.rank != but}
