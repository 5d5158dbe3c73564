"""Checkpoints with the Trainer's layout: ``checkpoint-<step>``, complete once it holds ``trainer_state.json``."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from _shared.errors import UserError

STATE = "trainer_state.json"


def find_checkpoint(output_dir: str, wanted: str | None) -> Path | None:
    """Resolve ``--resume_from_checkpoint``: a folder, or "last" for the newest complete one in output_dir."""
    if wanted in (None, "false", "False"):
        return None
    if wanted not in ("last", "true", "True"):
        if not is_complete(Path(wanted)):
            raise UserError(f"no checkpoint to resume from in {wanted!r}")
        return Path(wanted)
    complete = [folder for folder in checkpoints(output_dir) if is_complete(folder)]
    if not complete:
        raise UserError(f"no checkpoint to resume from in {output_dir!r}")
    return complete[-1]


def checkpoints(output_dir: str) -> list[Path]:
    """List the checkpoints of a run, oldest first; the last may be incomplete if the run was killed."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_complete(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except (OSError, ValueError, KeyError):  # missing or truncated
        return False
    return True


def read_state(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of optimizer steps taken and the log up to there."""
    state = json.loads((folder / STATE).read_text())
    return state["global_step"], state["log_history"]


def write_state(folder: Path, step: int, log_history: list[dict[str, Any]]) -> None:
    """Mark a checkpoint complete; write everything else first."""
    (folder / STATE).write_text(json.dumps({"global_step": step, "log_history": log_history}, indent=2))


def drop_old_checkpoints(output_dir: str, num_kept: int | None) -> None:
    if num_kept:
        for folder in checkpoints(output_dir)[:-num_kept]:
            shutil.rmtree(folder)
