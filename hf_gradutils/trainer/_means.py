"""Shares of sums of several means, each over targets of its own, and their means over an evaluation set."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradutils._devices import on_device
from hf_gradutils.accelerator import MicroBatch
from hf_gradutils.targets.terms import SeveralMeans, add_terms, check_counted, shares_of_totals
from hf_gradutils.targets.whole_batch import at_forwards_end
from hf_gradutils.trainer._shares import HeadShares, Seen, Shares
from hf_gradutils.upstream.accelerate import without_accelerate_state

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit


class MeanShares(Shares):
    """Shares of a sum of several means, whose targets are counted before a window's first forward."""

    evaluates_terms = True
    """Each term is a mean over the targets of the evaluation set; else their sum is one over the unit of the loss."""
    _totals: Callable[[], Tensor] | None = None
    _counted: Tensor | None = None
    """Targets of each term in the micro-batches so far, in a window that is looked at."""

    @property
    def needs_first_pass(self) -> bool:
        return False

    def begin(self, totals: Callable[[], Tensor]) -> None:
        super().begin(totals)
        self._totals, self._counted = totals, None

    def count(self, counts: Tensor) -> None:
        """Count the targets of a micro-batch, to be compared with what was counted before the window."""
        if self._looks:
            self._counted = counts if self._counted is None else self._counted + counts

    def end(self) -> None:
        """Compare what was counted. Collectives and errors: as ``check_counted``, where the window is looked at."""
        if self._counted is not None:
            assert self._totals is not None
            check_counted(self._counted, self._totals())

    @property
    def totals(self) -> Tensor:
        """Targets of each term in the whole window, each sample once; shape (terms,), float64."""
        assert self._totals is not None
        return self._totals() / self._trainer.get_tp_size()

    def divisors(self, counts: Tensor) -> Tensor:
        """What each term is divided by, of its targets: mostly themselves."""
        return counts

    def add(self, seen: Seen, totals: Tensor) -> Tensor:
        """The part of a micro-batch's terms in the means over all targets."""
        terms, counts = seen[0], on_device(torch.stack(seen[1]), totals.device)
        return add_terms(terms, shares_of_totals(self.divisors(counts), self.divisors(totals)))

    def combine(self, parts: Sequence[Seen]) -> Tensor:
        totals = torch.stack([torch.stack(counts) for _, counts in parts]).sum(0)
        return torch.stack([self.add(part, totals) for part in parts]).sum()

    # ---- Evaluation ----

    def seeing(self, seen: list[Seen]) -> contextlib.AbstractContextManager[None]:
        """The context of a loss, whose terms and counts are appended."""
        raise NotImplementedError

    def sums_of(self, seen: Seen) -> Tensor:
        """What adds up over batches: counts, and terms times their divisors; shape (2, terms), float64."""
        device = seen[0][0].device
        terms, counts = (torch.stack([value.detach().to(device, torch.float64) for value in kind]) for kind in seen)
        divisors = self.divisors(counts)
        return torch.stack((counts, (terms * divisors).masked_fill(divisors == 0, 0.0)))

    def mean_of(self, counts: Tensor, sums: Tensor) -> Tensor:
        """The sum of the means over all batches, from what has added up."""
        return shares_of_totals(sums, self.divisors(counts)).sum()


class TermShares(MeanShares, HeadShares):
    """Shares of a head's sum of means over different targets, each with a weight of its own."""

    why = "the loss adds means over different targets, which have a weight each"

    def __init__(self, trainer: Any, unit: "LossUnit", of_head: SeveralMeans):
        super().__init__(trainer, unit)
        self._watching, self._of_head = of_head.watching, of_head

    def counts(self, batch: Any) -> Tensor:
        return self._of_head.counts(self._unit.head, batch)

    def divisors(self, counts: Tensor) -> Tensor:
        return self._of_head.divisors(counts)

    @contextlib.contextmanager
    def second(self, micro_batch: MicroBatch) -> Iterator[None]:
        with self._dividing_by_own_boxes(), super().second(micro_batch):
            yield

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        with self._dividing_by_own_boxes():
            return super().look(model, batch)

    def _dividing_by_own_boxes(self) -> contextlib.AbstractContextManager[None]:
        return without_accelerate_state() if self._of_head.counts_boxes else contextlib.nullcontext()

    def _see(self, head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Seen:
        return self._of_head.terms(head, inputs, outputs), self._of_head.counts(head, inputs).unbind()

    def _share(self, micro_batch: MicroBatch, seen: Seen, outputs: Any) -> Tensor:
        self.count(torch.stack(seen[1]) * (not micro_batch.is_padding))
        return self.add(seen, self.totals)

    @contextlib.contextmanager
    def seeing(self, seen: list[Seen]) -> Iterator[None]:
        head = self._unit.head

        def keep(inputs: Mapping[str, Any], outputs: Any) -> None:
            if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
                seen.append(self._see(head, inputs, outputs))

        with self._dividing_by_own_boxes(), self._watching(head), at_forwards_end(head, keep):
            yield
