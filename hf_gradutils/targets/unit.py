"""Find the unit of a loss on the first batch, the same on all ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets.counter import TargetCounter, check_count
from hf_gradutils.targets.probe import (
    HOW_TO_FIX,
    TOLERANCE,
    TOLERANCE_REDUCED,
    UNCHECKED,
    LossOf,
    check_additivity,
    loss_ignores_first_position,
)


@dataclass(frozen=True, slots=True)
class Settled:
    """Findings on the first batch, the same on every rank."""

    head_shifts: bool
    """Position 0 of each row is no target; False if the count does not depend on it."""
    targets_per_micro_batch: float
    """Mean over the ranks."""


def settle_unit(
    head_loss_of: LossOf,
    loss_of: Callable[[Mapping[str, Any], TargetCounter], Tensor],
    batch: Mapping[str, Any],
    counter: TargetCounter,
    *,
    check: bool,
    exact_arithmetic: bool,
    smooths_labels: bool = False,
    num_blocks: int = 1,
) -> Settled:
    """Find out if the head shifts, and check that the loss is a mean over the targets counted.

    Args:
        head_loss_of: The loss of the head itself, to probe its shift. Called under :func:`undisturbed`.
        loss_of: (batch, its counter) → the loss that is trained. Called under :func:`undisturbed`.
        batch: This rank's first micro-batch.
        counter: From the user or the table of known heads.
        check: Verify additivity.
        exact_arithmetic: float32 or better, without autocast or TF32.
        smooths_labels: Probe the shift for any counter, because label smoothing has to shift like the head.
        num_blocks: As in :mod:`hf_gradutils.targets.rows`.

    Collectives: two all-reduces over all ranks, before the first forward and after the last: every rank learns of each
        failure, and none waits in a forward that another does not enter. Host syncs: one per forward, one to choose
        the parts, and one per all-reduce.

    Raises:
        TargetCountError: some rank cannot count its targets.
        LossUnitError: the loss is not additive on some rank, or ranks disagree about the shift.
    """
    domain = world_domain()
    failure: TargetCountError | None = None
    try:
        counter(batch)
    except TargetCountError as error:
        failure = error
    num_failures = add_up(domain, failed=failure is not None)["failed"]
    if failure is not None:
        raise failure
    if num_failures:
        raise TargetCountError(
            f"{num_failures:.0f} of {domain.num_ranks} ranks cannot count the targets of their first batch"
        )

    may_shift = (TargetCounter() if smooths_labels else counter).depends_on_shift(batch)
    shifts = may_shift and loss_ignores_first_position(head_loss_of, batch)
    settled = replace(counter, head_shifts=shifts)
    additivity = UNCHECKED
    if check:
        additivity = check_additivity(
            lambda part: loss_of(part, settled),
            batch,
            settled,
            num_blocks=num_blocks,
            exact_arithmetic=exact_arithmetic,
        )
    is_wrong = additivity.relative_error > (TOLERANCE if exact_arithmetic else TOLERANCE_REDUCED)
    ranks = add_up(domain, shifting=shifts, wrong=is_wrong, targets=float(settled(batch)))
    check_count(ranks["targets"])

    if ranks["shifting"] not in (0, domain.num_ranks):
        raise LossUnitError(
            f"the head shifts its labels on {ranks['shifting']:.0f} of {domain.num_ranks} ranks, not on all or none; "
            "set loss_unit='tokens' or 'shifted_tokens'"
        )
    if ranks["wrong"]:
        seen = (
            f"L(AB)·n(AB) = {additivity.whole:.7g} but L(A)·n(A) + L(B)·n(B) = {sum(additivity.parts):.7g}, relative "
            f"difference {additivity.relative_error:.1e}"
            if is_wrong
            else f"seen on {ranks['wrong']:.0f} of {domain.num_ranks} ranks"
        )
        source = f"loss_unit={counter.loss_unit!r}"
        if counter.count is not None:
            source = f"count_targets={getattr(counter.count, '__name__', repr(counter.count))}"
        raise LossUnitError(f"the loss is not a mean over the targets counted ({source}): {seen}; {HOW_TO_FIX}")
    return Settled(head_shifts=shifts, targets_per_micro_batch=ranks["targets"] / domain.num_ranks)
