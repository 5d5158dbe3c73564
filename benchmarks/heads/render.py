"""docs/heads.md: what it shows of the results, and the page from that."""

import collections
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.heads.results import Measured, Outcome, broken_promises, kind_of, status_of
from hf_gradutils.targets.known_heads import NO_UNIT, SHARED, UNITS

STATUSES = ("exact", "refused", "wrong", "crashed", "unclear")
WIDTH = 240
"""Characters of an error message that are worth a line."""

# ---- Recorded ----


def record(results: list[Measured]) -> dict[str, Any]:
    """The data of the page."""
    built = [m for m in results if not m.not_built]
    kinds: dict[str, dict[str, dict[str, int]]] = {}
    not_built: dict[str, list[str]] = {}
    for m in built:
        of_kind = kinds.setdefault(kind_of(m.head), {"ours": {}, "stock": {}})
        for trainer, counts in of_kind.items():
            status = status_of(m, trainer)
            counts[status] = counts.get(status, 0) + 1
    for m in results:
        if m.not_built:
            not_built.setdefault(m.not_built, []).append(m.head)
    return {
        "kinds": dict(sorted(kinds.items(), key=lambda item: (-sum(item[1]["ours"].values()), item[0]))),
        "promised": {
            "no_unit": _kept(results, NO_UNIT, "refused"),
            "units": _kept(results, UNITS, "exact"),
            "shared": _kept(results, [m.head for m in built if m.head in SHARED], "exact"),
        },
        "refused": {m.head: _why(m.outcomes["ours"]) for m in built if m.outcomes["ours"].status == "refused"},
        "broken": broken_promises(results),
        "stock_crashed": {
            m.head: {"ours": _outcome(m.outcomes["ours"]), "why": _why(m.outcomes["stock"])}
            for m in built
            if m.outcomes["stock"].status == "crashed"
        },
        "in_float64": {
            m.head: {"float32": m.error_in_float32, "ours": _outcome(m.outcomes["ours"])}
            for m in built
            if m.error_in_float32 is not None
        },
        "drawing": [m.head for m in built if m.draws],
        "float32_truth": [m.head for m in built if m.precision != "float64"],
        "not_built": dict(sorted(not_built.items(), key=lambda item: -len(item[1]))),
    }


def _kept(results: list[Measured], heads: Iterable[str], wanted: str) -> dict[str, Any]:
    """How many of the heads are as wanted, and what the others are."""
    statuses = {m.head: m.not_built or m.outcomes["ours"].status for m in results}
    others = {head: statuses.get(head, "not tried") for head in heads if statuses.get(head) != wanted}
    return {"kept": len(list(heads)) - len(others), "others": others}


def _why(outcome: Outcome) -> str:
    """Without the advice that follows every reason."""
    why = re.sub(r"; (set loss_unit or count_targets|name the unit with).*", "", outcome.why, flags=re.DOTALL)
    return page.short_reason(" ".join(why.split()), WIDTH)


def _outcome(outcome: Outcome) -> str:
    return outcome.status + (f" ({outcome.error:.1e})" if outcome.error is not None else "")


# ---- The page ----


def render(data: dict[str, Any]) -> str:
    """The page."""
    kinds = data["kinds"]
    num_built = sum(sum(of_kind["ours"].values()) for of_kind in kinds.values())
    num_others = sum(map(len, data["not_built"].values()))
    return page.fill(
        Path(__file__).with_name("page.md"),
        measured=page.provenance_text(data["measured"]),
        totals=_totals(kinds),
        num_tried=num_built + num_others,
        num_built=num_built,
        num_others=num_others,
        **{name: _promise(**found) for name, found in data["promised"].items()},
        kinds=page.folded(f"{len(kinds)} kinds", _by_kind(kinds)),
        refused=_refused(data["refused"]),
        broken=page.bullets(data["broken"]),
        stock_crashed=page.bullets(
            f"`{head}`, ours {found['ours']}: {found['why']}" for head, found in data["stock_crashed"].items()
        ),
        in_float64=page.bullets(
            f"`{head}`: {found['float32']:.1e} in float32, ours {found['ours']}"
            for head, found in data["in_float64"].items()
        ),
        drawing=page.wrapped(page.code(data["drawing"])),
        float32_truth=page.folded(
            f"{len(data['float32_truth'])} heads", page.wrapped(page.code(data["float32_truth"]))
        ),
        not_built=page.folded(f"{num_others} heads", _by_reason(data["not_built"])),
    )


def _totals(kinds: dict[str, Any]) -> str:
    rows = [("", "exact", "refused with a reason", *STATUSES[2:])]
    for trainer in ("ours", "stock"):
        counts = [sum(of_kind[trainer].get(status, 0) for of_kind in kinds.values()) for status in STATUSES]
        rows.append((trainer, *counts))
    return page.table(rows)


def _promise(kept: int, others: dict[str, str]) -> str:
    rest = ", ".join(f"`{head}` is {status}" for head, status in others.items())
    return f"{kept} of the {kept + len(others)}" + (f" ({rest})" if rest else "")


def _by_kind(kinds: dict[str, Any]) -> str:
    ours, stock = STATUSES[:4], ("exact", "wrong", "crashed", "unclear")
    rows = [("kind", "heads", "ours exact", *ours[1:], "stock exact", *stock[1:])]
    for kind, found in kinds.items():
        counts = [found["ours"].get(s, 0) for s in ours] + [found["stock"].get(s, 0) for s in stock]
        rows.append((kind, sum(found["ours"].values()), *counts))
    return page.table(rows)


def _refused(reasons: dict[str, str]) -> str:
    """Heads by what is left of their reason without their name."""
    heads = collections.defaultdict(list)
    for head, why in reasons.items():
        heads[re.sub(rf"^LossUnitError: (the loss cannot be split exactly: {head}: )?", "", why)].append(head)
    return _by_reason(heads)


def _by_reason(heads: dict[str, list[str]]) -> str:
    return page.bullets(f"{reason} ({len(names)}): {page.code(names)}" for reason, names in heads.items())
