"""Losses of the whole batch that are the user's own, in two passes over a window's batches."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_gradutils._collectives import find_largest, world_domain
from hf_gradutils._undisturbed import buffers_kept, random_states
from hf_gradutils.accelerator._counted_first import num_averaged, start_window
from hf_gradutils.accelerator._micro_batch import MicroBatch, as_number
from hf_gradutils.accelerator._padding import PaddedShard
from hf_gradutils.accelerator._weighing import run_backward
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets.probe import LATER_STEPS
from hf_gradutils.targets.rows import with_own_tensors
from hf_gradutils.targets.whole_batch import Tensors, at_forwards_end
from hf_gradutils.upstream.accelerate import dataloaders_of, models_of
from hf_gradutils.upstream.deepspeed import is_partitioned
from hf_gradutils.upstream.torch import depending_on, finds_unused_parameters
from hf_gradutils.window import TwoPasses


@dataclass(frozen=True, slots=True)
class WholeBatchLoss:
    """A loss that compares all rows of the batch, as contrastive losses do, and what it is computed from.

        loss = WholeBatchLoss(
            embed=lambda model, batch: (model(**batch["question"]), model(**batch["answer"])),
            loss=lambda questions, answers, scale: cross_entropy(questions @ answers.T * scale, arange(len(answers))),
            parameters=lambda model: (model.scale,),
        )
        GradUtilsTrainer(…, whole_batch_loss=loss)              # or, in a loop of your own, for each window:
        accelerator.backward_whole_batch(loss, batches)

    ``embed`` runs twice on each micro-batch with the same random numbers: without gradients, until the rows of all
    micro-batches and ranks are there, and again for the backward. Memory is that of one micro-batch, of the rows, and
    of their loss, which every rank computes for all. More ranks and more accumulation compare more rows with each
    other.
    """

    embed: Callable[[nn.Module, Any], Tensor | Sequence[Tensor]]
    """(model, batch) → rows of this micro-batch: one tensor or several, whose first dimensions follow each other over
    micro-batches and ranks. What is no embedding, such as labels, may be among them."""
    loss: Callable[..., Tensor]
    """(rows of the whole batch, in the order of ``embed``, then the parameters) → the loss, shape (). In float32 or
    wider, outside autocast."""
    parameters: Callable[[nn.Module], Sequence[Tensor]] | None = None
    """Model, without wrappers → parameters that the loss reads besides, such as a temperature."""

    def rows_of(self, model: nn.Module, batch: Any, whole: nn.Module) -> tuple[Tensors, Tensors]:
        """The rows of a batch, and the parameters; ``whole`` is the model without wrappers."""
        parameters = tuple(self.parameters(whole)) if self.parameters is not None else ()
        if not all(isinstance(value, Tensor) for value in parameters):
            raise InvalidArgumentError("WholeBatchLoss.parameters must return tensors, such as (model.scale,)")
        with self._counting_as_used(model, whole, parameters):
            found = self.embed(model, batch)
        rows = (found,) if isinstance(found, Tensor) else found
        if not isinstance(rows, tuple | list) or not all(isinstance(kind, Tensor) and kind.dim() for kind in rows):
            raise InvalidArgumentError(
                "WholeBatchLoss.embed must return a tensor of rows or several, which have a dimension or more each, "
                f"got {type(found).__name__}; what does not belong to rows goes to parameters"
            )
        # Again: FSDP2 has sharded those that the forward saw whole.
        return tuple(rows), tuple(self.parameters(whole)) if self.parameters is not None else ()

    def _counting_as_used(
        self, model: nn.Module, whole: nn.Module, parameters: Tensors
    ) -> contextlib.AbstractContextManager[None]:
        """The context of forwards under DDP, which would take a parameter that only the loss reads for unused."""
        trained = [value for value in parameters if value.requires_grad]
        if not (trained and torch.is_grad_enabled() and finds_unused_parameters(model)):
            return contextlib.nullcontext()
        return at_forwards_end(whole, lambda _, outputs: depending_on(outputs, trained))

    def of_rows(self, rows: Tensors, parameters: Tensors) -> Tensor:
        """The loss of rows, shape ()."""
        loss = self.loss(*rows, *parameters)
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise InvalidArgumentError(
                f"WholeBatchLoss.loss must return one number, got {loss.shape if isinstance(loss, Tensor) else loss!r}"
            )
        return loss.reshape(())


class WholeBatchAccelerator(Accelerator):  # type: ignore[misc]
    """The part of ``GradUtilsAccelerator`` for losses of the whole batch."""

    windows: Windows

    def backward_whole_batch(
        self, loss: WholeBatchLoss, batches: Sequence[Any], *, model: nn.Module | None = None, **kwargs: Any
    ) -> Tensor:
        """Both passes over the micro-batches of a window, with all their backwards; then clip and step.

        Args:
            loss: The loss, and what it is computed from.
            batches: This rank's micro-batches of the window, as many on every rank.
            model: That is trained; default: the only one that was prepared.
            **kwargs: For each backward, as accelerate takes them.

        Returns:
            The loss of the whole batch, shape (), detached; the same on every rank.

        Collectives: two all-gathers and two small all-reduces over all ranks, beside those of the forwards and
            backwards, and one for each parameter that FSDP2 shards; in the first window, and after 1, 10, 100 and
            1,000, one for each micro-batch. Host syncs: two, and in those windows a few for each micro-batch.

        Raises:
            InvalidArgumentError: the window has begun; ranks have different numbers of micro-batches, or padding; or
                the loss reads a parameter that it is not given; or DeepSpeed's ZeRO 3 partitions the model.
            LossUnitError: the two forwards of a micro-batch differ.
        """
        return _backward(self, loss, batches, model, kwargs)


def _backward(
    accelerator: WholeBatchAccelerator,
    loss: WholeBatchLoss,
    batches: Sequence[Any],
    model: nn.Module | None,
    kwargs: dict[str, Any],
) -> Tensor:
    batches, windows = list(batches), accelerator.windows
    window = windows.of_loss(model)
    if window.is_open:
        raise InvalidArgumentError("backward_whole_batch runs all backwards of a window; step before the next")
    _check_batches(accelerator, len(batches))
    if model is None:
        model = next(m for m in models_of(accelerator) if any(p.requires_grad for p in m.parameters()))
    model = windows.prepared.outermost(model)
    whole = accelerator.unwrap_model(model)
    if any(map(is_partitioned, whole.parameters())):
        raise InvalidArgumentError(
            "backward_whole_batch is not exact with DeepSpeed's ZeRO 3, which expects a backward for each forward; use "
            "ZeRO 2, or FSDP2"
        )
    passes = TwoPasses(loss.of_rows, num_replicas=windows.num_replicas((model,)))
    states = []
    with torch.no_grad(), buffers_kept(model):
        for batch in batches:
            states.append(random_states(accelerator.device))
            rows, parameters = loss.rows_of(model, with_own_tensors(batch), whole)
            passes.add(rows)
    num_rows, value = passes.num_rows, passes.finish(parameters)
    start_window(windows, window, as_number(num_rows, accelerator.device))
    before = accelerator.sync_gradients
    try:
        for index, (batch, put_back) in enumerate(zip(batches, states, strict=True)):
            accelerator.sync_gradients = is_last = index == len(batches) - 1
            micro_batch = MicroBatch(is_share=True, gives_share=True, weight=num_averaged(windows, window))
            with windows.training((model,), micro_batch), windows.sync_context(model, is_last=is_last):
                put_back()
                rows, parameters = loss.rows_of(model, batch, whole)
                if window.num_closed in (0, *LATER_STEPS):
                    passes.check_equal(index, rows)
                if not (window.num_closed or index):
                    passes.check_reads_rows_only(rows, parameters)
                micro_batch.num_targets = as_number(len(rows[0]), accelerator.device)
                share = micro_batch.give(passes.share(index, rows, parameters))
                run_backward(accelerator, windows, share, None, model, dict(kwargs))
    except BaseException:
        accelerator.sync_gradients = before  # else accelerate would leave out the next step
        windows.discard(window)
        raise
    return value


def _check_batches(accelerator: Accelerator, num_batches: int) -> None:
    """Raise InvalidArgumentError, on all ranks, if some have other numbers of micro-batches, or padding among them."""
    numbers = find_largest(world_domain(), accelerator.device, most=num_batches, minus_fewest=-num_batches)
    most, fewest = numbers["most"], -numbers["minus_fewest"]
    if most != fewest or not most:
        raise InvalidArgumentError(
            f"the ranks have {fewest:.0f} to {most:.0f} micro-batches for one window; give each rank as many, at least "
            "one: their forwards communicate. They may have different numbers of rows"
        )
    if any(isinstance(getattr(loader, "batch_sampler", None), PaddedShard) for loader in dataloaders_of(accelerator)):
        raise InvalidArgumentError(
            "backward_whole_batch would take batches that join_uneven_inputs repeats for data; leave it out, and give "
            "each rank as many micro-batches, which may have different numbers of rows"
        )
