"""The outcome of each rank, and the failure of the test that is made of them."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

OUTPUT_TAIL = 4000
"""Characters of a rank's output that the message repeats."""

Kind = Literal["finished", "skipped", "raised", "died", "hangs", "ended"]


@dataclass(kw_only=True, slots=True)
class RankReport:
    """How it went for one rank."""

    global_rank: int
    kind: Kind
    """`ended`: still running when another rank had failed."""
    time_s: float
    """`time.monotonic()` of the outcome."""
    summary: str
    """One line without the rank: `raised ValueError: boom`."""
    details: str = ""
    """The traceback, or the stacks of a rank that hangs."""
    value: Any = None
    """What the function returned."""
    output: str = ""
    """What the rank wrote to stdout and stderr."""
    is_echo: bool = False
    """Reports only that another rank went away."""

    @property
    def is_failure(self) -> bool:
        return self.kind in ("raised", "died", "hangs")


class RankFailure(AssertionError):  # noqa: N818
    """A rank raised, hung or died; `reports` has every rank's story in rank order."""

    def __init__(self, message: str, reports: list[RankReport]) -> None:
        super().__init__(message)
        self.reports = reports


def judge(reports: list[RankReport]) -> None:
    """Fail with the failure that came first, skip if every rank skipped."""
    __tracebackhide__ = True
    skipped = [report for report in reports if report.kind == "skipped"]
    if len(skipped) == len(reports):
        pytest.skip(skipped[0].summary.removeprefix("skipped: "))
    failures = [report for report in reports if report.is_failure] or skipped
    if failures:
        first = min(failures, key=lambda report: (report.is_echo, report.time_s))
        raise RankFailure(_message(first, reports), reports)


_EXTENSIONS = re.compile(r"^Extension modules: .*$", re.MULTILINE)
"""What faulthandler ends with: longer than the stacks, and it grows with what has been imported."""


def _message(first: RankReport, reports: list[RankReport]) -> str:
    parts = [f"rank {first.global_rank} of {len(reports)} {first.summary}"]
    if first.kind == "skipped":
        parts[0] += ", but not every rank did"
    if first.details:
        parts.append(first.details.rstrip())
    if output := _EXTENSIONS.sub("", first.output).strip():
        parts.append(f"rank {first.global_rank} wrote:\n{output[-OUTPUT_TAIL:]}")
    for other in reports:
        if other is not first and other.kind not in ("finished", "skipped"):
            parts.append(f"rank {other.global_rank} of {len(reports)} {other.summary}")
            if other.kind == "hangs":
                parts.append(other.details.rstrip())
    return "\n\n".join(parts)
