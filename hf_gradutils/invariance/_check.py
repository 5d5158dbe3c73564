"""Checks, on the user's own samples, that the gradient does not depend on how the batch is cut up and spread."""

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from hf_gradutils._undisturbed import random_states_kept
from hf_gradutils.accelerator import WholeBatchLoss
from hf_gradutils.errors import InvalidArgumentError, InvarianceError
from hf_gradutils.invariance._agreement import from_first_rank
from hf_gradutils.invariance._as_before import attributes_kept
from hf_gradutils.invariance._beginning import begun, training_undone, users_callbacks
from hf_gradutils.invariance._comparisons import compare_all, describe, parts_of
from hf_gradutils.invariance._losses import LossAndTargets
from hf_gradutils.invariance._report import Comparison, InvarianceReport
from hf_gradutils.invariance._rows import NoRowsError
from hf_gradutils.invariance._subjects import AcceleratorLoop, Rows, RunWindow, Subject, TorchLoop
from hf_gradutils.invariance._trainer_subject import TrainerSubject
from hf_gradutils.invariance._whole_model import MakeModel
from hf_gradutils.targets.trl_generating import why_not_compared
from hf_gradutils.upstream.deepspeed import drop_hooks, is_engine, why_not_measured

logger = logging.getLogger("hf_gradutils.invariance")

_MOST_SAMPLES = 64
"""Up to which samples are added so that each micro-batch has some."""
ROUNDED_TOLERANCE = 5e-2
"""Largest relative error in bf16, fp16 or TF32, where the cut of a batch changes the rounding of its gradient."""


def check_invariance(
    trainer: Any, num_samples: int | None = None, tolerance: float = 1e-5, *, make_model: MakeModel | None = None
) -> InvarianceReport:
    """Compare a Trainer's gradient with that of one process and the whole batch, before training.

    Runs samples of the Trainer's own dataset through its own ``training_step``, in its own layout, in training
    mode if that draws no random numbers, else without dropout.
    Model, optimizer, random states, data order and memory are as before afterwards; a model that accelerate shards in
    place stays sharded.

    Args:
        trainer: Ours, or any ``transformers.Trainer``, whose errors it then shows.
        num_samples: Raised to two per data rank and to a multiple of the micro-batches, and lowered if the dataset has
            fewer. None: 16, and more so that each micro-batch of a step has two or at least one, up to 64 in all.
        tolerance: Largest relative error of gradient and loss; bf16, fp16 and TF32 allow :data:`ROUNDED_TOLERANCE`.
        make_model: Makes the whole model, if it is sharded and has no configuration to build it from.

    Returns:
        The report, the same on all ranks.

    Collectives: many; every rank must call. Memory: the whole model and its gradient on rank 0, in float64 if that
        fits.

    Raises:
        InvalidArgumentError: the dataset has too few samples.
    """
    return check_in_train(
        trainer,
        None if getattr(trainer, "is_in_train", False) else lambda: trainer.train(),
        num_samples=num_samples,
        tolerance=tolerance,
        make_model=make_model,
    )


def check_in_train(
    trainer: Any,
    start_training: Callable[[], Any] | None,
    *,
    num_samples: int | None = None,
    tolerance: float = 1e-5,
    make_model: MakeModel | None = None,
    when_done: Callable[[InvarianceReport], None] | None = None,
) -> InvarianceReport:
    """:func:`check_invariance` with a training that the caller starts.

    Args:
        trainer: As in :func:`check_invariance`.
        start_training: Starts the Trainer's training, as ``trainer.train`` does; it is left by an exception once the
            Trainer is ready to train and the check is done. None: the Trainer is in training already.
        num_samples: As in :func:`check_invariance`.
        tolerance: As in :func:`check_invariance`.
        make_model: As in :func:`check_invariance`.
        when_done: Called with the report before that exception is raised, which code of the user's may catch.

    Raises:
        InvalidArgumentError: the dataset has too few samples, or the training has ended before its first step.
    """
    if isinstance(trainer, Accelerator) or not hasattr(trainer, "training_step"):
        raise InvalidArgumentError(
            f"trainer must be a Trainer, got {type(trainer).__name__}; for a loop with an Accelerator call "
            "check_loop_invariance"
        )

    if reason := why_not_compared(trainer):
        row = Comparison(name="gradients", not_compared=reason)
        report = InvarianceReport((row,), tolerance, type(trainer).__name__)
        if when_done is not None:
            when_done(report)
        return report

    def check() -> InvarianceReport:
        try:
            subject = TrainerSubject(trainer)
        except NoRowsError as error:
            row = Comparison(name="gradients", not_compared=str(error))
            return InvarianceReport((row,), tolerance, type(trainer).__name__)
        return _check(subject, num_samples, tolerance, make_model)

    if start_training is None:
        return check()
    callbacks = trainer.callback_handler.callbacks
    users = users_callbacks(callbacks)
    probe = _Probe(trainer, users, check, when_done)
    trainer.callback_handler.callbacks = [probe]
    try:
        kept = attributes_kept(trainer, trainer.args, *users), random_states_kept(trainer.args.device)
        with kept[0], kept[1], training_undone(trainer):
            start_training()
    except _CheckIsDone:
        pass
    finally:
        trainer.callback_handler.callbacks = callbacks
        trainer.accelerator.free_memory()
        drop_hooks(trainer.model)
    if probe.report is None:
        raise InvalidArgumentError("the training has ended before its first step, so that nothing was checked")
    return probe.report


