"""The loss of one micro-batch: its own mean over its own targets, for every model and loss function.

``_settle.py`` finds out, before the first step, which targets these are.
"""

import contextlib
import inspect
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils._devices import on_device
from hf_gradutils.accelerator import MicroBatch
from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets import trl_generating
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import LATER_STEPS
from hf_gradutils.targets.rows import count_rows, entries_of, is_divisible
from hf_gradutils.targets.terms import Terms
from hf_gradutils.trainer._contract import LossContract, as_if_alone, ask_loss, warn_of, warn_of_change
from hf_gradutils.trainer._find_shares import find_shares
from hf_gradutils.trainer._generating import settled_counter
from hf_gradutils.trainer._means import MeanShares
from hf_gradutils.trainer._overrides import is_transformers, is_users
from hf_gradutils.trainer._sentences import one_draw
from hf_gradutils.trainer._settle import UnitSettler
from hf_gradutils.trainer._shares import Shares
from hf_gradutils.trainer._ulysses import as_own_shard
from hf_gradutils.upstream.accelerate import without_accelerate_state
from hf_gradutils.upstream.transformers import head_of


class LossUnit:
    """The targets that a Trainer's loss is a mean over."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._settler = UnitSettler(trainer, self)
        self._forward: tuple[weakref.ref[nn.Module], bool] | None = None
        self.is_split = False
        """The losses of several micro-batches or ranks are combined to one mean, for which targets must be counted."""
        self.counter: TargetCounter | None = None
        """None until the first batch has been seen."""
        self._num_tries = 16
        self._first_step = self._asked_at = 0
        self.hands_count = True
        """Code of the user's is given ``num_items_in_batch``."""
        self.model_divides = False
        """The model divides by the count that transformers hands it, and code of the user's may see that."""
        self.contract = LossContract()
        """What the loss divides by."""
        self.shares: Shares | None = None
        """Set if no weight makes micro-batches add up to the loss, but shares do."""
        self.means: MeanShares | None = None
        """Set if the loss is a sum of several means, each of which is one over the evaluation set."""
        self.terms: Terms | None = None
        """The terms of the latest loss, if it has several."""
        self.num_terms = 0
        """Terms that the first loss had."""
        self.asked: Tensor | None = None
        """Targets of the batch whose loss is asked for its contract now, whatever count it is given."""

    def count(self, inputs: Any) -> Tensor:
        """Targets of one micro-batch, shape (), on this rank's device.

        Raises:
            TargetCountError: they cannot be counted, and they are needed. Without need they count as rows, or as one.
        """
        assert self.counter is not None
        if self.counter.head_shifts is None and self.counter.depends_on_shift(inputs):
            self._ask_late(inputs)
        try:
            num_targets = self.counter(inputs)
        except TargetCountError:
            if self.is_split:
                raise
            num_targets = torch.tensor(count_rows(inputs) if is_divisible(inputs) else 1)
        return on_device(num_targets, self._trainer.args.device)

    def _ask_late(self, inputs: Any) -> None:
        """Ask about the shift at the first labels that can tell; ranks with batches of their own may have none yet."""
        assert self.counter is not None
        if self._trainer.accelerator.num_processes > self._trainer.get_tp_size():
            raise TargetCountError(
                "these are the first labels of two or more dimensions, too late to ask the head on all ranks whether "
                "it shifts them; set loss_unit='shifted_tokens' if it predicts the next token, else loss_unit='tokens' "
                "(labels of one class a row are counted as rows by both)"
            )
        self.counter = replace(self.counter, head_shifts=False)  # while it is asked
        self.counter = replace(self.counter, head_shifts=self._settler.ask_shift(inputs))

    @property
    def head(self) -> nn.Module:
        """The model without wrappers."""
        return head_of(self._trainer)

    @property
    def forward_takes_count(self) -> bool:
        """True if the model's forward names ``num_items_in_batch``, or takes it and is not transformers' own.

        Without it heads of transformers return a mean, and others perhaps a sum. Cached per model.
        """
        model = self._trainer.model
        if self._forward is None or self._forward[0]() is not model:
            forward = type(self.head).forward
            names = "num_items_in_batch" in inspect.signature(forward).parameters
            takes = self._trainer.model_accepts_loss_kwargs and not is_transformers(forward)
            self._forward = (weakref.ref(model), names or takes)
        return self._forward[1]

    @contextlib.contextmanager
    def own_mean(self, num_targets: Tensor | None, inputs: Any) -> Iterator[Any]:
        """Give a loss function the micro-batch's own count, and label smoothing the shift of the head; yields inputs.

        Trainer passes a count over the whole window, and chooses the shift by the model's class name, which
        ``fully_shard`` changes.
        """
        trainer, counter = self._trainer, self.counter or TargetCounter()
        counts_boxes = counter.loss_unit == "boxes"
        loss_func, smoother = trainer.compute_loss_func, trainer.label_smoother
        shifts = bool(counter.head_shifts) and "shift_labels" not in entries_of(inputs)
        if loss_func is None and smoother is None and not counts_boxes:
            with as_own_shard(trainer, inputs) as given:
                yield given
            return

        if loss_func is not None:
            trainer.compute_loss_func = lambda outputs, labels, *_, **__: loss_func(
                outputs, labels, num_items_in_batch=num_targets
            )
        if smoother is not None:
            trainer.label_smoother = lambda outputs, labels, *_, **__: smoother(outputs, labels, shift_labels=shifts)
        try:
            with (
                without_accelerate_state() if counts_boxes else contextlib.nullcontext(),
                as_own_shard(trainer, inputs) as given,
            ):
                yield given
        finally:
            trainer.compute_loss_func, trainer.label_smoother = loss_func, smoother

    def settle_once(self, inputs: Any) -> None:
        """:meth:`settle` on a batch of the evaluation, if it is the first."""
        if self.counter is None:
            self.settle(inputs, is_split=False)

    def settle(self, inputs: Any, *, is_split: bool) -> float:
        """Find the unit of the loss; returns the mean number of targets in a rank's micro-batch.

        The first batch is asked, and where it cannot tell, rows of the data set.

        Args:
            inputs: This rank's first batch.
            is_split: The losses of several micro-batches or ranks are combined to one mean.

        Collectives: as ``LossExaminer.settle``; every rank must call.

        Raises:
            LossUnitError: the loss is not a mean over countable targets, and it is split.
            TargetCountError: the targets cannot be counted, and they are needed.
        """
        self.is_split = is_split
        self.shares = None
        if trl_generating.makes_batches(self._trainer):  # a question would generate
            self.counter, self.hands_count, self.model_divides = settled_counter(self._trainer), False, False
            self._first_step = self._asked_at = self._trainer.state.global_step
            return trl_generating.targets_per_micro_batch(self._trainer)
        shares = find_shares(self._trainer, self, self._settler.losses, inputs)
        self.shares = shares if is_split else None
        self.means = shares if isinstance(shares, MeanShares) and shares.evaluates_terms else None
        if self.may_be_asked_for_parts:  # without labels in their usual place transformers hands over no count
            self.hands_count = self._trainer._steps.counts.stock_count([inputs]) is not None
        gives_share = self.shares is not None and self.shares.gives_share
        self.model_divides = self.hands_count and not gives_share and self._ask_model(inputs)
        targets_per_micro_batch = self._settler.settle(inputs, is_split=is_split)
        self.contract = self._ask_contract(inputs)
        self._first_step = self._asked_at = self._trainer.state.global_step
        if self._trainer.is_world_process_zero():
            warn_of(self.contract)
        return targets_per_micro_batch

    def _ask_contract(self, inputs: Any) -> LossContract:
        """Ask a loss of the user's own what it divides by. Collectives: as :func:`ask_loss`."""
        trainer = self._trainer
        is_alone = trainer.args.gradient_accumulation_steps == 1 and trainer.accelerator.num_processes == 1
        gives_share = self.shares is not None and self.shares.gives_share
        is_alone |= trl_generating.makes_batches(trainer)  # a question would generate
        if is_alone or gives_share or not (is_users(trainer, "compute_loss") or trainer.compute_loss_func):
            return LossContract()
        is_undivided = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # what the user says; not before transformers 5.24
        before, self.contract = self.contract, LossContract()  # which computes losses as they are
        with self._settler.asking(inputs) as (batch, loss_of):
            self.asked = count = self.count(batch).clamp(min=1).float()
            try:
                return ask_loss(
                    trainer,
                    loss_of,
                    lambda: self._settler.losses.models_own(batch),
                    lambda: self._settler.losses.is_models_multiple(batch, count),
                    self.asked,
                    is_undivided=is_undivided if is_scaled is None else is_scaled,
                )
            finally:
                self.contract, self.asked = before, None

    def is_due(self, step: int) -> bool:
        """True 1, 10, 100 and 1,000 optimizer steps after the loss was settled."""
        return step - self._first_step in LATER_STEPS

    def ask_again(self, inputs: Any, step: int) -> bool:
        """Ask the loss for its contract again: if it was 0 so far, and after 1, 10, 100 and 1,000 optimizer steps.

        True if it has another one, which holds from now on. Warns if it had one before.
        """
        before = self.contract
        if not (self.is_due(step) or (self._num_tries and not before.is_known)):
            return False
        if not before.is_known:
            self._num_tries -= 1
        now, asked_last, self._asked_at = self._ask_contract(inputs), self._asked_at, step
        if now == before or not now.is_known:
            return False
        self.contract = now
        if self._trainer.is_world_process_zero():
            warn_of(now)
            if before.is_known:
                warn_of_change(before, now, step - self._first_step, asked_last - self._first_step)
        return True

    @property
    def may_be_asked_for_parts(self) -> bool:
        """Code of the user's may ask for the loss of a part of a micro-batch."""
        return is_users(self._trainer, "compute_loss") or is_users(self._trainer, "training_step")

    def _ask_model(self, inputs: Any) -> bool:
        """True if a user's code sees the model divide its loss by a count. Two forwards on every rank, and a sum."""
        trainer = self._trainer
        if not self.may_be_asked_for_parts or trainer.compute_loss_func or not trainer.model_accepts_loss_kwargs:
            return False
        with self._settler.asking(inputs) as (batch, _):
            counts = (torch.full((), count, device=trainer.args.device) for count in (8.0, 16.0))
            try:
                once, twice = (float(self._settler.losses.models_own(batch, count).detach()) for count in counts)
            except torch.AcceleratorError:
                raise
            except Exception:  # these labels may not be the model's, on all ranks alike
                once = twice = 0.0
        ranks = add_up(world_domain(), divides=once != 0 and math.isclose(once, 2 * twice, rel_tol=1e-3))
        return bool(ranks["divides"])

    def in_share(self, inputs: Any, micro_batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-batch's outermost loss, where shares are made."""
        return one_draw(self._trainer) if self.shares is None else self.shares.in_loss(inputs, micro_batch)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """The context of a loss that is a mean only if it is told that its micro-batch is the whole batch."""
        return (
            as_if_alone(self._trainer, self.contract.kept, communicates=self.contract.communicates)
            if self.contract.is_asked_alone
            else contextlib.nullcontext()
        )

    def check_again(self, inputs: Any, step: int) -> None:
        """Check the loss again at a window's first micro-batch, where the first batch does not speak for later ones.

        Args:
            inputs: This rank's batch.
            step: Optimizer steps so far, the same on every rank.

        Warns, once, if a loss that was a mean has stopped to be one. Collectives and host syncs: none, without a look
        at the batch, except after 1, 10, 100 and 1,000 steps with a loss of the user's own, and in the first 16 windows
        if no batch so far could tell.

        Raises:
            LossUnitError: this is the first batch that can tell, and the loss is no mean over the targets counted.
        """
        self._settler.check_again(inputs, step)
