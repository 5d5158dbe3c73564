"""Rows of JSON lines, of an array of objects, or of one object of columns."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import datasets

from _shared.errors import one_line
from _shared.lines import OPTIONAL, BadLineError, Row, Wanted, check_columns, numbered_lines

HAS_JSON = hasattr(datasets, "Json")  # since datasets 4.7; before, a column of JSON must be of one type


def json_rows(file: str, kind: str, wanted: Wanted) -> Iterator[Row]:
    missing = {column for argument, column in wanted.items() if argument != OPTIONAL}
    columns: dict[str, None] = {}
    for place, row in _json_values(file, list(missing)):
        if not isinstance(row, dict):
            what = "null" if row is None else f"{type(row).__name__} {json.dumps(row)[:40]}"
            raise BadLineError(f'{place}: {what}; expected an object, {{"column": value, …}}')
        if missing:
            columns |= dict.fromkeys(row)
            missing -= row.keys()
        values = {column: row.get(column) for column in wanted.values()}
        # As JSON, because datasets would read a text like "5" as the number.
        yield {column: json.dumps(value) for column, value in values.items()} if HAS_JSON else values
    if columns:
        check_columns(list(columns), wanted if missing else {}, file)


def _json_values(file: str, wanted: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows with their places: of lines, of an array, or of one object that holds columns."""
    lines = ((number, line) for number, line in numbered_lines(file) if line.strip())
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    number, line = first
    lines = itertools.chain([second] if second else [], lines)
    if line.lstrip().startswith("["):
        rows = _parse("\n" * (number - 1) + line + _joined(lines, number))
        yield from ((f"row {row:,}", value) for row, value in enumerate(rows, 1))
        return
    try:
        value = _parse(line, number)
        rows = [value] if second else _records(value, wanted)
    except BadLineError:
        value = _one_object(line + _joined(lines, number))
        if value is None:
            raise
        rows = _records(value, wanted)
    yield from ((f"line {number:,}", row) for row in rows)
    yield from ((f"line {number:,}", _parse(line, number)) for number, line in lines)


def _joined(lines: Iterator[tuple[int, str]], number: int) -> str:
    """Join the lines after this one, with the blank lines that were left out, so that errors name the right line."""
    texts = []
    for following, line in lines:
        texts.append("\n" * (following - number - 1) + line)
        number = following
    return "".join(texts)


def _one_object(text: str) -> dict[str, Any] | None:
    try:
        value = _parse(text)
    except BadLineError:
        return None
    return value if isinstance(value, dict) else None


def _records(value: Any, wanted: list[str]) -> list[Any]:
    """Return one row, or those of an object of columns: lists of texts or chats, where a row has a text or a chat."""
    lists = [value.get(column) for column in wanted] if isinstance(value, dict) else []
    if not lists or not all(isinstance(column, list) and column for column in lists):
        return [value]
    if len(set(map(len, lists))) > 1 or any(isinstance(item, dict) for column in lists for item in column):
        return [value]
    return [dict(zip(wanted, items, strict=True)) for items in zip(*lists, strict=True)]


def _parse(text: str, number: int | None = None) -> Any:
    try:
        value = json.loads(text, parse_constant=lambda name: None)  # NaN is no value
    except json.JSONDecodeError as error:
        if number is None:
            raise BadLineError(f"line {error.lineno:,}: {error.msg}") from error
        where = f"at character {error.colno} of {text.strip()[:60]!r}"
        raise BadLineError(f"line {number:,}: not JSON: {error.msg}, {where}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or an integer of thousands of digits
        raise BadLineError(f"line {number or 1:,}: {one_line(error)}") from error
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadLineError(f"line {number or 1:,}: half of a pair of surrogates, which is no character") from error
    return value
