"""Rows of text files: JSON lines, JSON, CSV, TSV and plain lines.

Only the wanted columns are read, each with one type for the whole file. The readers of ``datasets`` type a column by
its first chunk and cast what follows: a number in a late row would become a text, and an unused column could stop them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import datasets

from _shared.csv_rows import csv_rows
from _shared.errors import UserError, one_line
from _shared.json_rows import HAS_JSON, json_rows
from _shared.lines import Row, Wanted, check_columns, numbered_lines


def read_rows(files: tuple[str, ...], kind: str, wanted: Wanted, key: Any = None) -> Iterator[Row]:
    """Yield the wanted columns of each row; ``key`` is there for the cache of ``datasets``.

    Raises:
        UserError: With the file and the line, if a file cannot be read or lacks a column.
    """
    for file in files:
        num_rows = 0
        try:
            for row in READERS[kind](file, kind, wanted):
                num_rows += 1
                yield row
        except UserError:
            raise
        except Exception as error:  # not compressed as its name says, or half of it: each compression has its own
            raise UserError(f"{file}: {one_line(error) or type(error).__name__}") from error
        if not num_rows:
            raise UserError(f"{file}: it has no rows")


def features_of(kind: str, wanted: Wanted) -> datasets.Features | None:
    """Return the types of what ``read_rows`` yields."""
    if kind == "json" and not HAS_JSON:
        return None
    value = datasets.Json() if kind == "json" else datasets.Value("string")
    return datasets.Features(dict.fromkeys(wanted.values(), value))


def text_rows(file: str, kind: str, wanted: Wanted) -> Iterator[Row]:
    check_columns(["text"], wanted, file)
    for _, line in numbered_lines(file):
        yield dict.fromkeys(wanted.values(), line.rstrip("\r\n"))


READERS: dict[str, Callable[[str, str, Wanted], Iterator[Row]]] = {
    "json": json_rows,
    "csv": csv_rows,
    "tsv": csv_rows,
    "text": text_rows,
}
"""Kind of file → a function of the file, its kind and the wanted columns."""
