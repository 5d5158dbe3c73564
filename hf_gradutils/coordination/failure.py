"""A first rank's failure on its way through the store: from its exception to the error on the waiting ranks."""

import json
import re
import traceback
from dataclasses import asdict, dataclass

from hf_gradutils.errors import FirstRankError

MAX_REPORT_CHARS = 20_000
"""Longest reason and traceback that are published; a longer reason loses its end, a traceback its start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The failure as waiting ranks receive it."""

    global_rank: int
    message: str
    """One line: rank, process, block and reason."""

    reason: str
    traceback: str


def encode_failure(error: BaseException, *, global_rank: int, rank: str, block: str) -> str:
    """The report of the rank that ``rank`` describes, whose part in ``block`` ended with ``error``."""
    reason = " ".join(_encodable(traceback.format_exception_only(error)).split())[:MAX_REPORT_CHARS]
    failure = Failure(
        global_rank=global_rank,
        message=f"{rank} failed in {block}: {reason}",
        reason=reason,
        traceback=_encodable(traceback.format_exception(error))[-MAX_REPORT_CHARS:],
    )
    return json.dumps(asdict(failure))


def error_of(verdict: str) -> FirstRankError:
    """The error that a verdict stands for: a report of :func:`encode_failure`, or the line on a rank that has ended."""
    if not verdict.startswith("{"):
        rank = re.match(r"rank (\d+) ", verdict)
        _, _, how = verdict.partition(" has ended ")
        return FirstRankError(
            verdict, global_rank=int(rank[1]) if rank else None, reason=f"it has ended {how}" if how else verdict
        )
    failure = Failure(**json.loads(verdict))
    error = FirstRankError(failure.message, global_rank=failure.global_rank, reason=failure.reason)
    error.add_note(f"Traceback of rank {failure.global_rank}:\n{failure.traceback}")
    return error


def _encodable(lines: list[str]) -> str:
    """The text, with escapes for what cannot be printed: a file name in it may hold any bytes."""
    return "".join(lines).encode(errors="backslashreplace").decode()
