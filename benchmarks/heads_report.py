"""What comes of a head in ``heads_sweep.py``, and what comes of all of them as Markdown."""

import collections
import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import accelerate
import torch
import transformers

import hf_gradutils
from hf_gradutils.targets.known_heads import NO_UNIT, UNITS


@dataclass
class Outcome:
    """What one Trainer made of a head."""

    status: str
    """exact, wrong, refused or crashed."""
    error: float | None = None
    """Relative error of the gradient."""
    why: str = ""


@dataclass
class Measured:
    """What came of a head."""

    head: str
    not_built: str = ""
    """The class of the reason: config, model, too large, inputs, random, no gradient, time, memory."""
    why: str = ""
    inputs: str = ""
    precision: str = "float64"
    """Of the truth."""
    error_in_float32: float | None = None
    """Where that is not below 1e-5, and the outcomes are therefore those in float64."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)


_WIDTH = 240
"""Characters of an error message that are worth a line."""


def status_of(measured: Measured, trainer: str) -> str:
    """Its status; unclear where the head draws random numbers, which no two trainings share."""
    status = measured.outcomes[trainer].status
    return "unclear" if measured.why and status in ("exact", "wrong") else status


def kind_of(head: str) -> str:
    """What a head is for, by the end of its name."""
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
            broken.append(f"{measured.head} crashes and stock does not: {_short(ours.why)}")
        if measured.head in NO_UNIT and not ours.why.startswith("LossUnitError"):
            broken.append(f"{measured.head} has no unit, but is {ours.status}")
        if measured.head in UNITS and ours.status != "exact":
            broken.append(f"{measured.head} has a unit in the table, but is {ours.status}: {_short(ours.why)}")
    return broken


def report(results: list[Measured], seed: int, command: str) -> str:
    """The whole file."""
    built = [measured for measured in results if not measured.not_built]
    sections = [
        "# Every head of transformers, ours beside the stock Trainer",
        f"Written by `{command}` on {datetime.date.today()}, with torch {torch.__version__}, transformers "
        f"{transformers.__version__}, accelerate {accelerate.__version__} and hf_gradutils {hf_gradutils.__version__}. "
        f"The seed of the data, {seed}, is drawn afresh on every call without it.",
        "Each public head is built tiny and trained for one optimizer step on one process, in float32 on CPU: 4 "
        "micro-batches of 4 rows with ragged targets, and no setting by the user. The truth is the gradient of the "
        "head's own loss for all 16 rows at once, in float64 unless it is listed below. *Exact* is a relative "
        "error of the gradient below 1e-5. Dropout, other noise and the auxiliary losses of mixtures of experts are "
        "off; batch normalisation, which couples rows, is in evaluation mode. Vision-language heads got text alone "
        "where they take it. Micro-batches have equally "
        "many rows, so that stock's mean of means is exact here for a head that averages over rows and gets no count.",
        "## Totals",
        _totals(built),
        "Stock is *unclear* where a head draws random numbers in every forward: no two trainings draw the same. "
        f"{len(results)} heads were tried, {len(built)} could be built and measured, {len(results) - len(built)} could "
        "not and are listed at the end.",
        "## What is promised",
        _promises(results),
        "## By kind of head",
        _by_kind(built),
        "## Refused by ours",
        "A head without a unit stops on the first batch and says why, instead of training on another objective.",
        _refused(built),
        "## Wrong, or crashing where stock does not",
        _list(broken_promises(results)) or "None.",
        "## Crashing with stock",
        _list(
            f"`{measured.head}`, ours {_outcome(measured.outcomes['ours'])}: {_short(measured.outcomes['stock'].why)}"
            for measured in built
            if measured.outcomes["stock"].status == "crashed"
        )
        or "None.",
        "## Measured in float64",
        "In float32, which is off by the number given, rounding alone or a matching of boxes that it decides "
        "otherwise takes their gradients further from the truth than 1e-5.",
        _list(
            f"`{measured.head}`: {measured.error_in_float32:.1e} in float32, ours {_outcome(measured.outcomes['ours'])}"
            for measured in built
            if measured.error_in_float32 is not None
        )
        or "None.",
        "## Whose truth is in float32",
        "They do not run in float64, or not with a finite gradient.",
        ", ".join(f"`{measured.head}`" for measured in built if measured.precision != "float64") or "None.",
        "## Not measured",
        "These could not be built, or not be given data, automatically; nothing is known of them from here.",
        _not_built(results),
    ]
    return "\n\n".join(sections) + "\n"


def _totals(built: list[Measured]) -> str:
    lines = ["| | exact | refused with a reason | wrong | crashed | unclear |", "|---|---|---|---|---|---|"]
    for name in ("ours", "stock"):
        counts = collections.Counter(status_of(measured, name) for measured in built)
        cells = [counts[status] for status in ("exact", "refused", "wrong", "crashed", "unclear")]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _promises(results: list[Measured]) -> str:
    statuses = {m.head: m.not_built or m.outcomes["ours"].status for m in results}
    lines = []
    for what, names in (
        ("whose loss is known to be no mean over anything countable stop with LossUnitError", NO_UNIT),
        ("whose unit the labels do not tell are exact with the one from the table", UNITS),
    ):
        wanted = "refused" if names is NO_UNIT else "exact"
        kept = [name for name in names if statuses.get(name) == wanted]
        others = [f"`{name}` ({statuses.get(name, 'not tried')})" for name in names if name not in kept]
        rest = f"; not {', '.join(others)}" if others else ""
        lines.append(f"{len(kept)} of the {len(names)} heads {what}{rest}.")
    return _list(lines)


def _by_kind(built: list[Measured]) -> str:
    kinds = collections.defaultdict(list)
    for measured in built:
        kinds[kind_of(measured.head)].append(measured)
    lines = [
        "| kind | heads | ours exact | refused | wrong | crashed | stock exact | wrong | crashed | unclear |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, heads in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        ours, stock = (
            collections.Counter(status_of(measured, name) for measured in heads) for name in ("ours", "stock")
        )
        cells = [len(heads), *(ours[s] for s in ("exact", "refused", "wrong", "crashed"))]
        cells += [stock[s] for s in ("exact", "wrong", "crashed", "unclear")]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _refused(built: list[Measured]) -> str:
    refused = [measured for measured in built if measured.outcomes["ours"].status == "refused"]
    return _list(f"`{m.head}`: {_short(_reason(m.outcomes['ours'].why))}" for m in refused) or "None."


def _reason(why: str) -> str:
    """Without the advice that follows every reason."""
    return re.sub(r"; (set loss_unit or count_targets|name the unit with).*", "", why, flags=re.DOTALL)


def _outcome(outcome: Outcome) -> str:
    return outcome.status + (f" ({outcome.error:.1e})" if outcome.error is not None else "")


def _not_built(results: list[Measured]) -> str:
    reasons = collections.defaultdict(list)
    for measured in results:
        if measured.not_built:
            reasons[measured.not_built].append(measured)
    return _list(
        f"{reason} ({len(heads)}): {', '.join(f'`{measured.head}`' for measured in heads)}"
        for reason, heads in sorted(reasons.items(), key=lambda item: -len(item[1]))
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[:_WIDTH].rstrip() + "…"
