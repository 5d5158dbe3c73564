"""The answer of a check: printed, written, and as an exit code."""

import json
from collections.abc import Sequence
from pathlib import Path

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.programs.outcomes import Outcome

EXACT, WRONG, UNKNOWN = 0, 1, 2
"""Exit codes."""
_WORDS = {"passed": "EXACT", "FAILED": "WRONG"}


def make_room(*files: Path | None) -> None:
    """Remove the files of an earlier check, before the check runs: what is there afterwards is its own.

    Raises:
        InvalidArgumentError: one cannot be written.
    """
    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            file.unlink()
        except OSError as error:
            raise InvalidArgumentError(f"cannot write {str(file)!r}: {error.strerror}") from None


def show(outcomes: Sequence[Outcome], *, json_file: Path | None, picture: Path | None) -> int:
    """Print the outcomes of rank 0, the answer in the first line, and write them; returns the exit code.

    Args:
        outcomes: Of all ranks that ran below this process. On other nodes than the first, nothing is printed.
        json_file: Where to write the report. Reports of further Trainers get a number.
        picture: Where to draw it, likewise.
    """
    errors = {(outcome.trainer, outcome.error): outcome for outcome in outcomes if outcome.report is None}
    shown = [*(outcome for outcome in outcomes if outcome.report and outcome.rank == 0), *errors.values()]
    if len(shown) > 1:
        print(f"{len(shown)} Trainers: {', '.join(map(_word, shown))}")
    for number, outcome in enumerate(shown, start=1):
        of = f" of {outcome.trainer}" if outcome.trainer else ""
        print(outcome.text or f"NOT COMPARED{of}: {outcome.error}")
        if outcome.report is not None:
            print(f"checked: {outcome.trainer}")
        if json_file is not None:
            _write(outcome, _numbered(json_file, number))
        if picture is not None and outcome.report is not None:
            _draw(outcome.report, _numbered(picture, number))
    words = set(map(_word, outcomes))
    return WRONG if "WRONG" in words else UNKNOWN if "NOT COMPARED" in words else EXACT


def _word(outcome: Outcome) -> str:
    verdict = "NOT COMPARED" if outcome.report is None else outcome.report["verdict"]
    return _WORDS.get(verdict, verdict)


def _write(outcome: Outcome, path: Path) -> None:
    report = outcome.report or {"verdict": "NOT COMPARED", "answer": f"NOT COMPARED: {outcome.error}"}
    text = json.dumps({"trainer": outcome.trainer} | report, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _draw(report: dict[str, object], path: Path) -> None:
    from hf_gradutils.invariance import InvarianceReport
    from hf_gradutils.plots import plot_report

    print(f"wrote {plot_report(InvarianceReport.from_dict(report), path)}")


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")
