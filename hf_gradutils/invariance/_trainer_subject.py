"""A Trainer as the subject of a check of invariance."""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils._precision import uses_exact_arithmetic
from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._subjects import Rows, accelerator_untouched, finish_step, mean_over_ranks
from hf_gradutils.sync import discard_deferred
from hf_gradutils.targets import trl
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.rows import count_rows
from hf_gradutils.upstream.transformers import trainer_no_sync
from hf_gradutils.upstream.trl import TRL_METRICS


class TrainerSubject:
    """A Trainer that is about to train."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.model = trainer.model_wrapped
        self.accelerator = trainer.accelerator
        self._is_ours = isinstance(trainer.accelerator, GradUtilsAccelerator)
        self.num_ranks = self.accelerator.num_processes
        self.is_exact = uses_exact_arithmetic(self.accelerator, self.model)
        num_sharers = _size(trainer, "get_tp_size") * _size(trainer, "get_cp_size") * _size(trainer, "get_sp_size")
        self.num_data_ranks = self.num_ranks // num_sharers
        self.data_rank = self.accelerator.process_index // num_sharers
        self.advice = (
            "set GradUtilsPlugin(loss_unit=… or count_targets=…) to what the loss is a mean over"
            if self._is_ours
            else f"{type(trainer).__name__} does not divide by the targets of all micro-batches and ranks here; use "
            "hf_gradutils.GradUtilsTrainer, or GradUtilsTrainerMixin in front of it"
        )
        self._loader = trainer.get_train_dataloader()

    def rows(self, num_rows: int) -> Rows:
        rows = list(itertools.islice(iter(self._loader.dataset), num_rows))
        if len(rows) < num_rows:
            raise InvalidArgumentError(
                f"{num_rows} samples are needed for {self.num_data_ranks} data ranks, but the dataset has "
                f"{len(rows)}; lower num_samples, or use fewer ranks"
            )
        return rows

    def batch(self, rows: Rows) -> Any:
        return self.trainer._prepare_inputs(self._loader.collate_fn(rows))

    def run(self, parts: Sequence[Rows]) -> float:
        trainer, model = self.trainer, self.model
        discard_deferred(model)
        if self._is_ours:
            self.accelerator.windows.forget()
            trainer._start_over()
        batches = [self._loader.collate_fn(rows) for rows in parts]
        trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = len(batches)
        samples, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        for index, inputs in enumerate(samples):
            is_last = index == len(batches) - 1
            self.accelerator.sync_gradients = is_last
            defers = not is_last and not self._is_ours
            with trainer_no_sync(trainer, model) if defers else contextlib.nullcontext():
                total += trainer.training_step(model, inputs, num_items)
        trainer._get_grad_norm(model)
        if self._is_ours:
            return finish_step(self.accelerator, model)
        return mean_over_ranks(total)

    def own_mean(self, model: nn.Module, batch: Any) -> Tensor:
        trainer = self.trainer
        count = self.counter(model)(batch).clamp(min=1) if trainer.compute_loss_func is not None else None
        # Only this rank computes the loss, so nothing may be gathered.
        with (
            self._averaging_no_tokens(),
            trl.loss_only(trainer, with_auxiliary=False),
            trainer.compute_loss_context_manager(),
        ):
            loss: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        return loss

    def counter(self, model: nn.Module) -> TargetCounter:
        if self._is_ours:
            return self.trainer._unit.counter  # type: ignore[no-any-return] # settled by the first run
        return TargetCounter(count=self._stock_count)

    def _stock_count(self, batch: Mapping[str, Any]) -> Tensor:
        with self._averaging_no_tokens():
            count = self.trainer._get_num_items_in_batch([batch], self.trainer.args.device)
        return torch.as_tensor(count_rows(batch) if count is None else count)

    @contextlib.contextmanager
    def _averaging_no_tokens(self) -> Iterator[None]:
        args = self.trainer.args
        before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            yield
        finally:
            args.average_tokens_across_devices = before

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        trainer = self.trainer
        attributes = dict(vars(trainer))
        running_loss = trainer._tr_loss.clone() if hasattr(trainer, "_tr_loss") else None
        logged = {name: copy.deepcopy(attributes[name]) for name in TRL_METRICS if name in attributes}
        steps = trainer.args.gradient_accumulation_steps
        try:
            with accelerator_untouched(self.accelerator, self.model):
                yield
        finally:
            trainer.args.gradient_accumulation_steps = steps
            trainer.__dict__ = attributes | logged
            if running_loss is not None:
                trainer._tr_loss.copy_(running_loss)


def _size(trainer: Any, name: str) -> int:
    return int(getattr(trainer, name)()) if hasattr(trainer, name) else 1
