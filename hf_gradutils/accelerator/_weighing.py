"""A micro-batch's loss on its way into `.grad`: weighted by its targets, counted once, and reduced."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils._collectives import add_up, world_domain
from hf_gradutils.accelerator._counted_first import HOW_TO_START, expect, share_of_terms
from hf_gradutils.accelerator._deepspeed import ONE_LOSS
from hf_gradutils.accelerator._micro_batch import MicroBatch, as_number
from hf_gradutils.accelerator._model_windows import ModelWindow
from hf_gradutils.accelerator._optimizer import innermost
from hf_gradutils.accelerator._padding import is_padding
from hf_gradutils.accelerator._readers import reader_of_gradients
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.sync import communicates, reduces_in_one_dtype
from hf_gradutils.targets.probe import LATER_STEPS
from hf_gradutils.targets.terms import Terms
from hf_gradutils.upstream.accelerate import optimizers_of
from hf_gradutils.upstream.torch import grads_of
from hf_gradutils.window import AccumulationWindow, loss_scale_for

logger = logging.getLogger("hf_gradutils.accelerator")

_AGAIN = (
    "a second backward before the optimizer step: if it is another loss of the same batch, put both into `with "
    "accelerator.accumulate(model):`, where they add up; if it is another micro-batch, say how many there are "
    "(gradient_accumulation_steps) and put each into one of its own"
)


def run_backward(
    accelerator: Accelerator,
    windows: Windows,
    loss: Tensor | Terms,
    num_targets: Tensor | int | None,
    model: nn.Module | Sequence[nn.Module] | None,
    kwargs: dict[str, Any],
) -> None:
    """:meth:`GradUtilsAccelerator.backward`."""
    if windows.engine is None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InvalidArgumentError(
            "DeepSpeed's engine is gone, or was never made: call accelerator.prepare(model, optimizer, loader) first. "
            "Under DeepSpeed a Trainer can train only once, the stock Trainer too: make a new one"
        )
    micro_batch = windows.micro_batch or MicroBatch()
    if not isinstance(loss, Tensor):
        loss = share_of_terms(windows, windows.of_loss(model), loss, num_targets, micro_batch)
        num_targets = None
    loss = loss.reshape(()) if loss.numel() == 1 else loss
    if micro_batch.count_late is not None and micro_batch.num_targets is None:
        micro_batch.count_late()
    targets, weight, is_share = micro_batch.num_targets, micro_batch.weight, micro_batch.is_share
    if num_targets is not None:
        targets = weight = as_number(num_targets, loss.device)
        is_share = False
    if targets is None or weight is None:
        raise TargetCountError(
            "the number of targets of this micro-batch is missing; call "
            "accelerator.backward(loss, num_targets=(labels != -100).sum())"
        )
    if micro_batch.is_padding or is_padding(accelerator.gradient_state.active_dataloader):
        targets = weight = torch.zeros_like(targets)
    window = windows.of_loss(model)
    if not window.reader:  # which may take gradients away
        windows.forget_dropped(window, micro_batch)
    was_bare, window.is_bare = window.is_bare, windows.models is None
    if window.is_open and windows.have_one_micro_batch and was_bare and window.is_bare:
        raise InvalidArgumentError(_AGAIN)
    if windows.engine is not None and window in micro_batch.counted:
        raise InvalidArgumentError(ONE_LOSS)
    if window.is_open and window.needs_counts and window not in micro_batch.counted and windows.engine is None:
        _goes_on(windows, window)
    is_last = bool(kwargs.get("retain_graph")) and _averages_once(windows, window)
    targets = micro_batch.count_once(window, targets, is_last=is_last)
    micro_batch.check_share(loss, looks=window.num_closed in (0, *LATER_STEPS))
    weight = micro_batch.undivided(loss, weight)
    is_reported = micro_batch.division is None
    weighted = _weigh(windows, window, loss, targets, weight, is_share=is_share, is_reported=is_reported)
    learning_rate = kwargs.pop("learning_rate", None)  # of LOMO, which steps in the backward
    kwargs.pop("scale_wrt_gas", None)  # a Trainer's word to DeepSpeed
    reducing = _reducing(windows, window) if accelerator.sync_gradients else contextlib.nullcontext()
    with reducing, windows.outside.in_backward(window):
        # accelerate would divide by the number of micro-batches.
        if windows.engine is not None:
            windows.engine.backward(weighted, is_last=accelerator.sync_gradients, **kwargs)
        elif learning_rate is not None and accelerator.has_lomo_optimizer:
            accelerator.lomo_backward(weighted, learning_rate)
        else:
            weighted.backward(**kwargs)  # type: ignore[no-untyped-call]


def _weigh(
    windows: Windows, window: ModelWindow, loss: Tensor, num_targets: Tensor, weight: Tensor, **options: bool
) -> Tensor:
    """Return the loss to call ``backward`` on; the first one opens the window.

    Collectives: two all-reduces in the first call for a model. Host syncs: two in that call.

    Raises:
        InvalidArgumentError: gradients are read in the backward, but the targets of the window are not known.
        TargetCountError: there are gradients that are no sums of this window.
    """
    if not window.is_open and not any(other.is_open for other in windows.by_models):
        windows.loss_scale.update()
    if not (window.has_scale or window.sums.is_expected):
        _choose_loss_scale(windows, window, num_targets)
    if windows.engine is not None:
        window.reader, window.needs_counts = "", windows.have_one_micro_batch
        if not (window.is_open or window.sums.is_expected or window.needs_counts):
            raise InvalidArgumentError(f"DeepSpeed's engine averages and steps by itself: {HOW_TO_START}")
    elif window.needs_counts is None:
        window.reader = reader_of_gradients(window.whole, optimizers_of(windows.accelerator))
        window.needs_counts = _needs_counts(windows, window)
    if window.needs_counts and not (window.is_open or window.sums.is_expected):
        expect(windows, window, num_targets.double().reshape(1).clone())
    if not window.is_open:
        window.is_final = window.sums.is_expected
    windows.outside.check(window)
    if window.reader:
        _check_weights_wait(window)
    if not window.is_open:
        _open(windows, window, loss)
    weighted = window.sums.weigh(loss, num_targets, weight, **options)
    if windows.loss_scale.scaler is None:
        return weighted
    if windows.loss_scale.is_removed:  # not before: optimizers_of keeps what it finds, and looks at gradients
        windows.loss_scale.check_is_on(windows.optimizers_of(window))
    scaled: Tensor = windows.loss_scale.scaler.scale(weighted)
    return scaled


def _open(windows: Windows, window: ModelWindow, loss: Tensor) -> None:
    """Open a window with its first loss. Raises as :func:`_weigh`."""
    if any(not (window.is_final and other.is_final) for other in windows.by_models.sharing(window)):
        raise InvalidArgumentError(
            "two losses train some of the same parameters, each divided by targets of its own, and both windows are "
            "open; add the losses and pass all their models: accelerator.backward(loss, num_targets, model=[a, b]), or "
            "make gradients final with GradUtilsPlugin(counts='first')"
        )
    for optimizer, order in window.ordered:
        if optimizer.order is order:  # of a step that was left out
            optimizer.order = None
    window.ordered.clear()
    is_alone = windows.accelerator.num_processes == windows.num_replicas(window.models)
    is_single = windows.have_one_micro_batch and windows.accelerator.num_processes == 1
    windows.outside.start(window, loss, is_alone=is_alone, is_single=is_single)
    window.is_open = True


def _goes_on(windows: Windows, window: ModelWindow) -> None:
    """Take it that windows have several micro-batches after all, unless the gradients of the first are gone.

    Raises:
        InvalidArgumentError: gradients are read in the backward, which were final only for the first.
    """
    if all(gradient is None for gradient in grads_of(window.parameters())):
        window.sums.discard()
        window.is_open = False
        return
    if window.reader or windows.plugin.counts == "first":
        raise InvalidArgumentError(f"{window.reader or 'counts=first'}: {HOW_TO_START}")
    window.needs_counts = window.is_final = False


def _check_weights_wait(window: ModelWindow) -> None:
    """Raise InvalidArgumentError if what reads gradients in the backward has stepped on those of a part of the window.

    Host syncs: none; torch counts the changes of each tensor.
    """
    num_changes = sum(p._version for p in window.parameters())
    if window.is_open and num_changes != window.num_changes:
        raise InvalidArgumentError(
            f"{window.reader}, and weights have changed in the middle of a window: a step in the backward needs "
            "gradient_accumulation_steps=1, or must wait for the last micro-batch (accelerator.sync_gradients)"
        )
    window.num_changes = num_changes


def _needs_counts(windows: Windows, window: ModelWindow) -> bool:
    """True if windows of one micro-batch must know their targets first; agreed on by all ranks, once for a model.

    Collectives: one all-reduce over all ranks. Host syncs: one.

    Raises:
        InvalidArgumentError: they must, but a window has several micro-batches, or the plugin says otherwise.
    """
    setting = windows.plugin.counts
    steps = any(hasattr(innermost(optimizer), "fused_backward") for optimizer in optimizers_of(windows.accelerator))
    ranks = add_up(world_domain(), windows.accelerator.device, reading=bool(window.reader), stepping=steps)
    if setting == "auto" and windows.have_one_micro_batch and world_domain().num_ranks == 1:
        return True  # nothing is to be waited for, and a weight of 1 suits any backward of the user's own
    if setting != "first" and not ranks["reading"]:
        return False
    reader = window.reader or "a hook on another rank reads gradients in the backward"
    if setting == "streamed":
        raise InvalidArgumentError(
            f"{reader}, but with counts='streamed' gradients are weighted sums until the window ends; set counts='auto'"
        )
    if windows.have_one_micro_batch:
        return True
    if setting == "first" or ranks["stepping"]:
        raise InvalidArgumentError(f"{reader if ranks['reading'] else 'counts=first'}: {HOW_TO_START}")
    logger.warning("%s, and sees sums over targets until a window ends; for true gradients %s", reader, HOW_TO_START)
    return False


def _choose_loss_scale(windows: Windows, window: ModelWindow, num_targets: Tensor) -> None:
    """Keep gradients at the magnitude of a mean, for fp16 and compressing hooks; chosen once, the same on all ranks."""
    window.has_scale = True
    domain, device = world_domain(), windows.accelerator.device
    total = add_up(domain, device, num_targets=num_targets.item())["num_targets"]
    scale = loss_scale_for(total / domain.num_ranks * windows.accelerator.gradient_accumulation_steps)
    window.sums = AccumulationWindow(device, loss_scale=scale, num_replicas=windows.num_replicas(window.models))


def _averages_once(windows: Windows, window: ModelWindow) -> bool:
    """True if only the first backward of a forward is averaged now: by DDP, which the next forward makes ready."""
    wrappers = [wrapper for model in window.models for _, wrapper in windows.prepared.wrappers(model)]
    return any(isinstance(w, DistributedDataParallel) and w.require_backward_grad_sync for w in wrappers)


@contextlib.contextmanager
def _reducing(windows: Windows, window: ModelWindow) -> Iterator[None]:
    """The context of a backward that reduces: one of several in a micro-batch, or one outside any other context."""
    with contextlib.ExitStack() as contexts:
        for model in window.models:
            if windows.models is None and windows.accumulates_wide:
                windows.prepared.half_parameters(model).begin(communicates("defer", is_last=True), is_last=True)
            contexts.enter_context(reduces_in_one_dtype(windows.prepared.wrappers(model)))
        yield
