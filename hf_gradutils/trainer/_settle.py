"""Settle the unit of a Trainer's loss before its first step, and look again where the first batch may not tell.

At the first micro-batch of later windows a loss is looked at again if no batch so far could tell, or if it is of the
user's own, because a term of it may grow from a weight of 0.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils._precision import rounding_of
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets import trl
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.known_heads import known_head
from hf_gradutils.targets.mean import Verdict
from hf_gradutils.targets.probe import HOW_TO_FIX, LATER_STEPS
from hf_gradutils.targets.rows import entries_of
from hf_gradutils.targets.unit import LossExaminer
from hf_gradutils.trainer import _ulysses as ulysses
from hf_gradutils.trainer._check_shares import check_shares, counter_of_shares
from hf_gradutils.trainer._overrides import is_users
from hf_gradutils.trainer._questions import TrainerLosses
from hf_gradutils.trainer._sentences import sentence_counter
from hf_gradutils.trainer._shares import Shares

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit

logger = logging.getLogger("hf_gradutils.loss_unit")

_NUM_TRIES = 16
"""Windows whose first batches are looked at until one can tell."""

_TO_BE_SURE = "to be sure, train once with check_invariance=True, which compares gradients"
_NOTHING_TELLS = (
    "the loss could not be checked to be a mean over the targets counted ({source}): there are no rows of a data set "
    f"to look at, and no batch of the first windows can be cut into parts whose losses tell; {_TO_BE_SURE}"
)
_ALL_ALIKE = (
    "the loss is a mean, but nothing tells if it is one over the targets counted ({source}): all samples that were "
    f"looked at have as many targets, or one class; {_TO_BE_SURE} on samples that differ"
)
_IS_SINGLE = (
    "the loss looks at the first row of a batch only, which batches of one row allow, so that it cannot be checked to "
    "be a mean over the targets counted ({source}), and is trained as one; set loss_unit if it is the mean of another"
)
_IS_APART = (
    "the loss is a mean over the targets counted ({source}) on the first batch, but not on rows that mix two kinds of "
    "them: {numbers}. If batches and optimizer steps of this data set never mix them, all is well; " + _TO_BE_SURE
)
_IS_RANDOM = (
    "the loss differs between equal forwards, so that it cannot be checked to be a mean over the targets counted "
    f"({{source}}), and is trained as one; {_TO_BE_SURE} with random numbers that do not change"
)


class UnitSettler:
    """Finds the unit of a Trainer's loss. Every rank must call each method at the same time."""

    def __init__(self, trainer: Any, unit: "LossUnit"):
        self._trainer, self._unit = trainer, weakref.proxy(unit)
        self._examiner: LossExaminer | None = None
        self.losses = TrainerLosses(trainer, unit)
        self._first_step = 0
        self._later: list[int] = []
        """Optimizer steps at which to look again."""
        self._num_tries = 0
        """Windows left whose first batch may be the first that can tell."""
        self._unchecked = ""
        """Why nothing is known; empty once a batch could tell, or the user has been told."""

    def settle(self, inputs: Any, *, is_split: bool) -> float:
        """As :meth:`LossUnit.settle`."""
        trainer, unit = self._trainer, self._unit
        if unit.shares is not None and unit.shares.gives_share:
            return self._settle_shares(unit.shares, inputs)
        check = is_split and trainer.grad_plugin.check_loss_unit
        with self.losses.asked() as prepare:
            batch = prepare(inputs)
            counter = self._initial_counter(batch, is_split=is_split, check=check)
            self._examiner = LossExaminer(
                self.losses.of_head,
                self.losses.trained,
                counter,
                dataset=self.losses.dataset_rows if is_split else None,
                num_blocks=trl.num_blocks(trainer),
                rounding=rounding_of(trainer.accelerator, trainer.model),
                batch_size=trainer.args.per_device_train_batch_size,
            )
            is_shard = ulysses.is_on(trainer) and "shift_labels" in entries_of(batch)
            may_fail = is_users(trainer, "compute_loss")
            shifts = is_shard and ulysses.check_head(self.losses.models_own, batch, may_fail=may_fail)
            settled = self._examiner.settle(
                batch,
                check=check,
                needs_count=is_split,
                smooths_labels=trainer.label_smoother is not None,
                rows_differ=is_split and self.losses.is_the_users,
            )
            if unit.shares is not None:
                unit.counter = self._examiner.counter
                check_shares(trainer, unit.shares, self.losses.model, batch)
        unit.counter = replace(counter, head_shifts=shifts or settled.head_shifts)
        if settled.verdict is not None:
            self._start(settled.verdict)
        return settled.targets_per_micro_batch

    def _settle_shares(self, shares: Shares, inputs: Any) -> float:
        """Check on the first batch that shares are those of the loss. Collectives: as ``check_shares``, and a sum."""
        trainer, unit = self._trainer, self._unit
        with self.losses.asked() as prepare:
            batch = prepare(inputs)
            unit.counter = counter_of_shares(trainer, batch)
            check_shares(trainer, shares, self.losses.model, batch)
            num_targets = add_up(world_domain(), targets=float(unit.counter(batch)))["targets"]
        return num_targets / trainer.accelerator.num_processes

    def ask_shift(self, batch: Any) -> bool:
        """Ask about the shift of the head, on a batch of this process, which is alone."""
        assert self._examiner is not None
        with self.losses.asked():
            return self._examiner.ask_shift(batch)

    @contextlib.contextmanager
    def asking(self, inputs: Any) -> Iterator[tuple[Any, Callable[[Tensor], Tensor]]]:
        """The context of questions to the loss: the prepared batch, and count → its loss. Leaves no trace."""
        with self.losses.asked() as prepare:
            batch = prepare(inputs)

            def loss_of(count: Tensor) -> Tensor:
                return self.losses.given(batch, count)

            with torch.enable_grad():  # as in training, which code of the user's may look at
                self._trainer.model.train()
                yield batch, loss_of

    def check_again(self, inputs: Any, step: int) -> None:
        """As :meth:`LossUnit.check_again`."""
        is_due = bool(self._later) and step >= self._later[0]
        if not (is_due or self._num_tries) or step == self._first_step:
            return
        assert self._examiner is not None
        self._later = [later for later in self._later if later > step]
        self._num_tries = max(self._num_tries - 1, 0)
        with self.losses.asked() as prepare:
            verdict = self._examiner.verify(prepare(inputs), only_if_it_tells=not is_due)
        self._unit.counter = self._examiner.counter
        self._judge(verdict, step - self._first_step)

    # ---- What follows from a verdict ----

    def _start(self, verdict: Verdict) -> None:
        """Plan when to look again, and judge."""
        state = self._trainer.state
        is_the_users = self.losses.is_the_users
        self._first_step = state.global_step
        self._later = [state.global_step + steps for steps in LATER_STEPS] if is_the_users else []
        self._num_tries, self._unchecked = 0, ""
        if verdict.kind == "unchecked" or (verdict.kind == "alike" and is_the_users):
            self._num_tries = max(min(_NUM_TRIES, state.max_steps - state.global_step - 1), 0)
            self._unchecked = _NOTHING_TELLS if verdict.kind == "unchecked" else _ALL_ALIKE
        self._judge(verdict, 0)

    def _judge(self, verdict: Verdict, num_steps: int) -> None:
        """Raise or warn, if there is a reason."""
        was_unchecked = self._unchecked
        if verdict.kind in ("mean", "wrong", "random", "apart", "single"):
            self._num_tries, self._unchecked = 0, ""
        if verdict.kind in ("wrong", "random", "single"):
            self._later = []
        if verdict.kind == "wrong":
            self._say_that_it_is_wrong(verdict, num_steps if not was_unchecked else 0)
        elif verdict.kind == "random":
            self._warn(_IS_RANDOM)
        elif verdict.kind == "single":
            self._warn(_IS_SINGLE)
        elif verdict.kind == "apart":
            self._warn(_IS_APART.replace("{numbers}", verdict.numbers))
        elif self._unchecked and not self._num_tries:
            self._warn(self._unchecked)
            self._unchecked = ""

    def _say_that_it_is_wrong(self, verdict: Verdict, num_steps: int) -> None:
        what = f"a mean over the targets counted ({self._source}): {verdict.numbers}"
        if not num_steps:
            raise LossUnitError(f"the loss is not {what}; {HOW_TO_FIX}")
        self._warn(
            f"after {num_steps} optimizer steps the loss is no longer {what}. A term of it may have grown from a "
            f"weight of 0; from here on the gradient depends on how the batch is cut up. {HOW_TO_FIX}"
        )

    def _warn(self, message: str) -> None:
        if self._trainer.is_world_process_zero():
            logger.warning("%s", message.replace("{source}", self._source))

    @property
    def _source(self) -> str:
        counter = self._trainer.grad_plugin.counter()
        if counter.count is not None:
            return f"count_targets={getattr(counter.count, '__name__', repr(counter.count))}"
        assert self._examiner is not None
        return f"loss_unit={self._examiner.counter.loss_unit!r}"

    def _initial_counter(self, batch: Any, *, is_split: bool, check: bool) -> TargetCounter:
        """The counter from the user, or from the tables of trainers and heads."""
        trainer = self._trainer
        counter, why_not = trainer.grad_plugin.counter(), ""
        head = known_head(self._unit.head) if trainer.compute_loss_func is None else None
        if head is not None and head.is_shared and check and is_users(trainer, "compute_loss"):
            head = None
        if counter.is_default and trl.num_blocks(trainer) == 2:
            counter, why_not = TargetCounter(count=trl.paired_counter(trainer)), trl.why_without_unit(trainer)
        elif counter.is_default and head is not None:
            if head.loss_unit is not None:
                counter = TargetCounter(head.loss_unit, ignore_index=head.ignore_index)
            else:
                counter = TargetCounter("rows")
            why_not = head.reason
        if is_split and counter.is_default and (of_sentences := sentence_counter(trainer)) is not None:
            counter = of_sentences
        if why_not and check:
            raise LossUnitError(f"the loss cannot be split exactly: {why_not}; {HOW_TO_FIX}")
        if is_split:
            return counter
        # One micro-batch on one process is the whole batch; the count is only reported.
        try:
            return counter if counter(batch).isfinite() else TargetCounter("rows")
        except TargetCountError:
            return TargetCounter("rows")
