"""Rows of CSV and TSV: every cell is a text, and only an empty cell is missing."""

import csv
import sys
from collections.abc import Iterator

from _shared.errors import UserError
from _shared.lines import OPTIONAL, BadLineError, Row, Wanted, check_columns, numbered_lines

SEPARATORS = {"csv": ",;\t|", "tsv": "\t,;|"}
"""Tried in this order; the first whose header has the wanted columns is the file's."""


def csv_rows(file: str, kind: str, wanted: Wanted) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    names = {column for argument, column in wanted.items() if argument != OPTIONAL}
    first = next((line for _, line in numbered_lines(file) if line.strip()), "")
    fits = (sep for sep in SEPARATORS[kind] if names <= set(next(csv.reader([first], delimiter=sep))))
    separator = next(fits, SEPARATORS[kind][0])
    records = _records_of_csv(file, separator, csv.QUOTE_MINIMAL)
    if separator == "\t" and not _has_quoting(file):
        records = _records_of_csv(file, separator, csv.QUOTE_NONE)
    _, header = next(records, (0, []))
    if not header:
        return
    check_columns([*filter(None, header)], wanted, file)
    if twice := [column for column in names if header.count(column) > 1]:
        raise BadLineError(f"two columns have the name {twice[0]!r}; rename one")
    places = {column: header.index(column) for column in wanted.values() if column in header}
    numbers = {argument: (0, "") for argument, column in wanted.items() if column in places}
    for row, (number, record) in enumerate(records, 1):
        if len(record) > len(header) and any(record[len(header) :]):
            hint = "a text with the separator in it needs quotes around it"
            raise BadLineError(f"line {number:,} has {len(record)} fields and the header has {len(header)}; {hint}")
        values = {column: record[place] or None for column, place in places.items() if place < len(record)}
        for argument in [*numbers]:
            _note_number(numbers, argument, values.get(wanted[argument]), row)
        yield dict.fromkeys(wanted.values()) | values
    for argument, (row, value) in numbers.items():
        if row:
            expected = "one class: a name, an integer or a bool" if argument == "label_column" else "text"
            place = f"{file}, row {row:,}, column {wanted[argument]!r}"
            raise UserError(f"{place}: the number {value}; expected {expected}")


def _note_number(numbers: dict[str, tuple[int, str]], argument: str, value: str | None, row: int) -> None:
    """Keep the first number of a column of nothing but numbers: they are no texts, and fractions are no classes."""
    if value is None:
        return
    try:
        number = float(value)
    except ValueError:
        del numbers[argument]
        return
    if not numbers[argument][0] and not (argument == "label_column" and number.is_integer()):
        numbers[argument] = (row, value)


def _records_of_csv(file: str, separator: str, quoting: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the records, each with the line that it begins on."""
    lines = (line for _, line in numbered_lines(file))
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'expected "…" around the whole field, and "" for a quote in it'
            raise BadLineError(f"line {number:,}: its quotes do not match ({error}); {hint}") from error
        if record:
            yield number, record


def _has_quoting(file: str) -> bool:
    """Return False if the quotes of a TSV are characters like all others: unmatched, or around tabs and line ends."""
    try:
        records = _records_of_csv(file, "\t", csv.QUOTE_MINIMAL)
        return not any("\t" in field and "\n" in field for _, record in records for field in record)
    except BadLineError:
        return False
