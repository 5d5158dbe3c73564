"""The report of a check of invariance, as a table and in words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_MOST_NAMES = 3
_CLOSE = 1e-3
"""Relative difference up to which a gradient is a multiple, unless arithmetic is rounded more."""
_FEW_ARE_WRONG = (
    "something sums what earlier micro-batches left in them again (a tensor-parallel hook on qk-norm), or holds only a "
    "part of them (experts: pass ownership={'<name pattern>': 'sharded'}); GradUtilsTrainer takes such hooks out"
)
"""Advice if the gradients of a few parameters are wrong."""
NOTHING_IS_TRAINED = (
    "nothing is trained: no parameter gets a gradient. The loss is detached, no parameter that requires a gradient "
    "takes part in it, or every label of these samples is -100"
)


class Difference(NamedTuple):
    """Squares and product of a gradient b and its reference a, over all elements."""

    error: float
    """Σ (b − a)²."""
    want: float
    """Σ a²."""
    product: float
    """Σ a·b."""


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

    @property
    def passed(self) -> bool:
        """True if nothing is wrong, and some gradients were compared."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> str:
        """``passed``, ``FAILED``, or ``NOT COMPARED`` if no gradient could be compared: that proves nothing."""
        if not all(row.passed for row in self.comparisons):
            return "FAILED"
        return "NOT COMPARED" if all(math.isnan(row.gradient_error) for row in self.comparisons) else "passed"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "loss", "", "gradient norm", "", "gradient", "")]
        for row in self.comparisons:
            if row.not_compared:
                continue
            numbers = [*(f"{x:.7g}" for x in row.loss), *(f"{x:.7g}" for x in row.grad_norm)]
            error = "" if math.isnan(row.gradient_error) else f"off by {row.gradient_error:.1e}"
            verdict = "ok" if row.passed else "WRONG"
            rows.append((row.name, *("" if n == "nan" else n for n in numbers), error, verdict))
        widths = [max(len(r[column]) for r in rows) for column in range(len(rows[0]))]
        lines = [f"Invariance: {self.what}, tolerance {self.tolerance:.0e}"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows]
        for row in self.comparisons:
            if row.not_compared:
                lines.append(f"not compared: {row.name}: {row.not_compared}")
            if row.problem:
                lines.append(f"WRONG: {row.name}: {row.problem}")
            if row.problem and row.worst:
                lines.append("  most wrong: " + ", ".join(f"{name} ({error:.1e})" for name, error in row.worst))
        return "\n".join([*lines, self.verdict])


def compare_gradients(
    name: str,
    differences: Mapping[str, Difference],
    *,
    loss: tuple[float, float],
    grad_norm: tuple[float, float],
    tolerance: float,
    advice: Callable[[float | None], str],
    advice_if_few: str = "",
    varies_by: float = 0.0,
) -> Comparison:
    """Make a row of the differences of parameters' gradients, and of (reference, actual) loss and norm.

    Args:
        name: Of the row.
        differences: Parameter → difference of its gradient.
        loss: Reference and actual one.
        grad_norm: Likewise.
        tolerance: Largest relative error.
        advice: The fix if the whole gradient is wrong: for one that is so many times too large, 1 if only the loss is
            wrong, None if it is no multiple.
        advice_if_few: The fix if the gradients of a few parameters are wrong, where the usual one does not hold.
        varies_by: Relative error of the gradient between two equal runs. If the loss is such that it varies, only an
            error that is a factor says something.
    """
    total = math.fsum(d.want for d in differences.values())
    error = relative_error(differences)
    errors = {n: _root(d.error / d.want) if d.want else (math.inf if d.error else 0.0) for n, d in differences.items()}
    # Errors that are tiny beside the whole gradient are mostly rounding.
    wrong = {
        n: e for n, e in errors.items() if e > tolerance and _root(differences[n].error) > tolerance * _root(total) / 10
    }
    worst = sorted(wrong.items(), key=lambda item: -item[1])[:_MOST_NAMES]
    loss_error = abs(loss[1] - loss[0]) / max(abs(loss[0]), 1e-12)
    problem = ""
    factor = _factor(differences, error, max(_CLOSE, tolerance))
    if varies_by > tolerance and factor is None and (error > tolerance or loss_error > tolerance):
        return Comparison(
            name=name,
            not_compared=f"the loss differs between two equal runs (the gradient by {varies_by:.1e}), perhaps because "
            "it draws random numbers for each row; to compare, let it take them from the row or draw once for all rows",
        )
    if error > tolerance or not math.isfinite(error):
        problem = _in_words(differences, len(wrong), error, factor, advice, advice_if_few or _FEW_ARE_WRONG)
    elif loss_error > tolerance:
        problem = f"the gradient is right, but the loss is off by {loss_error:.1e}; {advice(1.0)}"
    return Comparison(
        name=name,
        loss=loss,
        grad_norm=grad_norm,
        gradient_error=error,
        worst=tuple(worst),
        problem=problem,
    )


def relative_error(differences: Mapping[str, Difference]) -> float:
    """‖b − a‖ / ‖a‖ over all parameters; NaN if a is zero."""
    total = math.fsum(d.want for d in differences.values())
    return _root(math.fsum(d.error for d in differences.values()) / total) if total else math.nan


def _factor(differences: Mapping[str, Difference], error: float, close: float) -> float | None:
    """The number by which the reference is to be multiplied to give the gradient; None if it is 1 or there is none."""
    if not math.isfinite(error):
        return None
    total = math.fsum(d.want for d in differences.values())
    factor = math.fsum(d.product for d in differences.values()) / total
    residue = _root(max(0.0, error**2 - (factor - 1.0) ** 2))
    return factor if residue < close * max(1.0, abs(factor)) and abs(factor - 1.0) > close else None


def _in_words(
    differences: Mapping[str, Difference],
    num_wrong: int,
    error: float,
    factor: float | None,
    advice: Callable[[float | None], str],
    advice_if_few: str,
) -> str:
    total = math.fsum(d.want for d in differences.values())
    if not total:
        if not any(d.error for d in differences.values()):
            return NOTHING_IS_TRAINED
        return f"the gradient should be zero; {advice(None)}"
    if not math.isfinite(error):
        return "the gradient is inf or NaN on these samples; look at their labels (are all -100?) and at the loss"
    if factor is not None:
        return f"the gradient is {factor:.4g} times what it should be; {advice(factor)}"
    if num_wrong <= len(differences) / 2:
        return (
            f"the gradients of {num_wrong} of {len(differences)} parameters are wrong, the others are right; "
            f"{advice_if_few}"
        )
    return f"the gradient is off by {error:.1e}; {advice(None)}"


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
