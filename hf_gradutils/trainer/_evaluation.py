"""Evaluation loss as one mean over all targets, the same for every batch size and number of ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_gradutils._collectives import reduce_packed, world_domain
from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets import trl
from hf_gradutils.targets.counter import check_count
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows
from hf_gradutils.trainer._loss import OwnMeanLossMixin


class EvaluationMixin(OwnMeanLossMixin):
    """``prediction_step`` sums n·L and n over samples; ``evaluation_loop`` divides once."""

    _eval_sums: list[Tensor] | None = None
    """(n, n·L) of each batch that this rank has evaluated, float64; None while it does not evaluate."""
    _evaluated_targets: Tensor | None = None
    """Targets of the batch that :meth:`compute_loss` saw last."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer, with the loss Σ n·L / Σ n over the evaluation set, each sample once."""
        self._eval_sums = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums, self._eval_sums = self._eval_sums, None
        # Empty if a subclass predicts without us: Trainer's mean over samples is kept then.
        if sums and f"{metric_key_prefix}_loss" in output.metrics:
            count, weighted_loss = reduce_packed(world_domain(), torch.stack(sums).sum(0))[0].tolist()
            check_count(count)
            output.metrics[f"{metric_key_prefix}_loss"] = weighted_loss / count if count else math.nan
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """As in Trainer; the loss is also added up for :meth:`evaluation_loop`."""
        if any(inputs.get(name) is not None for name in self.label_names):
            self._settle_once(inputs)
        self._evaluated_targets = None
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **kwargs
        )
        if loss is not None and self._eval_sums is not None:
            self._settle_once(inputs)
            self._add_loss(model, inputs, loss)
        return loss, logits, labels

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """As above; under context parallelism only here are the labels this rank's part of the sequence."""
        if self._eval_sums is not None and self._counter is not None:
            self._evaluated_targets = self._count_targets(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _settle_once(self, inputs: Mapping[str, Any]) -> None:
        if self._counter is None:
            self._settle_unit(inputs, is_split=False)

    def _add_loss(self, model: nn.Module, inputs: Mapping[str, Any], loss: Tensor) -> None:
        num_rows = count_rows(inputs, num_blocks=trl.num_blocks(self))
        # Without padding, the samples follow each other in one row; a last batch that has copies is full.
        num_flattened = self.args.eval_batch_size if num_rows == 1 and "position_ids" in inputs else 1
        num_real_rows = self._num_real_rows(max(num_rows, num_flattened))
        if num_real_rows is not None:
            # Ranks were handed copies of samples to fill up the last batch: ask for the loss without them.
            take = self._without_copies if num_flattened == 1 else self._without_flattened_copies
            batch = self._prepare_inputs(take(inputs, num_real_rows))
            num_items = self._count_targets(batch).clamp(min=1)
            with torch.no_grad(), self.compute_loss_context_manager(), trl.loss_only(self):
                loss = self.compute_loss(model, batch, num_items_in_batch=num_items).detach().mean()
        num_targets = self._evaluated_targets
        if num_targets is None:
            num_targets = self._count_targets(batch if num_real_rows is not None else inputs)
        if num_real_rows == 0:
            num_targets = torch.zeros_like(num_targets)
        assert self._counter is not None
        assert self._eval_sums is not None
        count = num_targets.to(torch.float64)
        # Of a loss that is a sum over rows, the mean over rows is kept: it does not depend on the batch size.
        weight = self._counter.weight(count) * (count != 0)
        self._eval_sums.append(torch.stack((count, torch.where(weight == 0, 0.0, loss.to(torch.float64) * weight))))

    def _without_copies(self, inputs: Mapping[str, Any], num_real_rows: int) -> dict[str, Any]:
        num_blocks = trl.num_blocks(self)
        if is_divisible(inputs, num_blocks=num_blocks):
            return take_rows(inputs, 0, max(num_real_rows, 1), num_blocks=num_blocks)
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return dict(inputs)
        assert self._counter is not None
        is_copy = torch.arange(len(labels), device=labels.device) >= max(num_real_rows, 1)
        masked = labels.masked_fill(is_copy.reshape(-1, *[1] * (labels.dim() - 1)), self._counter.ignore_index)
        return {**inputs, "labels": masked}

    def _without_flattened_copies(self, inputs: Mapping[str, Any], num_real_rows: int) -> Mapping[str, Any]:
        """The samples of the evaluation set say where, in a row that may be packed, the copies start."""
        if num_real_rows in (0, self.args.eval_batch_size):
            return inputs
        dataset = self.callback_handler.eval_dataloader.dataset
        samples = [dataset[i].get("input_ids", ()) for i in range(len(dataset) - num_real_rows, len(dataset))]
        real = torch.cat([torch.as_tensor(sample) for sample in samples]).to(inputs["input_ids"].device)
        if not len(real) or not torch.equal(real, inputs["input_ids"][0, : len(real)]):
            raise TargetCountError(
                f"expected the last batch to start with the last {num_real_rows} samples of the evaluation set, one "
                "after the other, got others; evaluate in the order of the set, or with padding"
            )
        assert self._counter is not None
        is_copy = torch.arange(inputs["labels"].shape[1], device=inputs["labels"].device) >= len(real)
        return {**inputs, "labels": inputs["labels"].masked_fill(is_copy, self._counter.ignore_index)}

    def _num_real_rows(self, num_rows: int) -> int | None:
        """Rows of this rank's batch that are no copies; None on every rank if there are no copies on any."""
        state = self.accelerator.gradient_state
        num_ranks = self._num_data_ranks()
        if num_ranks == 1 or not state.end_of_dataloader or not 0 < state.remainder < num_rows * num_ranks:
            return None
        data_rank = self.accelerator.process_index // (self.accelerator.num_processes // num_ranks)
        return max(0, min(num_rows, state.remainder - data_rank * num_rows))

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """The count that ``prediction_step`` passes to ``compute_loss``: the batch's own."""
        self._settle_once(batch_samples[0])
        return self._count_targets(batch_samples[0]).clamp(min=1)
