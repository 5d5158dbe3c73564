"""The results of a head, and the promises that hold for all of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.page import short_reason
from hf_gradutils.targets.known_heads import NO_UNIT, SHARED, UNITS

WRONG = 1e-5
"""Relative error of a gradient from which on it is wrong."""


@dataclass
class Outcome:
    """The result of one Trainer with a head."""

    status: str
    """exact, wrong, refused or crashed."""
    error: float | None = None
    """Relative error of the gradient."""
    why: str = ""


@dataclass
class Measured:
    """The results of a head."""

    head: str
    not_built: str = ""
    """The class of the reason: config, model, too large, inputs, random, no gradient, time, memory."""
    why: str = ""
    inputs: str = ""
    precision: str = "float64"
    """Of the truth."""
    draws: bool = False
    """It draws random numbers in every forward."""
    error_in_float32: float | None = None
    """Where that is not below 1e-5, and the outcomes are therefore those in float64."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def status_of(measured: Measured, trainer: str) -> str:
    """Its status; unclear where the head draws random numbers that no two trainings share."""
    status = measured.outcomes[trainer].status
    return "unclear" if measured.why and status in ("exact", "wrong") else status


def kind_of(head: str) -> str:
    """The task of a head, by the end of its name."""
    match = re.search(r"For[A-Z]\w*$|LMHead\w*$|DoubleHeadsModel$|Model$|Decoder$", head)
    return match.group() if match else "other"


def broken_promises(results: Iterable[Measured]) -> list[str]:
    """A sentence for every head that is wrong, crashes where stock does not, or should have stopped and did not."""
    broken = []
    for measured in results:
        if measured.not_built:
            continue
        ours, stock = measured.outcomes["ours"], measured.outcomes["stock"]
        if ours.status == "wrong":
            broken.append(f"{measured.head} is wrong: relative error {ours.error:.1e}")
        if ours.status == "crashed" and stock.status != "crashed":
            broken.append(f"{measured.head} crashes and stock does not: {short_reason(ours.why)}")
        if measured.head in NO_UNIT and not ours.why.startswith("LossUnitError"):
            broken.append(f"{measured.head} has no unit, but is {ours.status}")
        if measured.head in SHARED and ours.status != "exact":
            broken.append(f"{measured.head} has shares in the tables, but is {ours.status}: {short_reason(ours.why)}")
        if measured.head in UNITS and ours.status != "exact":
            broken.append(f"{measured.head} has a unit in the table, but is {ours.status}: {short_reason(ours.why)}")
    return broken
