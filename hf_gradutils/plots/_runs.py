"""Runs as their Trainers logged them."""

import json
import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_gradutils.errors import InvalidArgumentError

GROUP = "grad_norm/"
"""Prefix of the norms of groups in the log."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str
    log: list[dict[str, Any]]
    max_grad_norm: float | None
    """None if unknown."""
    logging_steps: int | None = None
    """None if unknown."""
    folder: Path | None = None
    """The folder that it was read from, if any."""

    @property
    def counts_targets(self) -> bool:
        """True if the log has numbers of targets, which only Trainers of this package write."""
        return any("num_targets" in entry for entry in self.log)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one number in the log; NaN where it has none."""
        points = [(entry["step"], entry[key]) for entry in self.log if key in entry]
        return [step for step, _ in points], [math.nan if v is None else float(v) for _, v in points]

    def groups(self) -> list[str]:
        """Norm groups, in the order of the model."""
        return list(dict.fromkeys(key for entry in self.log for key in entry if key.startswith(GROUP)))

    def targets_per_step(self) -> tuple[list[float], list[float]]:
        """Steps and targets of an optimizer step, as the mean over the steps since the entry before."""
        steps, totals = self.series("num_targets")
        # The log of a resumed run may begin late; its first entry has no more steps than any other.
        first = max(0, steps[0] - self.logging_steps) if steps and self.logging_steps else 0
        pairs = zip(steps, [first, *steps], totals, strict=False)
        return steps, [total / max(step - last, 1) for step, last, total in pairs]


def read_run(folder: Path) -> Run:
    """Read a run's log, from the folder itself or else from its newest checkpoint.

    Raises:
        InvalidArgumentError: there is none, or it was not written by a Trainer.
    """
    path = _find_state(folder)
    try:
        state = json.loads(path.read_text())
        log = state["log_history"]
        steps = [entry["step"] for entry in log]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"{path} was not written by a Trainer: {error!r}") from None
    if not any("loss" in entry for entry in log):
        raise InvalidArgumentError(f"{path} has {len(steps)} log entries and none with a loss; set logging_steps lower")
    every = state.get("logging_steps")
    # save_state() writes no arguments beside the state; each checkpoint has them.
    limits = map(_read_max_grad_norm, (path.parent, *(state.parent for state in reversed(_checkpoints(path.parent)))))
    return Run(
        name=next(_names(path)) or str(folder),
        log=log,
        max_grad_norm=next((limit for limit in limits if limit is not None), None),
        logging_steps=int(every) if isinstance(every, int | float) and every >= 1 else None,
        folder=folder.parent if folder.is_file() else folder,
    )


def read_runs(arguments: Sequence[str | Path]) -> list[Run]:
    """Read several runs, each given as its folder or as ``NAME=FOLDER``, under names that differ.

    Folders of the same name are named by as much of their paths as tells them apart.

    Raises:
        InvalidArgumentError: as of :func:`read_run`.
    """
    runs, names = [], []
    for argument in arguments:
        name, _, rest = str(argument).partition("=")
        is_named = bool(name and rest) and not os.path.exists(argument)
        folder = Path(rest) if is_named else Path(argument)
        runs.append(read_run(folder))
        names.append([name] if is_named else list(_names(_find_state(folder))))
    depths = [0] * len(runs)
    while True:
        chosen = [choices[min(depth, len(choices) - 1)] for choices, depth in zip(names, depths, strict=True)]
        clashing = [i for i, name in enumerate(chosen) if chosen.count(name) > 1 and depths[i] < len(names[i]) - 1]
        if not clashing:
            break
        for index in clashing:
            depths[index] += 1
    return with_different_names(replace(run, name=name) for run, name in zip(runs, chosen, strict=True))


def with_different_names(runs: Iterator[Run] | Sequence[Run]) -> list[Run]:
    """Number those that have the name of one before."""
    seen: dict[str, int] = {}
    result = []
    for run in runs:
        seen[run.name] = number = seen.get(run.name, 0) + 1
        result.append(replace(run, name=f"{run.name} ({number})") if number > 1 else run)
    return result


def _find_state(folder: Path) -> Path:
    """The newest trainer_state.json of a folder, or the file itself."""
    if not os.path.exists(folder):  # False, too, for a name that no file can have
        raise InvalidArgumentError(f"{str(folder)!r} does not exist; give the output folder of a training")
    candidates = [folder] if folder.is_file() else [folder / "trainer_state.json", *reversed(_checkpoints(folder))]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InvalidArgumentError(
            f"no trainer_state.json in {str(folder)!r} or in its checkpoints; it is written with every checkpoint "
            "and by trainer.save_state()"
        )
    return path


def _checkpoints(folder: Path) -> list[Path]:
    """The states of a run's checkpoints, the newest last."""
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    return sorted(states, key=lambda path: int(path.parent.name[11:]))


def _names(state: Path) -> Iterator[str]:
    """Names for a run, from the shortest to its whole path: ``out``, ``out/checkpoint-9``, ``a/out/checkpoint-9``."""
    folder = state.resolve().parent
    parts = folder.parts
    if folder.name.startswith("checkpoint-"):
        yield folder.parent.name
        parts = (*parts[:-2], f"{folder.parent.name}/{folder.name}")
    for length in range(1, len(parts)):
        yield "/".join(parts[-length:])


_NUMBERS = ("BINFLOAT", "FLOAT", "BININT", "BININT1", "BININT2", "INT")


def _read_max_grad_norm(folder: Path) -> float | None:
    """Read it from the arguments that a Trainer pickles, without unpickling a file of unknown origin."""
    try:
        with zipfile.ZipFile(folder / "training_args.bin") as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            operations = [(kind.name, value) for kind, value, _ in pickletools.genops(archive.read(name))]
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    places = [place for place, (_, value) in enumerate(operations) if value == "max_grad_norm"]
    # In a pickled dictionary a name is followed by its value, or by memo operations and then its value.
    following = operations[places[0] + 1 : places[0] + 4] if places else []
    return next((float(value) for kind, value in following if kind in _NUMBERS and value is not None), None)
