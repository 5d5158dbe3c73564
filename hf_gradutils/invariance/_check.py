"""The proof in the user's hands: the gradient does not depend on how the batch is cut up and spread.

1 against many          the same samples as one micro-batch and as one per sample, in the layout that trains
layout against 1 rank   the latter on rank 0, with the whole model and, where it fits, in float64
targets                 L(AB)·n(AB) = L(A)·n(A) + L(B)·n(B): is the loss a mean over what is counted?
copies                  parameters that ranks hold copies of are the same
"""

import logging
import math
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
from hf_gradutils.invariance._reference import HOOKS, Measured, compare_with_one_process, difference
from hf_gradutils.invariance._report import Comparison, InvarianceReport, compare_gradients
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
from hf_gradutils.upstream.torch import trained_parameters

logger = logging.getLogger("hf_gradutils.invariance")

ROUNDED_TOLERANCE = 5e-2
"""Largest relative error in bf16, fp16 or TF32, where the cut of a batch changes how its gradient rounds."""


def check_invariance(
    trainer: Any, num_samples: int = 16, tolerance: float = 1e-5, *, make_model: MakeModel | None = None
) -> InvarianceReport:
    """Whether a Trainer's gradient is that of one process with the whole batch. Before training, and without training.

    Takes samples from the Trainer's own dataset and runs them through its own ``training_step``, in the layout that it
    trains in, without dropout. Model, optimizer, random states, data order and memory are as before afterwards; a model
    that accelerate shards in place stays sharded.

    Args:
        trainer: Ours, or any ``transformers.Trainer``: then it shows what is wrong with that.
        num_samples: At least two per data rank are taken.
        tolerance: Largest relative error of gradient and loss; bf16, fp16 and TF32 allow :data:`ROUNDED_TOLERANCE`.
        make_model: Makes the whole model, for one that is sharded and has no configuration to build it from.

    Returns:
        The report, the same on all ranks.

    Collectives: many; every rank must call. Memory: the whole model and its gradient, in float64 where that fits, on
        rank 0.

    Raises:
        InvalidArgumentError: the dataset has too few samples.
    """
    if isinstance(trainer, Accelerator) or not hasattr(trainer, "training_step"):
        raise InvalidArgumentError(
            f"expected a Trainer, got {type(trainer).__name__}; a loop with an Accelerator has check_loop_invariance"
        )
    if trainer.is_in_train:
        return _check(TrainerSubject(trainer), num_samples, tolerance, make_model)
    probe = _Probe(lambda: _check(TrainerSubject(trainer), num_samples, tolerance, make_model))
    attributes, callbacks = dict(vars(trainer)), trainer.callback_handler.callbacks
    trainer.callback_handler.callbacks = [probe]
    try:
        with random_states_kept(trainer.args.device):
            trainer.train()
    except _CheckIsDone:
        pass
    finally:
        trainer.callback_handler.callbacks = callbacks
        trainer.__dict__ = attributes
        trainer.accelerator.free_memory()
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
    """:func:`check_invariance` for a loop of one's own.

    Args:
        accelerator: Ours, or accelerate's: then it shows what is wrong with that.
        model: Prepared.
        rows: The dataset; the same on all ranks.
        collate: Rows → batch.
        loss_and_targets: (model, batch) → the micro-batch's own mean loss, and what ``backward`` is told: the number
            of its targets.
        num_samples: As in :func:`check_invariance`.
        tolerance: As in :func:`check_invariance`.
        make_model: As in :func:`check_invariance`.
    """
    subject = AcceleratorLoop(accelerator, model, rows, collate, loss_and_targets)
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
        rows: The dataset; the same on all ranks.
        collate: Rows → batch.
        run_window: This rank's micro-batches → the loss of the window over all ranks. It leaves the gradient that the
            optimizer would step on in ``.grad``, and takes no step.
        loss_and_targets: (model, batch) → its own mean loss, and the number of targets that is a mean over.
        num_samples: As in :func:`check_invariance`.
        tolerance: As in :func:`check_invariance`.
        make_model: As in :func:`check_invariance`.
    """
    subject = TorchLoop(model, rows, collate, run_window, loss_and_targets)
    return _check(subject, num_samples, tolerance, make_model)


class _CheckIsDone(Exception):  # noqa: N818 - no error
    """Ends a ``train`` that was started for a check."""


class _Probe(TrainerCallback):  # type: ignore[misc]
    """Runs a check where a Trainer has everything ready."""

    def __init__(self, check: Callable[[], InvarianceReport]):
        self._check = check
        self.report: InvarianceReport | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.report = self._check()
        raise _CheckIsDone


class CheckBeforeTraining(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer check itself at the start of ``train``, and stop if it is not exact."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Raise InvarianceError if the check fails."""
        report = check_invariance(self._trainer)
        if self._trainer.is_world_process_zero():
            logger.info("%s", report)
        if not report.passed:
            raise InvarianceError(str(report), report=report)


# ---- The check ----


def _check(subject: Subject, num_samples: int, tolerance: float, make_model: MakeModel | None) -> InvarianceReport:
    if not num_samples >= 1:
        raise InvalidArgumentError(f"num_samples must be ≥ 1, got {num_samples}")
    if not tolerance > 0:
        raise InvalidArgumentError(f"tolerance must be > 0, got {tolerance}")
    if not subject.is_exact:
        tolerance = max(tolerance, ROUNDED_TOLERANCE)
    per_rank = max(2, -(-num_samples // subject.num_data_ranks))
    rows = subject.rows(per_rank * subject.num_data_ranks)
    mine = rows[subject.data_rank * per_rank : (subject.data_rank + 1) * per_rank]
    what = describe(subject, len(rows))
    with subject.as_it_was():
        comparisons = [_compare_copies(subject.model)]
        try:
            one = _measure(subject, [mine])
            many = _measure(subject, [[row] for row in mine])
        except GradUtilsError as error:
            comparisons.append(Comparison(name="training step", problem=str(error)))
            return InvarianceReport(tuple(comparisons), tolerance, what)
        comparisons.append(
            compare_gradients(
                f"{len(mine)} micro-batches against 1",
                {name: difference(one.gradients[name], gradient) for name, gradient in many.gradients.items()},
                loss=(one.loss, many.loss),
                grad_norm=(one.norm, many.norm),
                tolerance=tolerance,
                advice=subject.advice,
                others=HOOKS,
            )
        )
        comparisons += compare_with_one_process(subject, rows, many, tolerance, make_model)
    return InvarianceReport(tuple(comparisons), tolerance, what)


def _measure(subject: Subject, parts: list[Rows]) -> Measured:
    loss = subject.run(parts)
    gradients = {}
    for name, p in subject.model.named_parameters():
        if p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else in_layout_of(p, p.grad)
            gradients[unwrapped_name(name)] = gradient.detach().clone()
    norm = math.sqrt(math.fsum(difference(g, g).want for g in gradients.values()))
    discard_deferred(subject.model)
    return Measured(loss, norm, gradients)


def _compare_copies(model: nn.Module) -> Comparison:
    """Parameters that should be copies of each other, by their checksums."""
    name = "copies of parameters"
    try:
        plan_by_name(model, trained_parameters(model), world_domain(), {})  # anew: they may have drifted apart since
    except ReplicaMismatchError as error:
        return Comparison(name=name, problem=str(error))
    return Comparison(name=name)
