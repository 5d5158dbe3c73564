"""Targets of a window that are counted before its first backward, of one loss or of several terms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_gradutils._collectives import start_all_reduce, world_domain
from hf_gradutils._devices import on_device
from hf_gradutils.accelerator._micro_batch import MicroBatch, as_number
from hf_gradutils.accelerator._model_windows import ModelWindow
from hf_gradutils.accelerator._padding import is_padding
from hf_gradutils.accelerator._readers import reader_of_gradients
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets.terms import Terms, add_terms, check_counted, is_terms, shares_of_totals
from hf_gradutils.upstream.accelerate import optimizers_of

HOW_TO_START = (
    "call accelerator.start_window(num_targets) before the first backward of each window, with this rank's targets of "
    "all its micro-batches"
)


def start_window(
    windows: Windows, window: ModelWindow, num_targets: Tensor, num_micro_batches: int | None = None
) -> None:
    """:meth:`GradUtilsAccelerator.start_window`."""
    if window.is_open:
        raise InvalidArgumentError("start_window was called after the first backward of the window; call it before")
    if window.needs_counts is None:
        window.needs_counts = False
        window.reader = reader_of_gradients(window.whole, optimizers_of(windows.accelerator))
    if num_micro_batches is not None:
        if num_micro_batches < 1:
            raise InvalidArgumentError(f"num_micro_batches must be ≥ 1, got {num_micro_batches}")
        # The loader may have been read ahead, so that its end says nothing.
        windows.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        windows.accelerator.gradient_accumulation_steps, windows.accelerator.step = num_micro_batches, 0
    window.totals = expect(windows, window, num_targets.double().reshape(-1).clone())


def expect(windows: Windows, window: ModelWindow, numbers: Tensor) -> Callable[[], Tensor]:
    """Begin to add up the targets of a whole window over all ranks, so that its gradients are final at once.

    Args:
        windows: Of the Accelerator.
        window: Not open yet.
        numbers: Targets of all its micro-batches on this rank, and other numbers to add up; shape (n,), float64.

    Returns:
        A function that waits for their sums.

    Collectives: one all-reduce over all ranks, which the first backward waits for. Host syncs: none.
    """
    domain = world_domain()
    reduced = start_all_reduce(domain, on_device(numbers, windows.accelerator.device))
    num_averaged = domain.num_ranks if windows.engine is None else windows.engine.num_averaged
    window.sums.expect(lambda: reduced()[0], num_averaged)
    return reduced


def split_terms(terms: Terms) -> tuple[list[Tensor], Tensor]:
    """Losses, shape () each, and their counts, shape (terms,), float64. InvalidArgumentError if one is no count."""
    losses = [loss.reshape(()) for loss, _ in terms]
    return losses, torch.stack([as_number(count, losses[0].device).double() for _, count in terms])


def share_of_terms(
    windows: Windows, window: ModelWindow, terms: Terms, num_targets: Any, micro_batch: MicroBatch
) -> Tensor:
    """The share of a micro-batch in a sum of several means, each divided by the targets of the whole window.

    Collectives: one all-reduce where a window has one micro-batch, and one in the last of the first window.

    Raises:
        InvalidArgumentError: these are no terms, or the targets of the window are not known.
    """
    if num_targets is not None or not is_terms(terms):
        raise InvalidArgumentError(
            "backward takes a loss and num_targets, or a list of terms [(loss, num_targets), …] alone, each loss a "
            "tensor with one element"
        )
    losses, counts = split_terms(terms)
    if micro_batch.is_padding or is_padding(windows.accelerator.gradient_state.active_dataloader):
        counts = torch.zeros_like(counts)
    if not (window.is_open or window.sums.is_expected) and windows.have_one_micro_batch:
        window.totals = expect(windows, window, counts.clone())
    if not window.sums.is_expected or window.totals is None:
        raise InvalidArgumentError(
            "several terms have a weight each, which must be known before the first backward: call "
            "accelerator.start_window([num_targets, …]) before each window, with this rank's targets of each term in "
            "all its micro-batches"
        )
    totals = window.totals() / windows.num_replicas(window.models)
    if len(totals) != len(counts):
        raise InvalidArgumentError(f"the loss has {len(counts)} terms, but start_window was given {len(totals)} counts")
    window.counted = counts if window.counted is None or not window.is_open else window.counted + counts
    if windows.accelerator.sync_gradients and not window.num_closed:
        check_counted(window.counted, window.totals())
    if micro_batch.num_targets is None:
        micro_batch.count(counts[0], counts[0])
    micro_batch.is_share, micro_batch.weight = True, num_averaged(windows, window)
    return add_terms(losses, shares_of_totals(counts, totals))


def num_averaged(windows: Windows, window: ModelWindow) -> Tensor:
    """Divisor of the average over ranks, shape ()."""
    number = float(world_domain().num_ranks / windows.num_replicas(window.models))
    if windows.engine is not None:
        number = float(windows.engine.num_averaged)
    return torch.full((), number, dtype=torch.float64, device=windows.accelerator.device)
