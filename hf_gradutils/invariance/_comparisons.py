"""The rows of a report: what a check measures and compares.

1 against many          the same samples as one micro-batch and as one per sample, in the layout that trains
layout against 1 rank   the latter against one process of the stock Trainer with all samples as one micro-batch; on
                        rank 0, with the whole model and, if memory allows, in float64
copies                  parameters that ranks hold copies of are the same
passes                  both passes of a loss of the whole batch draw the same dropout masks
"""

import torch
from torch import nn

from hf_gradutils._collectives import world_domain
from hf_gradutils.errors import GradUtilsError, LossUnitError, ReplicaMismatchError
from hf_gradutils.gradients.names import unwrapped_name
from hf_gradutils.gradients.of_model import in_layout_of
from hf_gradutils.gradients.plan import plan_by_name
from hf_gradutils.invariance._as_before import with_dropout
from hf_gradutils.invariance._deepspeed import dry_step_of
from hf_gradutils.invariance._reference import Measured, differences_from, one_process
from hf_gradutils.invariance._report import (
    NOTHING_IS_TRAINED,
    Comparison,
    Difference,
    compare_gradients,
    relative_error,
)
from hf_gradutils.invariance._subjects import Rows, Subject
from hf_gradutils.invariance._whole_model import MakeModel
from hf_gradutils.sync import discard_deferred
from hf_gradutils.upstream.torch import trained_parameters

_TIMES_ROUNDING = 8
"""How many times the rounding of one process a loss of the whole batch may be off; XCLIPModel is 4 times."""
_LARGEST_TOLERANCE = 1e-3
"""Beyond it a loss is too coarse in float32 to be compared."""
_IS_WHOLE = "a step has one micro-batch on each rank here (gradient_accumulation_steps=1); with more "


def compare_all(
    subject: Subject, rows: Rows, own: Rows, tolerance: float, make_model: MakeModel | None
) -> tuple[list[Comparison], float]:
    """All comparisons, and the tolerance that they took; those of rank 0 are complete."""
    copies, cannot_split = _compare_copies(subject.model), ""
    try:
        one = _measure(subject, [own], seed=0)
        again = _measure(subject, [own], seed=1)
        try:
            many = _measure(subject, [[row] for row in own], seed=0)
        except LossUnitError as error:
            if subject.is_split:
                raise
            many, cannot_split = one, str(error)
        passes = [] if cannot_split else _compare_passes(subject, own)
    except (GradUtilsError, RuntimeError) as error:
        if not isinstance(error, GradUtilsError) and "does not require grad" not in str(error):
            raise
        problem = str(error) if isinstance(error, GradUtilsError) else f"{NOTHING_IS_TRAINED}: {error}"
        return [copies, Comparison(name="training step", problem=problem)], tolerance
    differences, varies_by = one.differences(many), relative_error(one.differences(again))
    truth = one_process(subject, rows, seed=0, make_model=make_model)
    if not isinstance(truth, str):
        tolerance = max(tolerance, min(_TIMES_ROUNDING * truth.rounding, _LARGEST_TOLERANCE))

    def compare(name: str, differences: dict[str, Difference], want: Measured, got: Measured) -> Comparison:
        return compare_gradients(
            name,
            differences,
            loss=(want.loss, got.loss),
            grad_norm=(want.norm, got.norm),
            tolerance=tolerance,
            advice=subject.advice,
            advice_if_few=subject.advice_if_few_are_wrong(),
            varies_by=varies_by,
        )

    name = f"{len(own)} micro-batches against 1"
    parts = compare(name, differences, one, many)
    if not subject.is_split and (cannot_split or not parts.passed):
        parts, many = Comparison(name=name, not_compared=_IS_WHOLE + (cannot_split or parts.problem)), one
    name = "this layout against one process"
    if isinstance(truth, str):
        layout = Comparison(name=name, not_compared=truth)
    else:
        layout = compare(name, differences_from(truth, many), truth, many)
    return [copies, parts, layout, *passes], tolerance


def _measure(subject: Subject, parts: list[Rows], seed: int) -> Measured:
    step = dry_step_of(subject.model)
    if step is not None:
        return Measured.of(*step.measure(lambda: subject.run(parts, seed)))
    loss = subject.run(parts, seed)
    gradients = {}
    for name, p in subject.model.named_parameters():
        if p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else in_layout_of(p, p.grad)
            gradients[unwrapped_name(name)] = gradient.detach().clone()
    measured = Measured.of(loss, gradients)
    discard_deferred(subject.model)
    return measured


def _compare_passes(subject: Subject, own: Rows) -> list[Comparison]:
    """Run a window with dropout, if its loss takes two passes: both must draw the same."""
    if not subject.has_two_passes:
        return []
    problem = ""
    try:
        with with_dropout(subject.model):
            subject.run([own, own], seed=0)
    except LossUnitError as error:
        problem = str(error)
    discard_deferred(subject.model)
    return [Comparison(name="dropout in both passes", problem=problem)]


def _compare_copies(model: nn.Module) -> Comparison:
    """Compare the checksums of replicas."""
    problem = ""
    try:
        plan_by_name(model, trained_parameters(model), world_domain(), {})  # not cached: replicas may drift apart
    except ReplicaMismatchError as error:
        problem = str(error)
    return Comparison(name="copies of parameters", problem=problem)
