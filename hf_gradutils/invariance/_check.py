"""Checks, on the user's own samples, that the gradient does not depend on how the batch is cut up and spread.

1 against many          the same samples as one micro-batch and as one per sample, in the layout that trains
layout against 1 rank   the latter against one process of the stock Trainer with all samples as one micro-batch; on
                        rank 0, with the whole model and, if memory allows, in float64
copies                  parameters that ranks hold copies of are the same
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from hf_gradutils._collectives import world_domain
from hf_gradutils._undisturbed import random_states_kept
from hf_gradutils.errors import GradUtilsError, InvalidArgumentError, InvarianceError, ReplicaMismatchError
from hf_gradutils.gradients.names import unwrapped_name
from hf_gradutils.gradients.of_model import in_layout_of
from hf_gradutils.gradients.plan import plan_by_name
from hf_gradutils.invariance._as_before import attributes_kept
from hf_gradutils.invariance._deepspeed import dry_step_of
from hf_gradutils.invariance._reference import Measured, differences_from, from_first_rank, one_process
from hf_gradutils.invariance._report import (
    NOTHING_IS_TRAINED,
    Comparison,
    Difference,
    InvarianceReport,
    compare_gradients,
    relative_error,
)
from hf_gradutils.invariance._subjects import (
    AcceleratorLoop,
    LossAndTargets,
    Rows,
    RunWindow,
    Subject,
    TorchLoop,
    describe,
)
from hf_gradutils.invariance._trainer_subject import TrainerSubject
from hf_gradutils.invariance._whole_model import MakeModel
from hf_gradutils.sync import discard_deferred
from hf_gradutils.upstream.deepspeed import drop_hooks, is_engine, why_not_measured
from hf_gradutils.upstream.torch import trained_parameters

logger = logging.getLogger("hf_gradutils.invariance")

ROUNDED_TOLERANCE = 5e-2
"""Largest relative error in bf16, fp16 or TF32, where the cut of a batch changes the rounding of its gradient."""


def check_invariance(
    trainer: Any, num_samples: int = 16, tolerance: float = 1e-5, *, make_model: MakeModel | None = None
) -> InvarianceReport:
    """Compare a Trainer's gradient with that of one process and the whole batch, before training.

    Runs samples of the Trainer's own dataset through its own ``training_step``, in its own layout, without dropout.
    Model, optimizer, random states, data order and memory are as before afterwards; a model that accelerate shards in
    place stays sharded.

    Args:
        trainer: Ours, or any ``transformers.Trainer``, whose errors it then shows.
        num_samples: Raised to two per data rank.
        tolerance: Largest relative error of gradient and loss; bf16, fp16 and TF32 allow :data:`ROUNDED_TOLERANCE`.
        make_model: Makes the whole model, if it is sharded and has no configuration to build it from.

    Returns:
        The report, the same on all ranks.

    Collectives: many; every rank must call. Memory: the whole model and its gradient on rank 0, in float64 if that
        fits.

    Raises:
        InvalidArgumentError: the dataset has too few samples.
    """
    if isinstance(trainer, Accelerator) or not hasattr(trainer, "training_step"):
        raise InvalidArgumentError(
            f"trainer must be a Trainer, got {type(trainer).__name__}; for a loop with an Accelerator call "
            "check_loop_invariance"
        )

    def check() -> InvarianceReport:
        return _check(TrainerSubject(trainer), num_samples, tolerance, make_model)

    if trainer.is_in_train:
        return check()
    probe = _Probe(check)
    callbacks = trainer.callback_handler.callbacks
    trainer.callback_handler.callbacks = [probe]
    try:
        with attributes_kept(trainer, trainer.args), random_states_kept(trainer.args.device):
            trainer.train()
    except _CheckIsDone:
        pass
    finally:
        trainer.callback_handler.callbacks = callbacks
        trainer.accelerator.free_memory()
        drop_hooks(trainer.model)
    assert probe.report is not None
    return probe.report


def check_loop_invariance(
    accelerator: Accelerator,
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[Rows], Any],
    loss_and_targets: LossAndTargets,
    *,
    num_samples: int = 16,
    tolerance: float = 1e-5,
    make_model: MakeModel | None = None,
) -> InvarianceReport:
    """:func:`check_invariance` for a loop with an Accelerator.

    Args:
        accelerator: Ours, or accelerate's, whose errors it then shows.
        model: Prepared.
        rows: The dataset; the same on all ranks.
        collate: Rows → batch.
        loss_and_targets: (model, batch) → the micro-batch's own mean loss, and its number of targets. With DeepSpeed
            and our Accelerator it is called once more for each micro-batch, because targets are counted first.
        num_samples: As in :func:`check_invariance`.
        tolerance: As in :func:`check_invariance`.
        make_model: As in :func:`check_invariance`.
    """
    subject = AcceleratorLoop(model, rows, collate, loss_and_targets, accelerator)
    return _check(subject, num_samples, tolerance, make_model)


def check_window_invariance(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[Rows], Any],
    run_window: RunWindow,
    loss_and_targets: LossAndTargets,
    *,
    num_samples: int = 16,
    tolerance: float = 1e-5,
    make_model: MakeModel | None = None,
) -> InvarianceReport:
    """:func:`check_invariance` for a loop of plain torch, on one process or data parallelism of any kind.

    Args:
        model: As it is trained: DDP, ``fully_shard``, or plain.
        rows: As in :func:`check_loop_invariance`.
        collate: As in :func:`check_loop_invariance`.
        run_window: This rank's micro-batches → the loss of the window over all ranks. Leaves the gradient of the
            optimizer step in ``.grad``, and takes no step. With an engine of DeepSpeed it calls ``engine.step``, which
            takes none here.
        loss_and_targets: As in :func:`check_loop_invariance`.
        num_samples: As in :func:`check_invariance`.
        tolerance: As in :func:`check_invariance`.
        make_model: As in :func:`check_invariance`.
    """
    subject = TorchLoop(model, rows, collate, loss_and_targets, run_window)
    return _check(subject, num_samples, tolerance, make_model)


class _CheckIsDone(Exception):  # noqa: N818 - no error
    """Ends a ``train`` started for a check."""


class _Probe(TrainerCallback):  # type: ignore[misc]
    """Runs a check once a Trainer is ready to train."""

    def __init__(self, check: Callable[[], InvarianceReport]):
        self._check = check
        self.report: InvarianceReport | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.report = self._check()
        raise _CheckIsDone


class CheckBeforeTraining(TrainerCallback):  # type: ignore[misc]
    """Checks a Trainer at the start of ``train``, and stops it if it is not exact."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        report = check_invariance(self._trainer)
        if self._trainer.is_world_process_zero():
            logger.log(logging.INFO if report.passed else logging.WARNING, "%s", report)
        if report.verdict == "FAILED":  # a loss that cannot be compared may be right
            raise InvarianceError(str(report), report=report)


