"""Sections and tables of a Markdown page: one part of it is measured on this machine, another on a different one."""

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Part:
    """What one part of a report came to."""

    lines: list[str] = field(default_factory=list)
    """Of Markdown."""
    values: dict[Any, Any] = field(default_factory=dict)
    """What was measured, by the name that it has there."""
    faults: list[str] = field(default_factory=list)
    """What is not as promised."""


class Table:
    """Rows that are printed as they come, and all of them as Markdown in the end."""

    def __init__(self, *header: str):
        self._rows = [header]

    def add(self, *cells: str) -> None:
        """One more row; cells that are missing at its end are empty."""
        print("  ".join(cell for cell in cells if cell), flush=True)
        self._rows.append(cells + ("",) * (len(self._rows[0]) - len(cells)))

    def lines(self) -> list[str]:
        """As Markdown."""
        return table(self._rows)


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as Markdown, the first one the header."""
    header, *body = rows
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *body)]


def section(page: str, heading: str) -> list[str]:
    """The lines below a heading, up to the next one of its level or above; none where the page has no such heading."""
    lines = page.splitlines()
    bounds = _bounds(lines, heading)
    return [] if bounds is None else _stripped(lines[bounds[0] + 1 : bounds[1]])


def with_section(page: str, heading: str, body: list[str]) -> str:
    """The page with these lines below the heading in place of what was there; at its end where it had no such one."""
    lines = page.splitlines()
    start, end = _bounds(lines, heading) or (len(lines), len(lines))
    parts = (_stripped(lines[:start]), [heading], _stripped(body), _stripped(lines[end:]))
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _bounds(lines: list[str], heading: str) -> tuple[int, int] | None:
    """Of the heading and what is below it."""
    if heading not in lines:
        return None
    start = lines.index(heading)
    level = len(heading.partition(" ")[0])
    ends = tuple("#" * n + " " for n in range(1, level + 1))
    return start, next((i for i in range(start + 1, len(lines)) if lines[i].startswith(ends)), len(lines))


def _stripped(lines: list[str]) -> list[str]:
    """Without empty lines before and after."""
    return "\n".join(lines).strip("\n").splitlines()


def short_reason(reason: str, width: int = 200) -> str:
    """The first line of an error, for a table: without the names of temporary folders."""
    folders = rf"{re.escape(tempfile.gettempdir())}/[^\s.]+"
    first_line = re.sub(folders, "a temporary folder", reason.split("\n")[0]).replace("|", "/")
    return first_line if len(first_line) <= width else first_line[:width] + " …"
