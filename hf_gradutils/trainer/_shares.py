"""Losses of which a micro-batch has a share: losses of the whole batch, and sums of several means.

A share is divided by what the whole window has already; the shares of all micro-batches and ranks add up to the loss.
It takes the place of the loss in the outputs of the head, so that whatever computes a loss from them is left alone.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradutils._undisturbed import random_states
from hf_gradutils.accelerator import MicroBatch
from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.probe import LATER_STEPS
from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead, at_forwards_end
from hf_gradutils.trainer._check_shares import check_own_loss
from hf_gradutils.trainer._overrides import is_users
from hf_gradutils.upstream.transformers import without_average
from hf_gradutils.window import TwoPasses

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit

Seen = tuple[Tensors, Tensors]
"""What a micro-batch contributes, and what belongs to it: (rows, shared) or (terms, their counts)."""


class NoLossError(LossUnitError):
    """The outputs of a head have no loss."""


class Shares:
    """Splits a Trainer's loss into shares of a window's. Every rank must call each method at the same time."""

    why = ""
    """The reason for the log."""
    gives_share = True
    """The loss that comes to ``backward`` is the share, of which nothing else may be a part."""
    is_result = False
    """The share is what ``compute_loss`` returns, and not made in the head."""
    compares_passes = False
    """What two passes see of a micro-batch is compared where a window is looked at."""
    can_be_cut = True
    """Batches may be cut between their rows."""

    def __init__(self, trainer: Any, unit: "LossUnit"):
        self._trainer, self._unit = trainer, weakref.proxy(unit)
        self._num_windows = 0

    @property
    def needs_first_pass(self) -> bool:
        """What a window's shares are divided by is known only after a forward of each of its micro-batches."""
        return True

    def counts(self, batch: Any) -> Tensor:
        """What is to be added up over a window's batches before its first forward; shape (n,), float64."""
        return torch.zeros(0, dtype=torch.float64)

    def begin(self, totals: Callable[[], Tensor]) -> None:
        """Begin a window; ``totals`` waits for the sums of :meth:`counts` over all ranks."""
        self._num_windows += 1

    @property
    def _looks(self) -> bool:
        """The micro-batches of this window are looked at."""
        return self._num_windows - 1 in (0, *LATER_STEPS)

    def first(self, model: nn.Module, inputs: Any, *, is_padding: bool) -> None:
        """Run the first pass of the next micro-batch, without gradients."""

    def end_first(self) -> None:
        """Put together what the first pass of all ranks has found."""

    @contextlib.contextmanager
    def second(self, micro_batch: MicroBatch) -> Iterator[None]:
        """The context of a training step on a micro-batch."""
        micro_batch.gives_share = self.gives_share
        yield

    def end(self) -> None:
        """End a window: its last micro-batch has been trained."""

    def in_loss(self, inputs: Any, micro_batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        """The context of ``compute_loss``, outermost, in training."""
        return contextlib.nullcontext()

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        """The loss of a batch as it is without shares, and what the shares are made of."""
        raise NotImplementedError

    def applies(self, model: nn.Module, batch: Any) -> bool:
        """True if a batch's loss is one that needs these shares, and not another of the user's own."""
        try:
            _, (rows, _) = self.look(model, batch)
        except NoLossError:
            if is_users(self._trainer, "compute_loss"):
                return False
            raise
        return bool(rows)

    def _loss_of(self, model: nn.Module, batch: Any) -> Any:
        """What ``compute_loss`` returns, given a count, which code of the user's may read."""
        with without_average(self._trainer.args), self._trainer.compute_loss_context_manager():
            count = torch.ones((), device=self._trainer.args.device)
            return self._trainer.compute_loss(model, batch, num_items_in_batch=count)

    def combine(self, parts: Sequence[Seen]) -> Tensor:
        """The loss of batches together, from what each contributes."""
        raise NotImplementedError


class HeadShares(Shares):
    """Shares that are made from the outputs of a head's forward."""

    _watching: Callable[[nn.Module], contextlib.AbstractContextManager[None]]
    """Head → the context of a forward, where outputs do not have all that shares are made of."""

    def _see(self, head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Seen:
        raise NotImplementedError

    def _own(self, head: nn.Module, outputs: Any) -> Tensor:
        """What the parts of a batch make up together."""
        loss: Tensor = outputs["loss"]
        return loss

    def _share(self, micro_batch: MicroBatch, seen: Seen, outputs: Any) -> Tensor:
        """The loss that takes the place of the outputs' own."""
        raise NotImplementedError

    @contextlib.contextmanager
    def second(self, micro_batch: MicroBatch) -> Iterator[None]:
        head = self._unit.head

        def replace(inputs: Mapping[str, Any], outputs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            if micro_batch.share is not None and self.gives_share:
                raise LossUnitError(f"{type(head).__name__} runs twice in one micro-batch, so that {_NO_SHARE}")
            seen = self._see(head, inputs, outputs)
            if self._looks:
                check_own_loss(self._trainer, self, self._own(head, outputs), seen)
            outputs["loss"] = micro_batch.give(self._share(micro_batch, seen, outputs))

        with super().second(micro_batch), self._watching(head), at_forwards_end(head, replace):
            yield

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        head = self._unit.head
        found: list[tuple[Tensor, Seen]] = []

        def keep(inputs: Mapping[str, Any], outputs: Any) -> None:
            if not isinstance(outputs, Mapping) or "loss" not in outputs:
                raise NoLossError(
                    f"the outputs of {type(head).__name__} have no entry 'loss', so that {_NO_SHARE}. Leave "
                    "return_dict as it is, and give the head all that its loss needs, as return_loss=True; or say what "
                    "a loss of your own is made of, by whole_batch_loss=WholeBatchLoss(embed, loss, parameters) or a "
                    "compute_loss that returns [(loss, count), …]"
                )
            found.append((self._own(head, outputs), self._see(head, inputs, outputs)))

        with self._watching(head), at_forwards_end(head, keep):
            self._loss_of(model, batch)
        if len(found) != 1:
            raise LossUnitError(
                f"the forward of {type(head).__name__} ran {len(found)} times for one loss, so that {_NO_SHARE}; under "
                "torch.compile it is not seen: train without"
            )
        return found[0]


_NO_SHARE = (
    "its share in the loss of a step is unknown; check_loss_unit=False takes the mean of the micro-batches' "
    "losses, which is another loss"
)


class TwoPassShares(Shares):
    """Shares of a loss of the whole batch, whose rows a first pass collects."""

    why = "the loss compares the rows of the whole batch, whose embeddings a first pass without gradients computes"
    compares_passes = True
    _passes: TwoPasses | None = None
    """Of the window, from its first pass to its last share."""

    def loss_of_rows(self, rows: Tensors, shared: Tensors) -> Tensor:
        """The loss of rows of the whole batch, shape ()."""
        raise NotImplementedError

    def begin(self, totals: Callable[[], Tensor]) -> None:
        super().begin(totals)
        self._passes = None  # of a window that was given up

    @property
    def passes(self) -> TwoPasses:
        """Of the window."""
        if self._passes is None:
            self._passes = TwoPasses(self.loss_of_rows, num_replicas=self._trainer.get_tp_size())
        return self._passes

    def first(self, model: nn.Module, inputs: Any, *, is_padding: bool) -> None:
        _, (rows, _) = self.look(model, inputs)
        self.passes.add(rows, is_padding=is_padding)

    def end(self) -> None:
        self._passes = None  # which holds rows, and this object

    def _finish(self, shared: Tensors) -> None:
        """Compute the loss of the window's rows."""
        self.passes.finish(shared)

    def share_of_rows(self, micro_batch: MicroBatch, seen: Seen) -> Tensor:
        """The share of a micro-batch.

        Collectives: those of ``TwoPasses.finish`` in the first of a window, not before: callbacks and a step of the
        user's may set parameters of the loss. Where it is looked at, those of ``TwoPasses.check_equal``.

        Raises:
            LossUnitError: as these.
        """
        if not self.passes.is_finished:
            put_back = random_states(self._trainer.args.device)  # a loss may draw
            self._finish(seen[1])
            put_back()
        if self._looks and self.compares_passes:
            self.passes.check_equal(micro_batch.index, seen[0])
        return self.passes.share(micro_batch.index, *seen)

    def combine(self, parts: Sequence[Seen]) -> Tensor:
        rows = tuple(torch.cat(kind) for kind in zip(*(rows for rows, _ in parts), strict=True))
        return self.loss_of_rows(rows, parts[0][1])


class WholeBatchShares(TwoPassShares, HeadShares):
    """Shares of a head's loss of the whole batch, in two passes."""

    def __init__(self, trainer: Any, unit: "LossUnit", of_head: WholeBatchHead):
        super().__init__(trainer, unit)
        self._watching, self._of_head = of_head.watching, of_head
        self.can_be_cut = of_head.can_be_cut

    def loss_of_rows(self, rows: Tensors, shared: Tensors) -> Tensor:
        return self._of_head.loss(rows, shared)

    def _see(self, head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Seen:
        return self._of_head.rows(head, inputs, outputs), self._of_head.shared(head)

    def _share(self, micro_batch: MicroBatch, seen: Seen, outputs: Any) -> Tensor:
        return self.share_of_rows(micro_batch, seen)
