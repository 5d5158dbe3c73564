"""A Trainer as the subject of a check of invariance."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_gradutils._precision import uses_exact_arithmetic
from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._advice import advice_for_ours, advice_for_stock, advice_if_few_are_wrong
from hf_gradutils.invariance._agreement import of_first_rank, on_all_ranks
from hf_gradutils.invariance._as_before import accelerator_untouched, attributes_kept, gradients_kept, seed_all
from hf_gradutils.invariance._causes import cause_in_stock, fix_for_stock
from hf_gradutils.invariance._modes import modes_of_trainer
from hf_gradutils.invariance._one_batch import cut
from hf_gradutils.invariance._rows import TrainRows
from hf_gradutils.invariance._stock import Backwards, as_stock
from hf_gradutils.invariance._subjects import Rows, finish_step, in_float64, mean_over_ranks
from hf_gradutils.sync import discard_deferred
from hf_gradutils.targets.known_heads import whole_batch_head
from hf_gradutils.targets.sentence_losses import kind_of, losses_of
from hf_gradutils.targets.trl_generating import off_policy
from hf_gradutils.upstream.deepspeed import is_engine
from hf_gradutils.upstream.transformers import head_of, trainer_no_sync
from hf_gradutils.upstream.trl import TRL_AUXILIARY


class TrainerSubject:
    """A Trainer that is about to train."""

    setting = "as you train: "

    def __init__(self, trainer: Any):
        if any(kind in trainer.args.optim for kind in ("lomo", "layerwise")):
            raise InvalidArgumentError(
                f"optim={trainer.args.optim!s} steps inside backward, so no gradient is left to compare; check with "
                "another optimizer"
            )
        self.trainer = trainer
        self.model = trainer.model_wrapped
        self.training_modes = modes_of_trainer(self.model)
        self.accelerator = trainer.accelerator
        self.is_ours = isinstance(trainer.accelerator, GradUtilsAccelerator)
        self.num_ranks = self.accelerator.num_processes
        self.is_exact = uses_exact_arithmetic(self.accelerator, self.model)
        self.accumulation = max(1, int(trainer.args.gradient_accumulation_steps))
        self.every_cut_decides = self.is_ours
        self.fix = "" if self.is_ours else fix_for_stock(trainer)
        self.is_split = trainer.args.gradient_accumulation_steps > 1
        self.keeps_auxiliary = self.is_ours and trainer.grad_plugin.aux == "exact"
        has_own = getattr(trainer, "whole_batch_loss", None) is not None or self.keeps_auxiliary
        has_own |= any(kind_of(loss) == "whole" for loss in losses_of(trainer).values())
        self.compares_rows = has_own or whole_batch_head(head_of(trainer)) is not None
        num_sharers = _size(trainer, "get_tp_size") * _size(trainer, "get_cp_size") * _size(trainer, "get_sp_size")
        self.num_data_ranks = self.num_ranks // num_sharers
        self.data_rank = self.accelerator.process_index // num_sharers
        self._data = TrainRows(trainer)
        if self._data.num_datasets > 1:
            self.setting = f"as you train (the first of {self._data.num_datasets} datasets): "
        self._drawn: Any = None
        """The batch of all rows, of which the others are cut, if its collator draws."""
        self._num_drawn = 0
        self._backwards = Backwards()

    @property
    def has_two_passes(self) -> bool:
        """As :attr:`Subject.has_two_passes`."""
        shares = self.trainer._unit.shares if self.is_ours else None
        return shares is not None and shares.compares_passes

    def rows(self, num_rows: int) -> Rows:
        return of_first_rank(lambda: self._data.some(num_rows))

    def collate_once(self, rows: Rows) -> None:
        """Draw what the collator draws for these rows, of all ranks, once for all runs. Some collectives."""
        self._drawn, self._num_drawn = of_first_rank(lambda: self._data.drawn_batch(rows)), len(rows)

    def _batches(self, parts: Sequence[Rows], seed: int) -> list[Any]:
        """Of this rank's rows; each run begins at its first one."""
        if self._drawn is None:
            return [self._data.collate(rows, seed) for rows in parts]
        num_own = self._num_drawn // self.num_data_ranks
        batches, start = [], 0
        for part in parts:
            start = start if start + len(part) <= num_own else 0
            first = self.data_rank * num_own + start
            batches.append(cut(self._drawn, self._num_drawn, first, first + len(part)))
            start += len(part)
        return batches

    def run(self, parts: Sequence[Rows], seed: int) -> float:
        discard_deferred(self.model)
        if self.is_ours:
            self.accelerator.windows.forget()
            self.trainer._start_over()
        batches = on_all_ranks(lambda: self._batches(parts, seed))
        loss = self._run_micro_batches(self.model, batches, seed)
        if not self.is_ours:
            return mean_over_ranks(loss)
        self.trainer._get_grad_norm(self.model)
        return finish_step(self.accelerator, self.model)

    def alone(self, model: nn.Module, rows: Rows, seed: int, *, wide: bool) -> float:
        num = self._num_drawn
        batch = self._data.collate(rows, seed) if self._drawn is None else cut(self._drawn, num, 0, num)
        if wide:
            batch = in_float64(batch)
        stock = as_stock(self.trainer, model, self._own_count(batch), keeps_count=not self.is_ours)
        with attributes_kept(self.trainer), stock as self._backwards:
            return float(self._run_micro_batches(model, [batch], seed))

    def _own_count(self, batch: Any) -> torch.Tensor | None:
        """The count that our Trainers hand to a loss function: it knows whether the head shifts."""
        if not self.is_ours or self.trainer.compute_loss_func is None:
            return None
        count: torch.Tensor = self.trainer._unit.counter(batch)
        return count.clamp(min=1)

    def _run_micro_batches(self, model: nn.Module, batches: list[Any], seed: int) -> torch.Tensor:
        """Forward and backward of each, as Trainer's loop runs them; returns the sum of this rank's losses."""
        trainer = self.trainer
        trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = len(batches)
        samples, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        for index, inputs in enumerate(samples):
            is_last = index == len(batches) - 1
            self.accelerator.sync_gradients = is_last
            defers = not is_last and not self.is_ours
            seed_all(seed)
            with trainer_no_sync(trainer, model) if defers else contextlib.nullcontext():
                total += trainer.training_step(model, inputs, num_items)
        return total

    def advice(self, factor: float | None) -> str:
        advise = advice_for_ours if self.is_ours else advice_for_stock
        return advise(self.trainer, factor, self._backwards)

    def cause(self, scale: float, num_parts: int) -> str:
        return "" if self.is_ours else cause_in_stock(self.trainer, scale, num_parts, self.num_data_ranks)

    def advice_if_few_are_wrong(self) -> str:
        return advice_if_few_are_wrong(self.trainer, is_ours=self.is_ours)

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        trainer = self.trainer
        callbacks = trainer.callback_handler.callbacks
        with (
            attributes_kept(trainer, trainer.state, trainer.control, trainer.args),
            gradients_kept(_beside_model(trainer)),
            accelerator_untouched(self.accelerator, self.model, keeps_auxiliary=self.keeps_auxiliary),
        ):
            trainer.callback_handler.callbacks = []
            if is_engine(self.model):
                trainer.args.max_grad_norm = 0.0  # as its engine does in a check
            vars(trainer)["log"] = lambda *args, **kwargs: None
            if not self.keeps_auxiliary:
                vars(trainer).update({name: False for name in TRL_AUXILIARY if name in vars(trainer)})
            vars(trainer).update(off_policy(trainer))
            try:
                yield
            finally:
                trainer.callback_handler.callbacks = callbacks


def _beside_model(trainer: Any) -> list[nn.Parameter]:
    """Parameters of the optimizer that are not the model's, such as those of a loss."""
    of_model = {id(p) for p in trainer.model.parameters()}
    if trainer.optimizer is None or is_engine(trainer.model_wrapped):  # an engine's are partitions of the model's
        return []
    groups = trainer.optimizer.param_groups
    return [p for group in groups for p in group["params"] if id(p) not in of_model]


def _size(trainer: Any, name: str) -> int:
    return int(getattr(trainer, name)()) if hasattr(trainer, name) else 1
