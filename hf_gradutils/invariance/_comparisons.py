"""The rows of a report: what a check measures and compares.

copies                  parameters that ranks hold copies of are the same
as you train            the training's own number of micro-batches and its ranks against one process of the stock
                        Trainer with all samples as one micro-batch; on rank 0, with the whole model and, if memory
                        allows, in float64
n against 1             the same samples as one micro-batch and as one per sample, in the layout that trains
layout against 1 rank   one per sample against one process
passes                  both passes of a loss of the whole batch draw the same dropout masks
batch normalisation     not compared: it depends on the cut

The second decides, with copies and passes; the next two do as well where the claim is that every cut is exact.
All run in training mode if two windows with other seeds agree in it, else in evaluation mode.
"""

import torch
from torch import nn

from hf_gradutils._collectives import world_domain
from hf_gradutils._undisturbed import buffers_kept
from hf_gradutils.errors import GradUtilsError, InvarianceError, LossUnitError, ReplicaMismatchError
from hf_gradutils.gradients.names import unwrapped_name
from hf_gradutils.gradients.of_model import in_layout_of
from hf_gradutils.gradients.plan import plan_by_name
from hf_gradutils.invariance._agreement import from_first_rank, on_all_ranks, on_any_rank
from hf_gradutils.invariance._deepspeed import dry_step_of
from hf_gradutils.invariance._difference import NOTHING_IS_TRAINED, compare_gradients, relative_error
from hf_gradutils.invariance._modes import evaluate, modes_now, train_as, uses_batch_statistics, with_dropout
from hf_gradutils.invariance._reference import Measured, differences_from, one_process
from hf_gradutils.invariance._report import BATCH_NORMALISATION, Comparison, count, micro_batches
from hf_gradutils.invariance._subjects import Rows, Subject
from hf_gradutils.invariance._whole_model import MakeModel
from hf_gradutils.sync import discard_deferred
from hf_gradutils.upstream.torch import trained_parameters

_TIMES_ROUNDING = 8
"""How many times the rounding of one process a loss of the whole batch may be off; XCLIPModel is 4 times."""
_LARGEST_TOLERANCE = 1e-3
"""Beyond it a loss is too coarse in float32 to be compared."""
_LARGEST_IF_ROUNDED = 0.25
"""The same in half precision."""
_MOST_ALIKE = 1e-3
"""Relative error between two windows beyond which random numbers are drawn; in rounded arithmetic, atomics are less."""
_IN_EVALUATION = "in evaluation mode: the model draws random numbers in training"
_PER_MICRO_BATCH = (
    "in training its statistics are those of a micro-batch, so the gradient depends on how the batch is cut up; the "
    "other rows have it in evaluation mode"
)
_IS_WHOLE = "a step has one micro-batch on each rank here (gradient_accumulation_steps=1); with more "


def compare_all(
    subject: Subject, rows: Rows, own: Rows, tolerance: float, make_model: MakeModel | None
) -> tuple[list[Comparison], float, str]:
    """All comparisons, the tolerance that they took, and a word on the mode; those of rank 0 are complete."""
    copies, cannot_split, mode = _compare_copies(subject.model), "", ""
    num_parts = parts_of(subject, len(own))
    try:
        pair = _measure_in_training(subject, own, tolerance)
        mode = "" if pair else _IN_EVALUATION
        one, again = pair or (_measure(subject, [own], seed=0), _measure(subject, [own], seed=1))
        trained = one if num_parts == 1 else _measure_or_refuse(subject, _cut(own, num_parts))
        try:
            if num_parts == len(own) and isinstance(trained, Measured):
                many = trained
            else:
                many = _measure(subject, [[row] for row in own], seed=0)
        except LossUnitError as error:
            if subject.is_split:
                raise
            many, cannot_split = one, str(error)
        passes = [] if cannot_split else _compare_passes(subject, own)
    except InvarianceError:  # of another rank, which has left
        raise
    except (GradUtilsError, RuntimeError) as error:
        if not isinstance(error, GradUtilsError) and "does not require grad" not in str(error):
            raise
        problem = str(error) if isinstance(error, GradUtilsError) else f"{NOTHING_IS_TRAINED}: {error}"
        return [copies, Comparison(name="training step", problem=problem)], tolerance, mode
    varies_by = relative_error(one.differences(again))
    truth = one_process(subject, rows, seed=0, make_model=make_model)
    if not isinstance(truth, str) and from_first_rank(truth.norm == 0) and one.norm > 0:
        truth = "the loss reaches the trained model by a way of its own, and not the copy that one process trains"
    if not isinstance(truth, str):
        times, largest = (_TIMES_ROUNDING, _LARGEST_TOLERANCE) if subject.is_exact else (2, _LARGEST_IF_ROUNDED)
        tolerance = max(tolerance, min(times * truth.rounding, largest))

    def compare(name: str, want: Measured, got: Measured, num_parts: int, *, decides: bool = True) -> Comparison:
        differences = differences_from(want, got) if want is truth else want.differences(got)
        return on_all_ranks(
            lambda: compare_gradients(
                name,
                differences,
                loss=(want.loss, got.loss),
                grad_norm=(want.norm, got.norm),
                tolerance=tolerance,
                advice=subject.advice,
                advice_if_few=subject.advice_if_few_are_wrong(),
                cause=lambda scale: subject.cause(scale, num_parts),
                varies_by=varies_by,
                decides=decides,
            )
        )

    name = _name_of_training(subject, num_parts)
    if isinstance(trained, str):
        training = Comparison(name=name, problem=trained)
    elif num_parts * subject.num_data_ranks == 1 and not subject.every_cut_decides:
        training = compare(name, one, one, 1)  # nothing is split
    elif not isinstance(truth, str):
        training = compare(name, truth, trained, num_parts)
    elif num_parts > 1:
        training = compare(f"{name}, against 1 on each", one, trained, num_parts)
        if training.passed and subject.num_data_ranks > 1:  # each rank agrees with itself; nothing compares the ranks
            training = Comparison(name=name, not_compared=truth)
    else:
        training = Comparison(name=name, not_compared=truth)
    every = subject.every_cut_decides
    name = f"{len(own)} micro-batches against 1"
    parts = compare(name, one, many, len(own), decides=every)
    if not subject.is_split and (cannot_split or not parts.passed):
        parts, many = Comparison(name=name, not_compared=_IS_WHOLE + (cannot_split or parts.problem)), one
    name = "this layout against one process"
    if isinstance(truth, str):
        layout = Comparison(name=name, not_compared=truth, decides=every)
    else:
        layout = compare(name, truth, many, len(own), decides=every)
    return [copies, training, parts, layout, *passes, *_batch_normalisation(subject, num_parts)], tolerance, mode