def check_loop_invariance(
    accelerator: Accelerator,
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[Rows], Any],
    loss_and_targets: LossAndTargets | WholeBatchLoss,
    *,
    num_samples: int | None = None,
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
    num_samples: int | None = None,
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


class _CheckIsDone(BaseException):
    """Ends a ``train`` started for a check, through any ``except Exception`` of the user's."""


class _Probe(TrainerCallback):  # type: ignore[misc]
    """Runs a check once a Trainer is ready to train, after ``on_train_begin`` of the user's callbacks."""

    def __init__(
        self,
        trainer: Any,
        callbacks: Sequence[Any],
        check: Callable[[], InvarianceReport],
        when_done: Callable[[InvarianceReport], None] | None,
    ):
        self._trainer, self._callbacks, self._check, self._when_done = trainer, callbacks, check, when_done
        self.report: InvarianceReport | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with begun(self._trainer.model_wrapped, self._callbacks, args, kwargs):
            self.report = self._check()
        if self._when_done is not None:
            self._when_done(self.report)
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


def _check(
    subject: Subject, num_samples: int | None, tolerance: float, make_model: MakeModel | None
) -> InvarianceReport:
    if num_samples is not None and not num_samples >= 1:
        raise InvalidArgumentError(f"num_samples must be ≥ 1, got {num_samples}")
    if not tolerance > 0:
        raise InvalidArgumentError(f"tolerance must be > 0, got {tolerance}")
    if not subject.is_exact:
        tolerance = max(tolerance, ROUNDED_TOLERANCE)
    with subject.as_it_was():
        rows, what = _take_rows(subject, num_samples)
        per_rank = len(rows) // subject.num_data_ranks
        reason = why_not_measured(subject.model) if is_engine(subject.model) else ""
        if reason:
            comparisons = [Comparison(name="gradients", not_compared=reason)]
        else:
            if isinstance(subject, TrainerSubject):
                subject.collate_once(rows)
            own = rows[subject.data_rank * per_rank : (subject.data_rank + 1) * per_rank]
            comparisons, tolerance, mode = compare_all(subject, rows, own, tolerance, make_model)
            what += mode and f", {mode}"
    return from_first_rank(
        InvarianceReport(
            tuple(comparisons),
            tolerance,
            what,
            num_samples=len(rows),
            num_ranks=subject.num_ranks,
            num_micro_batches=parts_of(subject, per_rank),
            accumulation=subject.accumulation,
            fix=subject.fix,
            version=version("hf-gradutils"),
        )
    )


def _take_rows(subject: Subject, num_samples: int | None) -> tuple[Rows, str]:
    """The rows of all ranks, each rank's part of equal size, and a description."""
    num_ranks = subject.num_data_ranks
    wanted = _rows_per_rank(subject, num_samples) * num_ranks
    rows = subject.rows(wanted)
    per_rank = _even(len(rows) // num_ranks, subject.accumulation)
    if per_rank < 2:
        raise InvalidArgumentError(
            f"{2 * num_ranks} samples are needed for {num_ranks} data ranks, but the dataset has {len(rows)}; use "
            "fewer ranks"
        )
    few = f"not {wanted}: the dataset has only {len(rows)}" if len(rows) < wanted else ""
    what = describe(subject, per_rank * num_ranks, few=few)
    return rows[: per_rank * num_ranks], what


def _rows_per_rank(subject: Subject, num_samples: int | None) -> int:
    """Rows for each rank: so many, or as many as give each of its micro-batches two, if these are few."""
    ranks, parts = subject.num_data_ranks, subject.accumulation
    per_rank = max(2, -(-(16 if num_samples is None else num_samples) // ranks))
    if num_samples is None:
        fitting = [size * parts for size in (2, 1) if size * parts * ranks <= _MOST_SAMPLES]
        per_rank = max(per_rank, *fitting[:1], 0)
    return -(-per_rank // parts) * parts if parts <= per_rank else per_rank


def _even(num_rows: int, num_parts: int) -> int:
    """So many rows, or a few less, which micro-batches of equal size take up."""
    return num_rows - num_rows % num_parts if num_parts <= num_rows else num_rows
