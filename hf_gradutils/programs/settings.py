"""Settings of a program under ``hf-gradutils run`` or ``check``, in a variable that its processes inherit.

Imports nothing but the standard library: every Python of the program reads it.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

_VARIABLE = "_HF_GRADUTILS_PROGRAM"
_MARK = "made-exact"
_START = Path(__file__).parent / "start"
"""The folder of ``sitecustomize.py``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one ``run`` or ``check``."""

    folder: str
    """Where processes leave marks and outcomes."""
    outer_folder: str = ""
    """That of a ``run`` whose program is this command."""
    makes_exact: bool
    checks: bool
    num_samples: int | None = None
    all_trainers: bool = False
    timeout_s: float = 1800.0
    allows_loops: bool = False
    prefix: str = sys.prefix
    root: str = str(Path(__file__).parent.parent.parent)
    """The folder that hf_gradutils is imported from, which may be on the path of the command alone."""

    def inside_of_others(self) -> "Settings":
        """These, if the command runs in a program of another command: a ``run`` in a ``check`` is checked, exact."""
        text = os.environ.get(_VARIABLE)
        if text is None:
            return self
        outer = Settings(**json.loads(text))
        combined = outer if outer.checks else dataclasses.replace(self, outer_folder=outer.folder)
        return dataclasses.replace(
            combined,
            makes_exact=self.makes_exact or outer.makes_exact,
            allows_loops=self.allows_loops or outer.allows_loops,
        )

    def environment(self) -> dict[str, str]:
        """The variables of a process that is to be hooked, and of those that it starts."""
        paths = [str(_START), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        python_path = os.pathsep.join(dict.fromkeys(paths))
        return os.environ | {_VARIABLE: json.dumps(dataclasses.asdict(self)), "PYTHONPATH": python_path}

    def mark_exact(self) -> None:
        """Leave a mark that a Trainer is exact, if the folder is there: a program may outlive its command."""
        for folder in filter(None, (self.folder, self.outer_folder)):
            with contextlib.suppress(OSError):
                Path(folder, _MARK).touch()

    @property
    def has_made_exact(self) -> bool:
        """True if a process of the program has left that mark."""
        return Path(self.folder, _MARK).exists()
