"""The report of a check of invariance: rows, a verdict, a table, and JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMAT = 1
"""Of the JSON; a reader of another number may miss fields."""

BATCH_NORMALISATION = "batch normalisation"
"""Name of the row that says that it is not compared."""
_ROUNDED = 1e-2
"""A tolerance beyond it is one of half precision."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row: two numbers or gradients that should be equal, and their difference."""

    name: str
    loss: tuple[float, float] = (math.nan, math.nan)
    grad_norm: tuple[float, float] = (math.nan, math.nan)
    gradient_error: float = math.nan
    """‖b − a‖ / ‖a‖ over the whole model."""
    worst: tuple[tuple[str, float], ...] = ()
    """(Parameter, relative error) of the largest errors."""
    problem: str = ""
    """The error and its fix; empty if there is none."""
    not_compared: str = ""
    """The reason why there is nothing to compare."""
    summary: str = ""
    """The error and its cause in one line, for the first line of the report."""
    factor: float = math.nan
    """How many times too long the gradient is, if it is a multiple of what it should be."""
    decides: bool = True
    """An error here makes the verdict ``FAILED``."""

    @property
    def passed(self) -> bool:
        """True if nothing is wrong, or nothing could be compared."""
        return not self.problem


@dataclass(frozen=True)
class InvarianceReport:
    """The result of :func:`hf_gradutils.check_invariance`, the same on all ranks; ``str()`` is the table."""

    comparisons: tuple[Comparison, ...]
    tolerance: float
    what: str
    """The layout, the samples and the arithmetic."""
    num_samples: int = 0
    num_ranks: int = 1
    num_micro_batches: int = 1
    """Of each rank, in the row of the training's own settings."""
    accumulation: int = 1
    """The training's own number of these, of which the samples may fill fewer."""
    fix: str = ""
    """What makes the training exact, in one line."""
    version: str = ""
    """Of hf_gradutils."""

    @property
    def passed(self) -> bool:
        """True if nothing that decides is wrong, and some gradients were compared."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> str:
        """``passed``, ``FAILED``, or ``NOT COMPARED`` if no gradient could be compared: that proves nothing."""
        deciding = [row for row in self.comparisons if row.decides]
        if not all(row.passed for row in deciding):
            return "FAILED"
        return "NOT COMPARED" if all(math.isnan(row.gradient_error) for row in deciding) else "passed"

    @property
    def answer(self) -> str:
        """The result in one line, with the cause where it is known."""
        deciding = [row for row in self.comparisons if row.decides]
        if self.verdict == "FAILED":
            row = next(row for row in deciding if row.problem)
            return f"WRONG: {row.summary or f'{row.name}: {row.problem}'}"
        if self.verdict == "NOT COMPARED":
            return "NOT COMPARED: " + next((row.not_compared for row in deciding if row.not_compared), "no gradients")
        error = max(row.gradient_error for row in deciding if not math.isnan(row.gradient_error))
        layout = f"{micro_batches(self.num_micro_batches, self.accumulation)}, {count(self.num_ranks, 'rank')}"
        rounded = " and its rounded arithmetic" if self.tolerance > _ROUNDED else ""
        rows = [
            row for row in self.comparisons if row.not_compared and (row.decides or row.name == BATCH_NORMALISATION)
        ]
        left_out = f", but for {' and '.join(row.name for row in rows)}, which is not compared" if rows else ""
        return f"EXACT: the gradient is that of one batch ({layout}){rounded}, up to {error:.0e}{left_out}"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types for JSON, in which null is a number that is not finite.

        ``verdict`` and ``answer`` are in it for readers; :meth:`from_dict` works them out anew.
        """
        fields: dict[str, Any] = _finite(dataclasses.asdict(self))
        return {"format": _FORMAT, "verdict": self.verdict, "answer": self.answer} | fields

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InvarianceReport":
        """Make the report that :meth:`to_dict` has written; unknown entries are ignored."""
        rows = tuple(_row_of(row) for row in values["comparisons"])
        plain = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        return cls(**plain | {"comparisons": rows, "tolerance": _number(values["tolerance"])})

    def save(self, path: str | Path) -> None:
        """Write the report as JSON. On several ranks, call it on one."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [self.answer, "", f"Invariance: {self.what}, tolerance {self.tolerance:.0e}", *self._table()]
        advised: set[str] = set()
        for row in self.comparisons:
            if row.not_compared:
                lines.append(f"not compared: {row.name}: {row.not_compared}")
            if row.problem:
                error, _, advice = row.problem.partition("; ")
                problem = error if advice in advised else row.problem
                advised.add(advice)
                lines.append(f"{'WRONG' if row.decides else 'at other accumulations'}: {row.name}: {problem}")
            if row.problem and row.worst and row.decides and math.isnan(row.factor):  # else it is all of them
                lines.append("  most wrong: " + ", ".join(f"{name} ({error:.1e})" for name, error in row.worst))
        if self.fix and any(row.problem and math.isfinite(row.gradient_error) for row in self.comparisons):
            lines.append(f"to train exactly: {self.fix}")
        return "\n".join([*lines, self.verdict])

    def _table(self) -> list[str]:
        rows: list[tuple[str, ...]] = [("", "loss", "", "gradient norm", "", "gradient", "")]
        for row in self.comparisons:
            if row.not_compared:
                continue
            numbers = [*(f"{x:.7g}" for x in row.loss), *(f"{x:.7g}" for x in row.grad_norm)]
            error = "" if math.isnan(row.gradient_error) else f"off by {row.gradient_error:.1e}"
            verdict = "ok" if row.passed else "WRONG" if row.decides else "not as you train"
            rows.append((row.name, *("" if n == "nan" else n for n in numbers), error, verdict))
        widths = [max(len(r[column]) for r in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows]


def count(number: int, thing: str) -> str:
    """A number of things, as ``1 rank`` and ``2 ranks``."""
    plural = thing + ("es" if thing.endswith("ch") else "s")
    return f"{number} {thing if number == 1 else plural}"


def micro_batches(number: int, accumulation: int) -> str:
    """A number of micro-batches, which may be fewer than the training's."""
    if number < accumulation:
        return f"{number} of your {accumulation} micro-batches"
    return count(number, "micro-batch")


def _row_of(values: dict[str, Any]) -> Comparison:
    names = {f.name for f in dataclasses.fields(Comparison)}
    row = {name: value for name, value in values.items() if name in names}
    for name in ("gradient_error", "factor"):
        row[name] = _number(row.get(name))
    for name in ("loss", "grad_norm"):
        first, second = row.get(name) or (None, None)
        row[name] = (_number(first), _number(second))
    row["worst"] = tuple((name, _number(error)) for name, error in row.get("worst", ()))
    return Comparison(**row)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
