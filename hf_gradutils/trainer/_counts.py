"""The counts of a window: streamed with its micro-batches, or first, before its first forward."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils._devices import on_device
from hf_gradutils.accelerator import Division, MicroBatch, expect, reader_of_gradients
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.targets.rows import count_rows
from hf_gradutils.trainer._batches import TrainingBatches
from hf_gradutils.trainer._contract import LossContract
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.trainer._overrides import is_users, names_read
from hf_gradutils.upstream.transformers import without_average

logger = logging.getLogger("hf_gradutils.trainer")


class WindowCounts:
    """Decides when a window's targets are counted, and what ``num_items_in_batch`` and a micro-batch's weight are."""

    def __init__(self, trainer: Any, unit: LossUnit, batches: TrainingBatches):
        self._trainer = trainer
        self._unit = unit
        self._batches = batches
        self._division: Division | None = None
        self.is_first = False
        """Targets are counted before the window's first forward."""
        self.is_handing = False
        """In :meth:`handing`."""
        self.handed: Any = None
        """The count that was handed to a user's ``get_batch_samples`` last."""

    # ---- Once, on the first batch ----

    def decide(self, model: nn.Module) -> None:
        """Choose when to count, once the loss is settled. InvalidArgumentError if the plugin's choice cannot be met."""
        trainer, setting = self._trainer, self._trainer.grad_plugin.counts
        accumulation = trainer.args.gradient_accumulation_steps
        if self._division is not None and self._division.num_micro_batches == accumulation:
            self._division.look_again()
        elif is_users(trainer, "training_step"):
            names = names_read(trainer)
            self._division = Division(
                accumulation,
                may_divide=accumulation > 1 and "gradient_accumulation_steps" in names,
                num_ranks=self._num_averaged,
                warns="current_gradient_accumulation_steps" not in names and trainer.is_world_process_zero(),
            )
        windows = trainer.accelerator.windows
        if windows.engine is not None:
            self.is_first = True
            return
        reason = self._reason(model)
        if setting == "streamed" and reason:
            raise InvalidArgumentError(f"{reason}, which counts='streamed' cannot give it; set counts='auto'")
        if not reason and is_users(trainer, "training_step"):
            reason = "training_step is overridden, and may add gradients of its own"
        if not reason and self._unit.contract.divides and is_users(trainer, "compute_loss"):
            reason = "compute_loss divides by num_items_in_batch, the count of the whole window"
        # A hook may be on one rank only (wandb.watch): all ranks must begin windows alike.
        num_ranks = add_up(world_domain(), first=setting == "auto" and bool(reason))["first"]
        was_first, self.is_first = self.is_first, setting == "first" or bool(num_ranks)
        window = windows.of_loss(model)
        is_alone = accumulation == 1 and trainer.accelerator.num_processes == 1
        window.needs_counts = is_alone and setting == "auto"  # then the weight is 1, whatever the backward does
        window.reader = reader_of_gradients(model, [trainer.optimizer])
        if setting == "auto" and num_ranks and not was_first and trainer.is_world_process_zero():
            why = reason or f"code of yours on {num_ranks:.0f} ranks needs it"
            logger.warning("counts='first': each window's targets are counted before its first forward: %s", why)

    def _reason(self, model: nn.Module) -> str:
        """What cannot do without counts that are known first, in words; empty if nothing is known to."""
        trainer = self._trainer
        if self._unit.shares is not None:
            return self._unit.shares.why
        if is_users(trainer, "get_batch_samples"):
            return "get_batch_samples is overridden, and sees a list of batches and their count"
        return reader_of_gradients(model, [trainer.optimizer])

    def look_again(self) -> None:
        """Look again if the user's own step divides its losses, as it may have changed."""
        if self._division is not None:
            self._division.look_again()

    # ---- At the start of a window ----

    def expect(self, batches: Sequence[Any], *, hands_count: bool = True) -> Tensor | None:
        """Begin to add up the targets of a window's batches over all ranks.

        Returns:
            ``num_items_in_batch`` as transformers has it, shape (), float32, or None if ``hands_count`` is False.

        Collectives: one all-reduce of two numbers or more over all ranks; the first backward waits for it, and where
            user code sees the count the first forward. Host syncs: none.
        """
        trainer = self._trainer
        own = [batch for batch in batches if not self._batches.is_padding(batch)]
        shares = self._unit.shares
        targets = sum((self._unit.count(batch).double() for batch in own), self._zero)
        numbers = [targets / trainer.get_cp_size()]  # which cuts whole rows later; DeepSpeed has cut them
        local = self.stock_count(own) if hands_count else None
        numbers.append(self._zero if local is None else on_device(local, self._zero.device).double())
        if shares is not None:
            of_shares = [shares.counts(batch) * (not self._batches.is_padding(batch)) for batch in batches]
            numbers += torch.stack(of_shares).sum(0).to(self._zero.device).unbind()
        window = trainer.accelerator.windows.of_loss(trainer.model_wrapped)
        reduced = expect(trainer.accelerator.windows, window, torch.stack(numbers))
        if shares is not None:
            shares.begin(lambda: reduced()[2:])
        if not hands_count:
            return None
        if not (self._unit.may_be_asked_for_parts or trainer.compute_loss_func):
            return None  # no code of the user's sees it: the forward need not wait
        targets, stock = reduced().float()[:2]
        return targets / trainer.get_tp_size() if local is None else stock

    @property
    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._trainer.args.device)

    def stock_count(self, batches: Sequence[Any]) -> Any:
        """The count by transformers of this rank's batches, without other ranks; None where it has none."""
        trainer, args = self._trainer, self._trainer.args
        with without_average(args), self.handing():
            return trainer._get_num_items_in_batch(list(batches), args.device)

    @contextlib.contextmanager
    def handing(self) -> Iterator[None]:
        """Inside, the Trainer's own methods draw a window's batches and count them as transformers does."""
        self.is_handing = True
        try:
            yield
        finally:
            self.is_handing = False

    def check_handed(self, count: Any) -> None:
        """Raise InvalidArgumentError for a count of the user's own if it is unknown which ranks it counts."""
        if count is None or count is self.handed or not self._unit.contract.divides or self._share == 1:
            return
        raise InvalidArgumentError(
            "get_batch_samples returns a count of its own, and compute_loss divides by it without multiplying by the "
            "number of ranks, over which gradients are averaged; multiply by self.accelerator.num_processes and return "
            "the count over all ranks, or return the count of super().get_batch_samples"
        )

    def check_length(self, batches: Sequence[Any], num_batches: int, *, is_open: bool) -> None:
        """Raise InvalidArgumentError if an override's batches are not one window's, and their count matters."""
        if len(batches) <= num_batches and not is_open:
            return
        has_shares = self._unit.shares is not None
        reader = reader_of_gradients(self._trainer.model, [self._trainer.optimizer])
        if has_shares or reader or self._unit.contract.divides:
            remedy = "" if has_shares else ", or let compute_loss return the mean of its micro-batch"
            raise InvalidArgumentError(
                f"get_batch_samples returned {len(batches)} batches where {num_batches} make an optimizer step, so "
                f"their count is not the count of a step; return that many (fewer at the end of an epoch){remedy}"
            )

    @property
    def _share(self) -> float:
        """What a loss that is divided by the count of the whole window is multiplied by."""
        return self._unit.contract.factor * self._num_averaged

    @property
    def _num_averaged(self) -> int:
        """Divisor of the average over ranks: those with data of their own, unless an engine has another one."""
        engine = self._trainer.accelerator.windows.engine
        if engine is not None:
            return int(engine.num_averaged)
        return int(self._trainer.accelerator.num_processes // self._trainer.get_tp_size())

    # ---- In a micro-batch ----

    def micro_batch(self, inputs: Any, count: Any) -> MicroBatch:
        """The record of a micro-batch that begins, with ``num_items_in_batch`` as the Trainer's loop hands it over."""
        trainer = self._trainer
        micro_batch = MicroBatch(
            is_padding=self._batches.is_padding(inputs),
            is_given_share=self.is_first and count is not None,
            divisor=torch.ones((), device=trainer.args.device),
            division=self._division,
        )
        if is_users(trainer, "training_step"):  # it may call backward for parts of these inputs, or prepare them itself
            micro_batch.drawn = inputs
            micro_batch.count_late = lambda: self.count_drawn(micro_batch)
        return micro_batch

    def count_drawn(self, micro_batch: MicroBatch) -> None:
        """Count the targets of the batch as it was drawn, where a user's step has not prepared it."""
        if micro_batch.num_targets is None and micro_batch.drawn is not None:
            self._set(micro_batch, self._unit.count(micro_batch.drawn))

    def count(self, micro_batch: MicroBatch, inputs: Any) -> Tensor:
        """Count the targets of inputs: the micro-batch's own, unless they are a part of it."""
        num_targets = self._unit.count(inputs)
        if micro_batch.num_targets is None:
            if micro_batch.drawn is not None and _num_rows(inputs) != _num_rows(micro_batch.drawn):
                self.count_drawn(micro_batch)
            else:
                self._set(micro_batch, num_targets)
        return num_targets

    def _set(self, micro_batch: MicroBatch, num_targets: Tensor) -> None:
        assert self._unit.counter is not None
        weight = self._unit.counter.weight(num_targets)
        # A router loss counts where nothing else does.
        micro_batch.count(num_targets, weight if self._unit.shares is None else weight.clamp(min=1))
        self.choose(micro_batch, has_count=micro_batch.has_count)

    def choose(self, micro_batch: MicroBatch, *, has_count: bool) -> None:
        """Choose the weight of a loss that was given a count or not: without, one that divides by it is a mean."""
        own, micro_batch.has_count = micro_batch.own_weight, has_count
        if own is None:
            return
        if self._unit.shares is not None and self._unit.shares.gives_share:
            micro_batch.is_share = micro_batch.is_divided = True
            micro_batch.weight = torch.full_like(self._zero, self._num_averaged)
            return
        contract = LossContract(self._unit.model_divides) if micro_batch.is_models else self._unit.contract
        divides = contract.divides and has_count
        micro_batch.is_divided = has_count and (contract.divides or self._unit.model_divides)
        is_window_count = not (micro_batch.is_models and micro_batch.has_other_count)
        micro_batch.is_share = divides and micro_batch.is_given_share and is_window_count
        if micro_batch.is_share:
            micro_batch.weight = torch.full_like(self._zero, contract.factor * self._num_averaged)
        else:
            factor = contract.factor if divides or not contract.divides else 1.0
            micro_batch.weight = own if factor == 1 else own * factor

    def choose_models(self, micro_batch: MicroBatch, given: Any, handed: Any) -> None:
        """Choose the weight of a loss that a step asked the model for, with the count it was handed or another."""
        is_another = micro_batch.is_given_share and given is not None and given is not handed
        micro_batch.is_models, micro_batch.has_other_count = True, is_another and float(given) != float(handed)
        self.choose(micro_batch, has_count=given is not None)

    def own_count(self, micro_batch: MicroBatch | None, inputs: Any, given: Tensor) -> Tensor:
        """The count with which a model that takes one returns the mean over these inputs' own targets."""
        if micro_batch is not None and not self._unit.may_be_asked_for_parts:
            assert micro_batch.divisor is not None
            return micro_batch.divisor
        return given if self._unit.counter is None else self._unit.count(inputs).clamp(min=1)

    def part(self, micro_batch: MicroBatch | None, inputs: Any, loss: Tensor, given: Tensor) -> Tensor:
        """Turn the mean over these inputs into their part of the micro-batch's, as a division by its count would.

        A user's override may call ours for parts of a micro-batch, with its count; ``given`` is that outside of
        training.
        """
        if self._unit.counter is None:
            return loss
        whole = self._unit.asked if micro_batch is None else micro_batch.divisor
        own = self._unit.count(inputs).clamp(min=1)
        return loss * on_device(own / (given if whole is None else whole), loss.device).to(loss.dtype)


def _num_rows(inputs: Any) -> int | None:
    try:
        return count_rows(inputs)
    except TargetCountError:
        return None
