"""Evaluation loss as one mean over all targets, the same for every batch size and number of ranks."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from hf_gradutils._collectives import all_reduce_, world_domain
from hf_gradutils.accelerator import MicroBatch
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets import trl, trl_generating
from hf_gradutils.targets.counter import check_count
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows
from hf_gradutils.trainer._filled import FilledBatch, MarkedLoader, marking_filled_batches
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.trainer._shares import Seen


class EvaluationLoss:
    """Sums of n·L and n over the samples of an evaluation, each once, divided at its end."""

    def __init__(self, trainer: Any, unit: LossUnit):
        self._trainer = trainer
        self._unit = unit
        self._sums: list[Tensor] | None = None
        """(n, n·L) of each batch that this rank has evaluated, float64; None while it does not evaluate."""
        self._batch = MicroBatch()
        self._seen: list[Seen] = []
        """Of the latest loss, where it is a sum of several means."""
        self._loader: Any = None

    @contextlib.contextmanager
    def over(self, loader: Any) -> Iterator[Any]:
        """The context of an evaluation; gives the loader to evaluate, with the batches of this one."""
        if trl_generating.makes_batches(self._trainer):  # what a loss without copies would do once more
            yield loader
            return
        with marking_filled_batches(loader) as marked:
            self._sums, self._loader = [], marked
            try:
                yield marked
            finally:
                self._loader = None

    def finish(self, *, is_wanted: bool) -> float | None:
        """Σ n·L / Σ n over all ranks; None if a subclass predicts without us. Collectives: one all-reduce if wanted."""
        sums, self._sums = self._sums, None
        if not (sums and is_wanted):
            return None
        if self._unit.means is not None:
            totals = all_reduce_(world_domain(), torch.stack(sums).sum(0).flatten())
            return float(self._unit.means.mean_of(*totals.reshape(2, -1)))
        count, weighted_loss = all_reduce_(world_domain(), torch.stack(sums).sum(0)).tolist()
        check_count(count)
        return weighted_loss / count if count else math.nan

    @contextlib.contextmanager
    def in_batch(self) -> Iterator[None]:
        """The context of a batch's loss."""
        self._batch = MicroBatch()
        with self._unit.alone(), self._seeing_terms():
            yield

    @contextlib.contextmanager
    def _seeing_terms(self) -> Iterator[None]:
        self._seen = []
        with self._unit.means.seeing(self._seen) if self._unit.means is not None else contextlib.nullcontext():
            yield

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Count the targets where the loss is computed: context parallelism cuts labels to this rank's part before."""
        if self._sums is not None and self._unit.counter is not None:
            self._batch.num_targets = self._unit.count(inputs)

    def add(self, model: nn.Module, inputs: Mapping[str, Any], loss: Tensor | None) -> None:
        """Add a batch and its own mean loss."""
        if loss is None or self._sums is None:
            return
        self._unit.settle_once(inputs)
        trainer, unit = self._trainer, self._unit
        if trainer.whole_batch_loss is not None and not is_divisible(inputs):
            number = loss.new_full((), find_batch_size(inputs) or 1, dtype=torch.float64)
            self._sums.append(torch.stack((number, loss * number)))
            return
        num_rows = count_rows(inputs, num_blocks=trl.num_blocks(trainer))
        filled = self._filled
        # Without padding, the samples follow each other in one row; a last batch that has copies is full.
        num_flattened = trainer.args.eval_batch_size if num_rows == 1 and "position_ids" in inputs else 1
        num_real_rows = filled.num_real_rows if filled else self._num_real_rows(max(num_rows, num_flattened))
        if num_real_rows is not None:
            # The last batch is filled up with copies of samples: compute the loss without them.
            take = self._without_copies if num_flattened == 1 else self._without_flattened_copies
            inputs = trainer._prepare_inputs(take(inputs, num_real_rows))
            num_items = unit.count(inputs).clamp(min=1).float()
            with (
                torch.no_grad(),
                trainer.compute_loss_context_manager(),
                trl.loss_only(trainer),
                unit.alone(),
                self._seeing_terms(),
            ):
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items).detach().mean()
        if unit.means is not None:
            if not self._seen:
                raise LossUnitError(
                    "the loss of training is a sum of several means, and that of this evaluation is not; let "
                    "compute_loss return the same terms, and the model get all labels"
                )
            self._sums.append(unit.means.sums_of(self._seen[-1]) * (num_real_rows != 0))
            return
        num_targets = unit.count(inputs) if self._batch.num_targets is None else self._batch.num_targets
        if num_real_rows == 0:
            num_targets = torch.zeros_like(num_targets)
        assert unit.counter is not None
        assert loss is not None
        count = num_targets.to(torch.float64)
        # A loss that is a sum over rows is reported as their mean, which does not depend on the batch size.
        weight = unit.counter.weight(count) * (count != 0) * unit.contract.factor
        self._sums.append(torch.stack((count, torch.where(weight == 0, 0.0, loss.to(torch.float64) * weight))))

    @property
    def _filled(self) -> FilledBatch | None:
        """What is known about this batch of an iterable dataset, if it has copies on any rank."""
        return self._loader.filled if isinstance(self._loader, MarkedLoader) else None

    def _num_real_rows(self, num_rows: int) -> int | None:
        """Rows of this rank's batch that are no copies; None on every rank if there are no copies on any."""
        accelerator = self._trainer.accelerator
        state, num_ranks = accelerator.gradient_state, num_data_ranks(self._trainer)
        if num_ranks == 1 or not state.end_of_dataloader or not 0 < state.remainder < num_rows * num_ranks:
            return None
        data_rank = accelerator.process_index // (accelerator.num_processes // num_ranks)
        return max(0, min(num_rows, state.remainder - data_rank * num_rows))

    def _without_copies(self, inputs: Mapping[str, Any], num_real_rows: int) -> dict[str, Any]:
        num_blocks = trl.num_blocks(self._trainer)
        if is_divisible(inputs, num_blocks=num_blocks):
            return take_rows(inputs, 0, max(num_real_rows, 1), num_blocks=num_blocks)
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return dict(inputs)
        is_copy = torch.arange(len(labels), device=labels.device) >= max(num_real_rows, 1)
        return self._masked(inputs, is_copy.reshape(-1, *[1] * (labels.dim() - 1)))

    def _without_flattened_copies(self, inputs: Mapping[str, Any], num_real_rows: int) -> Mapping[str, Any]:
        """Find where the copies start in a row that may be packed, by the samples of the evaluation set."""
        if num_real_rows in (0, self._trainer.args.eval_batch_size):
            return inputs
        if self._filled is not None:
            samples = self._filled.real_input_ids
        else:
            dataset = self._trainer.callback_handler.eval_dataloader.dataset
            samples = [dataset[i].get("input_ids", ()) for i in range(len(dataset) - num_real_rows, len(dataset))]
        real = torch.cat([torch.as_tensor(sample) for sample in samples]).to(inputs["input_ids"].device)
        if not len(real) or not torch.equal(real, inputs["input_ids"][0, : len(real)]):
            raise TargetCountError(
                f"the last batch does not start with the last {num_real_rows} samples of the evaluation set, one after "
                "the other; evaluate in the order of the set, or with padding"
            )
        return self._masked(inputs, torch.arange(inputs["labels"].shape[1], device=real.device) >= len(real))

    def _masked(self, inputs: Mapping[str, Any], is_copy: Tensor) -> dict[str, Any]:
        assert self._unit.counter is not None
        labels = inputs["labels"]
        return {**inputs, "labels": labels.masked_fill(is_copy.to(labels.device), self._unit.counter.ignore_index)}


def num_data_ranks(trainer: Any) -> int:
    """Ranks, or groups of ranks, that see batches of their own: shards of rows in training, and rows in evaluation."""
    return int(trainer.accelerator.num_processes // (trainer.get_tp_size() * trainer.get_cp_size()))
