"""Outcomes of checks, in files that the processes of a program leave for the command that started it."""

import dataclasses
import json
import multiprocessing
import os
import uuid
from pathlib import Path
from typing import Any

_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
"""Variables that launchers of ranks set."""


def is_launched() -> bool:
    """True if the parent of this process is a launcher of ranks."""
    return not _LAUNCHERS.isdisjoint(os.environ) and multiprocessing.parent_process() is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The check of one Trainer, as one rank saw it."""

    trainer: str
    """Its class."""
    rank: int
    report: dict[str, Any] | None = None
    """``InvarianceReport.to_dict()``; None if it could not be checked."""
    text: str = ""
    """The report in words."""
    error: str = ""
    """The reason, in that case."""

    pid: int = dataclasses.field(default_factory=os.getpid)
    parent_pid: int = dataclasses.field(default_factory=os.getppid)
    is_launched: bool = dataclasses.field(default_factory=is_launched)
    """A launcher of ranks waits for this process."""

    def write(self, folder: Path) -> None:
        """Write a file of its own, at once: the command may read while this process is killed.

        Without the folder, as in a container, it is printed.
        """
        unfinished = folder / f"{self.pid}-{uuid.uuid4().hex}.part"
        try:
            unfinished.write_text(json.dumps(dataclasses.asdict(self)))
            unfinished.rename(unfinished.with_suffix(".json"))
        except OSError:
            print(f"hf-gradutils check: {self.trainer}\n{self.text or self.error}", flush=True)


def read_outcomes(folder: Path) -> list[Outcome]:
    """All that was written, in that order."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [Outcome(**json.loads(path.read_text())) for path in paths]
