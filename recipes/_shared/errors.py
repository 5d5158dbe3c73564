"""Mistakes of the user, and whatever else stops the preparation: one line per rank, without a traceback."""

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from hf_gradutils.errors import FirstRankError, GradUtilsError

PATIENCE_S = {"rank 0": 5, "own error": 10, "error of another rank": 15}
"""Seconds that a rank stays after its line. The launcher takes the first rank that exits for the root cause and ends
the others at once, so the rank that failed goes first (rank 0 if all did), when the others have printed theirs."""


class UserError(Exception):
    """An argument, a file or a data set of the user is wrong."""


def one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an exception that nothing has foreseen, of a bug or an exotic file, into a UserError that says where."""
    try:
        yield
    except (UserError, GradUtilsError):
        raise
    except SystemExit as error:
        if error.code:
            print(
                f"rank {os.environ.get('RANK', '0')}: interrupted, exit code {error.code}", file=sys.stderr, flush=True
            )
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
        raise UserError(
            f"{one_line(''.join(traceback.format_exception_only(error)))} (unexpected, in {where}; "
            "the environment variable RECIPE_TRACEBACK=1 prints the traceback)"
        ) from error


def line_of(error: BaseException) -> str:
    """Return what the user has to know in one line; on ranks that waited, which rank failed and why."""
    reason = getattr(error, "reason", None)
    if not isinstance(error, FirstRankError) or reason is None:
        return one_line(str(error).partition("\n\n")[0] if isinstance(error, FirstRankError) else error)
    rank = getattr(error, "global_rank", None)
    if re.search(r"\b(KeyboardInterrupt|SystemExit)\b", reason):
        return "interrupted" if rank is None else f"interrupted, as rank {rank} was"
    failed = "the first rank of this node" if rank is None else f"rank {rank}"
    return f"{failed} could not prepare the data: {one_line(re.sub(r'^([a-z_]+[.])*UserError: ', '', reason))}"


def exit_with_error(error: BaseException) -> None:
    """Print the error in one line and exit with code 1; the launcher repeats the line as its root cause."""
    rank, failed_at_s = os.environ.get("RANK", "0"), int(time.time())
    if isinstance(error, KeyboardInterrupt):  # of all ranks, from the terminal
        print(f"rank {rank}: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    message = f"rank {rank}: error: {line_of(error)}"
    if os.environ.get("RECIPE_TRACEBACK"):
        traceback.print_exception(error)
    print(message, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        is_own = not isinstance(error, FirstRankError)
        whose = "error of another rank" if not is_own else "rank 0" if rank == "0" else "own error"
        time.sleep(PATIENCE_S[whose])
        if whose != "rank 0":  # torchrun takes the smallest time for the root cause
            failed_at_s = int(time.time())
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of a rank that is ended before, torchrun says so
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(failed_at_s)}}
        Path(report).write_text(json.dumps({"message": cause}))
    sys.exit(1)
