"""Counts of rows read, dropped by reason and truncated, and of targets per row."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import datasets

from _shared.errors import UserError
from _shared.files import Source, Texts
from _shared.lines import ROW

EMPTY = "empty"
UNANSWERED = "without an answer"
NUM_NAMED = 3
"""Dropped rows that are named by their number, for each reason."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of one part, training or held-out."""

    source: Source
    num_read: int
    dropped: dict[str, list[int]]
    """Reason → the rows' numbers."""

    num_truncated: int
    num_targets: list[int]
    """Per kept row."""

    max_length: int | None
    knows_cut: bool = True
    """False if rows of the full length may or may not have been cut."""

    num_packed: int | None = None
    """Rows that were packed into those that are trained on, or None if each is a row of its own."""


def count_rows(
    encoded: datasets.Dataset, texts: Texts, max_length: int | None, hint: Callable[[], str] = str
) -> Counts:
    """Read the columns ``dropped``, ``truncated`` and ``num_targets``.

    Raises:
        UserError: If no row is kept, with a hint at what chats hold if they have no answer.
    """
    names = [ROW, "dropped", "truncated", "num_targets"]
    dropped, num_truncated, num_targets = defaultdict(list), 0, []
    for row, reason, is_truncated, num_here in zip(*(encoded[name][:] for name in names), strict=True):
        if reason:
            dropped[reason].append(row)
        else:
            num_truncated += is_truncated
            num_targets.append(num_here)
    counts = Counts(
        source=texts.source,
        num_read=len(encoded),
        dropped=dict(dropped),
        num_truncated=num_truncated,
        num_targets=num_targets,
        max_length=max_length,
    )
    if not num_targets:
        seen = hint() if UNANSWERED in counts.dropped else ""
        raise UserError(
            f"{texts.source.name}: none of the {plural(len(encoded), f'{texts.part} row')} has a target left: "
            f"{reasons(counts.dropped)}{seen}; check the columns, raise max_length, or hold out others with "
            "validation_file"
        )
    return counts


def without_targets(max_length: int | None) -> str:
    return f"without a target left after {plural(max_length, 'token')}" if max_length else "without a target"


def reasons(dropped: dict[str, list[int]]) -> str:
    """Say how many rows were dropped for each reason.

    Example:
        >>> reasons({"empty": [4, 17, 40, 41], "without an answer": [5]})
        '4 empty (rows 4, 17, 40, …), 1 without an answer (row 5)'
    """
    texts = []
    for reason, rows in sorted(dropped.items(), key=lambda item: -len(item[1])):
        named = ", ".join(f"{row:,}" for row in sorted(rows)[:NUM_NAMED])
        more = ", …" if len(rows) > NUM_NAMED else ""
        texts.append(f"{len(rows):,} {reason} ({'row' if len(rows) == 1 else 'rows'} {named}{more})")
    return ", ".join(texts)


def row_lines(train: Counts, held_out: Counts) -> list[str]:
    """Say what became of all rows, and how many targets the kept ones have."""
    parts = (train, held_out)
    sources = dict.fromkeys(part.source.name for part in parts)
    fates = "; ".join(_fate(name, [part for part in parts if part.source.name == name]) for name in sources)
    lines = [f"{fates}; {_kept(train)} to train on, {_kept(held_out)} held out"]
    targets = train.num_targets + held_out.num_targets
    least, most = min(targets), max(targets)
    spread = f"{least:,} to {most:,}, median {statistics.median_low(targets):,}" if most > least else f"{least:,}"
    line = f"targets per row: {spread}"
    return [*lines, f"{line}; {truncated(parts)}"]


def _fate(name: str, parts: list[Counts]) -> str:
    """Say what became of the rows of one file or folder."""
    dropped: dict[str, list[int]] = defaultdict(list)
    for part in parts:
        for reason, rows in part.dropped.items():
            dropped[reason] += rows
    num_read, num_dropped = sum(part.num_read for part in parts), sum(map(len, dropped.values()))
    if not num_dropped:
        return f"{name}: {plural(num_read, 'row')} read, none dropped"
    return f"{name}: dropped {num_dropped:,} of {plural(num_read, 'row')}: {reasons(dropped)}"


def plural(num: int, what: str) -> str:
    """Return a count with its noun.

    Example:
        >>> plural(1, "row"), plural(2000, "row")
        ('1 row', '2,000 rows')
    """
    return f"{num:,} {what}" if num == 1 else f"{num:,} {what}s"


def _kept(part: Counts) -> str:
    num_kept = len(part.num_targets)
    return f"{num_kept:,}" if part.num_packed is None else f"{part.num_packed:,} packed into {plural(num_kept, 'row')}"


def truncated(parts: tuple[Counts, ...]) -> str:
    num_truncated = sum(part.num_truncated for part in parts)
    max_length = max(part.max_length or 0 for part in parts)
    if not num_truncated:
        return "no row truncated"
    if any(part.num_packed for part in parts):
        return f"packed rows have {plural(max_length, 'token')} at most, and chats may be cut there"
    rows, tokens = plural(num_truncated, "row"), plural(max_length, "token")
    if all(part.knows_cut for part in parts):
        return f"{rows} truncated to {tokens}"
    return f"{rows} of {tokens}, the most there may be, so perhaps truncated"
