"""Trainings that are measured: by both Trainers, without files or output."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_gradutils import GradUtilsTrainer

TRAINERS: dict[str, type[Trainer]] = {"ours": GradUtilsTrainer, "stock": Trainer}

SETTINGS: dict[str, Any] = {
    "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-bench"),  # nothing is saved there
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
"""Arguments of any Trainer here."""


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """A context in which this process prints nothing."""
    return contextlib.redirect_stdout(io.StringIO())
