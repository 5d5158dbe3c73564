"""Mistakes of the user: one line per rank, without a traceback."""

import json
import os
import sys
import time
from pathlib import Path


class UserError(Exception):
    """An argument, a file or a data set of the user is wrong."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def exit_with_error(error: Exception) -> None:
    """Print the error in one line and exit with code 1; the launcher repeats the line as its root cause."""
    message = f"rank {os.environ.get('RANK', 0)}: error: {one_line(error)}"
    print(message, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": cause}))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        time.sleep(5)  # the launcher ends all ranks once one has exited; give each time to print its line
    sys.exit(1)
