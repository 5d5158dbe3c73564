"""Lines that ranks write to files, because some of them are killed, and what is read from them."""

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BEAT_S = 0.01
"""Of a :class:`Metronome`."""


def rank() -> int:
    return int(os.environ["RANK"])


def note(folder: Path, event: str, text: str = "") -> None:
    with (folder / f"{rank()}.jsonl").open("a") as lines:
        lines.write(json.dumps({"rank": rank(), "event": event, "time_s": time.monotonic(), "text": text}) + "\n")


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
