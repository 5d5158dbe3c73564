"""Checks, on the user's own samples, that the gradient does not depend on how the batch is cut up and spread."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from hf_gradutils._undisturbed import random_states_kept
from hf_gradutils.accelerator import WholeBatchLoss
from hf_gradutils.errors import (
    InvalidArgumentError,
    InvarianceError,
)
from hf_gradutils.invariance._as_before import attributes_kept
from hf_gradutils.invariance._comparisons import compare_all
from hf_gradutils.invariance._losses import LossAndTargets
from hf_gradutils.invariance._reference import from_first_rank
from hf_gradutils.invariance._report import (
    Comparison,
    InvarianceReport,
)
from hf_gradutils.invariance._subjects import (
    AcceleratorLoop,
    Rows,
    RunWindow,
    Subject,
    TorchLoop,
    describe,
)
from hf_gradutils.invariance._trainer_subject import TrainerSubject
from hf_gradutils.invariance._whole_model import MakeModel
from hf_gradutils.targets.trl_generating import why_not_compared
from hf_gradutils.upstream.deepspeed import drop_hooks, is_engine, why_not_measured

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

    if reason := why_not_compared(trainer):
        row = Comparison(name="gradients", not_compared=reason)
        return InvarianceReport((row,), tolerance, type(trainer).__name__)

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
    loss_and_targets: LossAndTargets | WholeBatchLoss,
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
        loss_and_targets: (model, batch) → the micro-batch's own mean loss, and its number of targets; or a list of
            several such terms, as ``backward`` takes them. Or a ``WholeBatchLoss``, for ``backward_whole_batch``. With
            terms, or with DeepSpeed and our Accelerator, it is called once more for each micro-batch, because targets
            are counted first.
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
    loss_and_targets: LossAndTargets | WholeBatchLoss,
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
        comparisons, tolerance = compare_all(subject, rows, own, tolerance, make_model)
    return from_first_rank(InvarianceReport(tuple(comparisons), tolerance, describe(subject, len(rows))))
