"""What a user can put right is one line per rank, without a traceback."""

import json
import os
import sys
import time
from pathlib import Path


class UserError(Exception):
    """Something the user gave is wrong."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def exit_with_error(error: Exception) -> None:
    """Show what the user can put right in one line per rank; the launcher repeats it as its root cause."""
    message = f"rank {os.environ.get('RANK', 0)}: error: {one_line(error)}"
    print(message, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": cause}))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        time.sleep(5)  # once one rank is gone the launcher ends the others: let them all say their line
    sys.exit(1)