def describe(subject: Subject, num_rows: int, *, few: str = "") -> str:
    """The layout, the samples and the arithmetic; ``few``: why there are so few samples."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in subject.model.parameters()})
    rounds = "" if subject.is_exact else ", rounded arithmetic"
    ranks = "1 rank"
    if subject.num_ranks > 1:
        ranks = f"{subject.num_ranks} ranks, {subject.num_data_ranks} of them with data of their own"
    return (
        f"{num_rows} samples{few and f' ({few})'}, {ranks}, {type(subject.model).__name__}, {'/'.join(kinds)}{rounds}"
    )


def parts_of(subject: Subject, num_rows: int) -> int:
    """Micro-batches of each rank in the row of the training's own settings, for so many rows of each rank."""
    return min(subject.accumulation, num_rows)


def _name_of_training(subject: Subject, num_parts: int) -> str:
    parts = micro_batches(num_parts, subject.accumulation)
    return f"{subject.setting}{parts} on {count(subject.num_ranks, 'rank')}"


def _cut(rows: Rows, num_parts: int) -> list[Rows]:
    size = len(rows) // num_parts
    return [rows[start : start + size] for start in range(0, size * num_parts, size)]


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


def _measure_in_training(subject: Subject, own: Rows, tolerance: float) -> tuple[Measured, Measured] | None:
    """Measure one micro-batch with two seeds in training mode, and stay in it; None if its gradients are not alike.

    Then the model is in evaluation mode as before. Collectives: one gather of objects besides those of the windows.
    """
    in_evaluation = modes_now(subject.model)
    train_as(subject.model, subject.training_modes)
    try:
        one, again = _measure(subject, [own], seed=0), _measure(subject, [own], seed=1)
        draws = on_any_rank(relative_error(one.differences(again)) > min(tolerance, _MOST_ALIKE))
    except LossUnitError:  # of all ranks; random numbers may be why, else it comes in evaluation mode again
        draws = True
    if not draws:
        return one, again
    evaluate(subject.model, in_evaluation)
    return None


def _batch_normalisation(subject: Subject, num_parts: int) -> list[Comparison]:
    if num_parts * subject.num_data_ranks == 1 or not uses_batch_statistics(subject.training_modes):
        return []
    return [Comparison(name=BATCH_NORMALISATION, not_compared=_PER_MICRO_BATCH, decides=False)]


def _measure_or_refuse(subject: Subject, parts: list[Rows]) -> Measured | str:
    """The same, or why our own package has stopped it, as it does on all ranks alike."""
    try:
        return _measure(subject, parts, seed=0)
    except LossUnitError as error:
        return str(error)


def _compare_passes(subject: Subject, own: Rows) -> list[Comparison]:
    """Run a window with dropout, if its loss takes two passes: both must draw the same."""
    if not subject.has_two_passes:
        return []
    problem = ""
    try:
        with buffers_kept(subject.model), with_dropout(subject.model):
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