def _check(subject: Subject, num_samples: int, tolerance: float, make_model: MakeModel | None) -> InvarianceReport:
    if not num_samples >= 1:
        raise InvalidArgumentError(f"num_samples must be ≥ 1, got {num_samples}")
    if not tolerance > 0:
        raise InvalidArgumentError(f"tolerance must be > 0, got {tolerance}")
    if not subject.is_exact:
        tolerance = max(tolerance, ROUNDED_TOLERANCE)
    per_rank = max(2, -(-num_samples // subject.num_data_ranks))
    rows = subject.rows(per_rank * subject.num_data_ranks)
    reason = why_not_measured(subject.model) if is_engine(subject.model) else ""
    if reason:
        row = Comparison(name="gradients", not_compared=reason)
        return InvarianceReport((row,), tolerance, describe(subject, len(rows)))
    own = rows[subject.data_rank * per_rank : (subject.data_rank + 1) * per_rank]
    with subject.as_it_was():
        comparisons = _compare(subject, rows, own, tolerance, make_model)
    return from_first_rank(InvarianceReport(tuple(comparisons), tolerance, describe(subject, len(rows))))


def _compare(
    subject: Subject, rows: Rows, own: Rows, tolerance: float, make_model: MakeModel | None
) -> list[Comparison]:
    """All comparisons; those of rank 0 are complete."""
    comparisons = [_compare_copies(subject.model)]
    try:
        one = _measure(subject, [own], seed=0)
        again = _measure(subject, [own], seed=1)
        many = _measure(subject, [[row] for row in own], seed=0)
    except (GradUtilsError, RuntimeError) as error:
        if not isinstance(error, GradUtilsError) and "does not require grad" not in str(error):
            raise
        problem = str(error) if isinstance(error, GradUtilsError) else f"{NOTHING_IS_TRAINED}: {error}"
        return [*comparisons, Comparison(name="training step", problem=problem)]
    parts, varies_by = one.differences(many), relative_error(one.differences(again))
    truth = one_process(subject, rows, seed=0, make_model=make_model)

    def compare(name: str, differences: dict[str, Difference], want: Measured, got: Measured) -> Comparison:
        return compare_gradients(
            name,
            differences,
            loss=(want.loss, got.loss),
            grad_norm=(want.norm, got.norm),
            tolerance=tolerance,
            advice=subject.advice,
            varies_by=varies_by,
        )

    comparisons.append(compare(f"{len(own)} micro-batches against 1", parts, one, many))
    name = "this layout against one process"
    if isinstance(truth, str):
        return [*comparisons, Comparison(name=name, not_compared=truth)]
    return [*comparisons, compare(name, differences_from(truth, many), truth, many)]


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


def _compare_copies(model: nn.Module) -> Comparison:
    """Compare the checksums of replicas."""
    problem = ""
    try:
        plan_by_name(model, trained_parameters(model), world_domain(), {})  # not cached: replicas may drift apart
    except ReplicaMismatchError as error:
        problem = str(error)
    return Comparison(name="copies of parameters", problem=problem)
