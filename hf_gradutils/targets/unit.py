"""Find the unit of a loss before the first step: does the head shift, and is the loss a mean over the targets counted?

Every question is put on all ranks together, see :mod:`hf_gradutils.targets.mean`, and has the same answer on all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_gradutils._collectives import add_up, gather_objects, world_domain
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets.counter import TargetCounter, check_count
from hf_gradutils.targets.mean import MeanCheck, Verdict
from hf_gradutils.targets.probe import LossOf, loss_ignores_first_position
from hf_gradutils.targets.rows import entries_of, is_divisible, take_rows, with_entries
from hf_gradutils.targets.sample import DatasetRows


@dataclass(frozen=True, slots=True)
class Settled:
    """Findings on the first batch, the same on every rank."""

    head_shifts: bool | None
    """Position 0 of each row is no target; None: not asked, because no batch could tell."""
    targets_per_micro_batch: float
    """Mean over the ranks."""
    verdict: Verdict | None
    """None: not checked."""


class LossExaminer:
    """Puts the questions to a loss.

    Args:
        head_loss_of: The loss of the head itself, to ask about its shift.
        loss_of: (batch, its counter) → the loss that is trained.
        counter: From the user or the table of known heads.
        dataset: Gives rows of the data set; called only if they are needed.
        num_blocks: As in :mod:`hf_gradutils.targets.rows`.
        rounding: As for :func:`hf_gradutils.targets.probe.compare`.
        batch_size: Rows of a micro-batch.

    Losses are computed without gradients; with them, on all ranks, if that fails on one: they may need autograd.
    """

    def __init__(
        self,
        head_loss_of: LossOf,
        loss_of: Callable[[Any, TargetCounter], Tensor],
        counter: TargetCounter,
        *,
        dataset: Callable[[], DatasetRows] | None = None,
        num_blocks: int = 1,
        rounding: float = 0.0,
        batch_size: int = 1,
    ):
        self.counter = counter
        self._head_loss_of, self._num_blocks = head_loss_of, num_blocks
        self._make_dataset = dataset
        self._rows: DatasetRows | None = None
        self._domain = world_domain()
        self._mean = MeanCheck(
            loss_of,
            self._dataset if dataset is not None else None,
            num_blocks=num_blocks,
            rounding=rounding,
            batch_size=batch_size,
        )

    def settle(
        self,
        batch: Any,
        *,
        check: bool,
        needs_count: bool = True,
        smooths_labels: bool = False,
        rows_differ: bool = False,
    ) -> Settled:
        """Find out if the head shifts, and check that the loss is a mean over the targets counted.

        Args:
            batch: This rank's first micro-batch.
            check: Verify additivity.
            needs_count: A batch that cannot be counted is an error.
            smooths_labels: Ask about the shift for any counter, because label smoothing has to shift like the head.
            rows_differ: The loss is of the user's own: ask about its shift, and check it, also on rows of the data set,
                which may be of another kind than those of the first batch.

        Collectives: a few small all-reduces over all ranks. Host syncs: one per forward and per all-reduce, and up to
            three per row.

        Raises:
            TargetCountError: some rank cannot count its targets.
            LossUnitError: ranks disagree about the shift.
        """
        asked = TargetCounter() if smooths_labels else self.counter
        failure: TargetCountError | None = None
        try:
            self.counter(batch)
        except TargetCountError as error:
            failure = error
        may_shift = asked.depends_on_shift(batch)
        ranks = add_up(self._domain, failed=failure is not None and needs_count, may_shift=may_shift)
        if ranks["failed"]:
            try:
                raise failure or TargetCountError(
                    f"{ranks['failed']:.0f} of {self._domain.num_ranks} ranks cannot count the targets of their first "
                    "batch"
                )
            finally:
                failure = None  # its traceback holds this frame, and through the callers' the model
        example = self._example(batch, asked, int(ranks["may_shift"]), rows_differ=rows_differ)
        shifts = None if example is None else self.ask_shift(example)
        self.counter = replace(self.counter, head_shifts=shifts)
        verdict = self._mean.verify(batch, self.counter) if check else None
        if verdict is not None and rows_differ and verdict.kind not in ("wrong", "random", "single"):
            mixed = self._mean.verify_mixed(batch, self.counter)
            verdict = mixed if mixed.kind in ("wrong", "random", "apart", "single") else verdict
        self._forget_candidates()
        targets = add_up(self._domain, targets=1.0 if failure else float(self.counter(batch)))["targets"]
        check_count(targets)
        return Settled(shifts, targets / self._domain.num_ranks, verdict)

    def verify(self, batch: Any, *, only_if_it_tells: bool = False) -> Verdict:
        """Check that the loss is a mean over the targets counted, as :meth:`MeanCheck.verify` does."""
        verdict = self._mean.verify(batch, self.counter, only_if_it_tells=only_if_it_tells)
        self._forget_candidates()
        return verdict

    def _dataset(self) -> DatasetRows:
        assert self._make_dataset is not None
        if self._rows is None:
            self._rows = self._make_dataset()
        return self._rows

    def _forget_candidates(self) -> None:
        """Free the rows that were not chosen."""
        if self._rows is not None:
            self._rows.forget()

    # ---- Does the head shift? ----

    def _example(self, batch: Any, asked: TargetCounter, num_able: int, *, rows_differ: bool) -> Any | None:
        """A batch on every rank whose count depends on the shift; None if there is none."""
        if num_able == self._domain.num_ranks:
            return batch
        if num_able:  # some ranks began with labels of another kind
            own = self._one_row(batch) if asked.depends_on_shift(batch) else None
            example = next(row for row in gather_objects(self._domain, own) if row is not None)
            return _moved(example, next(v.device for v in entries_of(batch).values() if isinstance(v, Tensor)))
        if not (rows_differ and asked.is_default and self._make_dataset is not None):
            return None
        example = self._dataset().first_of(asked.depends_on_shift)
        has_it = add_up(self._domain, able=example is not None)["able"] == self._domain.num_ranks
        return example if has_it else None

    def _one_row(self, batch: Any) -> Any:
        is_cut = is_divisible(batch, num_blocks=self._num_blocks)
        return _moved(take_rows(batch, 0, 1, num_blocks=self._num_blocks) if is_cut else batch, torch.device("cpu"))

    def ask_shift(self, batch: Any) -> bool:
        """Ask on all ranks together. Collectives: one or two all-reduces. Raises LossUnitError if they disagree."""
        for with_autograd in dict.fromkeys((self._mean.with_autograd, True)):
            with torch.set_grad_enabled(with_autograd):
                answer = loss_ignores_first_position(self._head_loss_of, batch)
            ranks = add_up(self._domain, shifting=bool(answer), failed=answer is None)
            if not ranks["failed"]:
                self._mean.with_autograd = with_autograd
                break
        if ranks["shifting"] not in (0, self._domain.num_ranks):
            raise LossUnitError(
                f"the head shifts its labels on {ranks['shifting']:.0f} of {self._domain.num_ranks} ranks, not on all "
                "or none; set loss_unit='tokens' or 'shifted_tokens'"
            )
        return bool(ranks["shifting"])


def _moved(batch: Any, device: torch.device) -> Any:
    return with_entries(batch, {k: v.to(device) for k, v in entries_of(batch).items() if isinstance(v, Tensor)})
