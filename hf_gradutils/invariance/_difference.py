"""The difference of two gradients as a row of the report: its size, and what it is in words."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hf_gradutils.invariance._report import Comparison

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


def compare_gradients(
    name: str,
    differences: Mapping[str, Difference],
    *,
    loss: tuple[float, float],
    grad_norm: tuple[float, float],
    tolerance: float,
    advice: Callable[[float | None], str],
    advice_if_few: str = "",
    cause: Callable[[float], str] = lambda scale: "",
    varies_by: float = 0.0,
    decides: bool = True,
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
        cause: The cause in a few words; empty if unknown. Of the multiple of the reference next to the gradient.
        varies_by: Relative error of the gradient between two equal runs. If the loss is such that it varies, only an
            error that is a factor says something.
        decides: As in the row.
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
    problem = summary = ""
    factor = _factor(differences, error, max(_CLOSE, tolerance))
    if varies_by > tolerance and factor is None and (error > tolerance or loss_error > tolerance):
        return Comparison(
            name=name,
            not_compared=f"the loss differs between two equal runs (the gradient by {varies_by:.1e}), perhaps because "
            "it draws random numbers for each row; to compare, let it take them from the row or draw once for all rows",
            decides=decides,
        )
    if error > tolerance or not math.isfinite(error):
        problem, summary = _in_words(differences, len(wrong), error, factor)
        few = factor is None and math.isfinite(error) and total and len(wrong) <= len(differences) / 2
        if total and math.isfinite(error) and not few:
            why = cause(math.fsum(d.product for d in differences.values()) / total)
            summary += f": {why}" if why else ""
        if few:
            problem += f"; {advice_if_few or _FEW_ARE_WRONG}"
        elif problem.startswith("the gradient") and "NaN" not in problem:
            problem += f"; {advice(factor)}"
    elif loss_error > tolerance:
        summary = f"the gradient is right, but the loss is off by {loss_error:.1e}"
        problem = f"{summary}; {advice(1.0)}"
    return Comparison(
        name=name,
        loss=loss,
        grad_norm=grad_norm,
        gradient_error=error,
        worst=tuple(worst),
        problem=problem,
        summary=summary,
        factor=math.nan if factor is None else factor,
        decides=decides,
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
    differences: Mapping[str, Difference], num_wrong: int, error: float, factor: float | None
) -> tuple[str, str]:
    """The error, for the row and for the first line of the report."""
    total = math.fsum(d.want for d in differences.values())
    if not total:
        if not any(d.error for d in differences.values()):
            return NOTHING_IS_TRAINED, NOTHING_IS_TRAINED.partition(". ")[0]
        return "the gradient should be zero", "the gradient of one batch is zero, and this one is not"
    if not math.isfinite(error):
        problem = "the gradient is inf or NaN on these samples; look at their labels (are all -100?) and at the loss"
        return problem, problem
    if factor is not None:
        problem = f"the gradient is {factor:.4g} times what it should be"
        digits = f"{factor:.1f}" if abs(factor) >= 1 else f"{factor:.3g}"
        return problem, f"the gradient is {digits} times what one batch would give"
    if num_wrong <= len(differences) / 2:
        problem = f"the gradients of {num_wrong} of {len(differences)} parameters are wrong, the others are right"
        return problem, problem
    scale = math.fsum(d.product for d in differences.values()) / total
    about = f", about {scale:.1f} times what one batch would give" if scale > 1.5 else ""
    percent = f"{100 * error:.2g}%" if error < 1 else f"{error:.1e} times its size"
    return f"the gradient is off by {error:.1e}", f"the gradient is off by {percent}{about}"


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
