"""The numbered lines of a text file, and the columns that its rows must have."""

import bz2
import difflib
import gzip
import lzma
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec

from _shared.errors import UserError

OPTIONAL = "tools"
"""The column beside chats, argument and name, that a file need not have."""

ROW = "_row"
"""The column of row numbers, counted from 1, that rows keep when they are shuffled and selected."""

NUM_NAMED = 10

Row = dict[str, Any]
Wanted = Mapping[str, str]  # the argument that names a column → the column


class BadLineError(Exception):
    """A line of a file is wrong."""


def numbered_lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file of UTF-8, counted from 1; raises BadLineError for one that is not."""
    openers: dict[str, Callable[..., Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": _open_zstd}
    number = 0
    with openers.get(file.rpartition(".")[2].lower(), open)(file, "rb") as raw:
        for lines in raw:
            for line in lines.splitlines(keepends=True):  # Macs of old end lines with \r
                number += 1
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise BadLineError("it is UTF-16; expected UTF-8 (iconv -f UTF-16 -t UTF-8 makes it)")
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    problem = f"line {number:,}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
                    raise BadLineError(problem) from error


def _open_zstd(file: str, mode: str) -> Any:
    return fsspec.open(file, mode, compression="zstd")


def check_columns(columns: list[str], wanted: Wanted, place: str) -> None:
    """Raise UserError if a column is missing, with the argument that names it."""
    for argument, column in wanted.items():
        if column not in columns and argument != OPTIONAL:
            close = difflib.get_close_matches(column, columns, n=1)
            more = ", …" if len(columns) > NUM_NAMED else ""
            raise UserError(
                f"the data set has no column {column!r}; it has {', '.join(columns[:NUM_NAMED])}{more} ({place}; "
                f"{f'did you mean {close[0]!r}? ' if close else ''}--{argument} names the column)"
            )
