"""Check that a loss is a mean over the targets counted: on a batch, or on rows of the data set; the same on all ranks.

Every loss is computed on all ranks together and in batches of the same number of rows, so that collectives inside a
model, or in a loss of the user's, fit together; after each equation one all-reduce tells all ranks the outcome.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hf_gradutils._collectives import add_up, all_reduce_, find_largest, world_domain
from hf_gradutils.targets.contrast import contrast_of_cuts, least_contrast
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import UNCHECKED, Additivity, Parts, compare, cut_after, tolerance_for
from hf_gradutils.targets.rows import count_rows, is_divisible, take_rows
from hf_gradutils.targets.sample import DatasetRows, Sample

_NUM_REPEATS = 3
_LARGEST_SCATTER = 10.0
"""A difference up to so many times the scatter of equal forwards says nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the check has found, the same on every rank."""

    kind: Literal["mean", "alike", "apart", "random", "single", "unchecked", "wrong"]
    """``alike``: the equation holds, for parts that do not differ. ``apart``: it fails for rows that the order of the
    data set may keep apart. ``random``: equal forwards differ. ``single``: only the first row counts, and batches have
    one."""
    numbers: str = ""
    """Both sides of the equation if it does not hold, added up over the ranks on which it does not."""


_Outcome: TypeAlias = tuple[Literal["right", "wrong", "failed"], Additivity, str]


class MeanCheck:
    """Checks additivity.

    Args:
        loss_of: (batch, its counter) → the loss that is trained.
        dataset: Gives rows of the data set; called only if they are needed.
        num_blocks: As in :mod:`hf_gradutils.targets.rows`.
        rounding: As for :func:`hf_gradutils.targets.probe.compare`.
        batch_size: Rows of a micro-batch.
    """

    def __init__(
        self,
        loss_of: Callable[[Any, TargetCounter], Tensor],
        dataset: Callable[[], DatasetRows] | None,
        *,
        num_blocks: int,
        rounding: float,
        batch_size: int,
    ):
        self._loss_of = loss_of
        self._num_blocks, self._rounding, self._batch_size = num_blocks, rounding, batch_size
        self._domain = world_domain()
        self.with_autograd = False
        """Losses are computed with gradients, on all ranks, because they failed without on one."""
        self._dataset = dataset
        self._sample: Sample | None = None
        self._is_sampled = dataset is None

    def verify(self, batch: Any, counter: TargetCounter, *, only_if_it_tells: bool = False) -> Verdict:
        """Check the loss on the batch, or where that cannot tell on rows of the data set.

        Args:
            batch: This rank's.
            counter: Batch → targets.
            only_if_it_tells: ``unchecked`` without a forward if the batch cannot tell.

        Collectives: up to ten small all-reduces over all ranks, and those of three forwards, or of up to 18 for a loss
        that fails. Host syncs: one for each of these, and a few per row.
        """
        self._counter = counter
        first, contrast = self._cut(batch)
        if first is not None and contrast >= self._least_contrast:
            kind, additivity, numbers = self._compare(first)
            if kind == "right":
                return Verdict("mean")
            if kind == "wrong":
                if self._is_random(first, additivity):
                    return Verdict("random")
                return Verdict("mean") if self._is_the_cut_at_fault() else Verdict("wrong", numbers)
            first = None
        elif only_if_it_tells:
            return Verdict("unchecked")
        sample = self._agreed_sample()
        if sample is not None:
            return self._verify_on(sample)
        if first is None:
            return Verdict("unchecked")
        kind, additivity, numbers = self._compare(first)
        if kind == "wrong":
            return Verdict("random") if self._is_random(first, additivity) else Verdict("wrong", numbers)
        return Verdict("alike" if kind == "right" else "unchecked")

    def verify_mixed(self, batch: Any, counter: TargetCounter) -> Verdict:
        """Check the loss on rows of the data set of two kinds, in other proportions than a batch may have them.

        Args:
            batch: This rank's first one.
            counter: Batch → targets.

        Returns:
            ``unchecked`` without a forward if the rows are of one kind, or if batches may never mix them so.

        Collectives: up to nine small ones over all ranks, and those of three forwards, of six where rows of a batch
        belong together, or of up to 15 for a loss that fails. Host syncs: as :meth:`verify`.
        """
        if self._dataset is None:
            return Verdict("unchecked")
        self._counter = counter
        self._agreed_sample()  # while the rows are there: later steps may need it
        own = self._dataset().mix(batch, counter, batch_size=self._batch_size, num_blocks=self._num_blocks)
        sample = self._if_on_all_ranks(own)
        verdict = Verdict("unchecked") if sample is None else self._verify_on(sample)
        keeps_apart = verdict.kind == "wrong" and not self._dataset().is_shuffled
        return Verdict("apart", verdict.numbers) if keeps_apart else verdict

    @property
    def _least_contrast(self) -> float:
        return least_contrast(is_rounded=bool(self._rounding))

    def _cut(self, batch: Any) -> tuple[Parts | None, float]:
        """The batch, cut after equally many rows on every rank, and the contrast; None if it cannot be cut on one."""
        blocks = self._num_blocks
        num_rows = count_rows(batch, num_blocks=blocks) if is_divisible(batch, num_blocks=blocks) else 0
        num_rows = -int(find_largest(self._domain, fewest=-num_rows)["fewest"])
        if num_rows < 2:
            return None, 0.0
        batch = take_rows(batch, 0, num_rows, num_blocks=blocks)
        try:
            own = contrast_of_cuts(batch, self._counter, num_blocks=blocks)
        except Exception:  # of the user's count, for a single row
            own = torch.zeros(num_rows - 1, dtype=torch.float64)
        contrast = all_reduce_(self._domain, own) / self._domain.num_ranks
        cut = int(contrast.argmax())
        return cut_after(batch, cut + 1, num_blocks=blocks), float(contrast[cut])

    def _agreed_sample(self) -> Sample | None:
        """Rows of the data set, as many on every rank; None if some rank has none."""
        if not self._is_sampled:
            sample = self._dataset().choose(self._counter, batch_size=self._batch_size) if self._dataset else None
            self._sample = self._if_on_all_ranks(sample)
            self._is_sampled = True
        return self._sample

    def _if_on_all_ranks(self, sample: Sample | None) -> Sample | None:
        """The sample, with the least contrast, if every rank has one with parts of as many rows. One all-gather."""
        first, second = (0, 0) if sample is None else (len(sample.first), len(sample.second))
        contrast = 0.0 if sample is None else sample.contrast
        ranks = find_largest(
            self._domain,
            first=first,
            second=second,
            minus_first=-first,
            minus_second=-second,
            minus_contrast=-contrast,
        )
        is_same = ranks["first"] == -ranks["minus_first"] and ranks["second"] == -ranks["minus_second"]
        return replace(sample, contrast=-ranks["minus_contrast"]) if sample and is_same else None

    def _verify_on(self, sample: Sample) -> Verdict:
        """The cut first: it pads all parts alike. Rows that belong together in a batch only stand the collator."""
        wrong: tuple[Parts, Additivity, str] | None = None
        for make in (lambda: sample.cut(num_blocks=self._num_blocks), sample.collated):
            parts = self._agreed(make)
            if parts is None:
                continue
            kind, additivity, numbers = self._compare(parts)
            if kind == "right":
                return Verdict("mean" if sample.contrast >= self._least_contrast else "alike")
            if kind == "wrong":
                wrong = parts, additivity, numbers
        if wrong is None:
            return Verdict("unchecked")
        parts, additivity, numbers = wrong
        if self._batch_size == 1 and self._sees_the_first_row_only(parts, additivity):
            return Verdict("single")
        return Verdict("random") if self._is_random(parts, additivity) else Verdict("wrong", numbers)

    def _sees_the_first_row_only(self, parts: Parts, additivity: Additivity) -> bool:
        """True if the loss of both parts is that of the first one. One all-reduce."""
        whole, first = (float(self._counter.weight(self._counter(part))) for part in (parts.whole, parts.first))
        differs = not math.isclose(additivity.whole * first, additivity.parts[0] * whole, rel_tol=1e-6)
        return not add_up(self._domain, differs=differs)["differs"]

    def _is_the_cut_at_fault(self) -> bool:
        """True if rows of the data set fail when cut but not when collated: rows of a batch belong together."""
        sample = self._agreed_sample()
        if sample is None or sample.contrast < self._least_contrast:
            return False
        cut, collated = self._agreed(lambda: sample.cut(num_blocks=self._num_blocks)), self._agreed(sample.collated)
        if collated is None or (cut is not None and self._compare(cut)[0] == "right"):
            return False
        return self._compare(collated)[0] == "right"

    def _agreed(self, make: Callable[[], Parts | None]) -> Parts | None:
        try:
            parts = make()
        except Exception:  # of the user's collator
            parts = None
        able = add_up(self._domain, able=parts is not None)["able"]
        return parts if able == self._domain.num_ranks else None

    def _compare(self, parts: Parts) -> _Outcome:
        """Both sides of the equation. Three forwards on every rank, also after a failure, and one all-reduce."""
        for with_autograd in dict.fromkeys((self.with_autograd, True)):
            failures: list[str] = []
            with torch.set_grad_enabled(with_autograd):
                try:
                    additivity = compare(
                        lambda part, failures=failures: self._loss_or_nan(part, failures),  # type: ignore[misc]
                        parts,
                        self._counter,
                        rounding=self._rounding,
                    )
                except torch.AcceleratorError:
                    raise
                except Exception:  # of the user's count, or a loss that is no number
                    additivity = UNCHECKED
                    failures.append("count")
            is_wrong = not failures and additivity.relative_error > tolerance_for(self._rounding)
            ranks = add_up(
                self._domain,
                failed=bool(failures),
                unknown=math.isnan(additivity.relative_error),
                wrong=is_wrong,
                whole=additivity.whole if is_wrong else 0.0,
                parts=sum(additivity.parts) if is_wrong else 0.0,
            )
            if not ranks["failed"]:
                self.with_autograd = with_autograd
                break
        if ranks["wrong"]:
            scale = max(abs(ranks["whole"]), abs(ranks["parts"])) or 1.0
            numbers = (
                f"L(AB)·n(AB) = {ranks['whole']:.7g} but L(A)·n(A) + L(B)·n(B) = {ranks['parts']:.7g}, relative "
                f"difference {abs(ranks['whole'] - ranks['parts']) / scale:.1e}"
            )
            return "wrong", additivity, numbers
        is_known = not ranks["failed"] and ranks["unknown"] < self._domain.num_ranks
        return ("right" if is_known else "failed"), additivity, ""

    def _loss_or_nan(self, batch: Any, failures: list[str]) -> Tensor:
        try:
            return self._loss_of(batch, self._counter).detach()
        except torch.AcceleratorError:
            raise
        except Exception:  # other ranks may be in the forward, and training shows the error again
            failures.append("loss")  # the error itself would hold these frames, and through them the model
            return torch.tensor(math.nan)

    def _is_random(self, parts: Parts, additivity: Additivity) -> bool:
        """True if equal forwards scatter so much that the equation says nothing. Three forwards, one all-reduce."""
        weight = float(self._counter.weight(self._counter(parts.whole)))
        with torch.set_grad_enabled(self.with_autograd):
            losses = [float(self._loss_or_nan(parts.whole, [])) * weight for _ in range(_NUM_REPEATS)]
        losses = [loss for loss in [*losses, additivity.whole] if math.isfinite(loss)]
        scatter = max(losses) - min(losses) if losses else 0.0
        is_wrong = additivity.relative_error > tolerance_for(self._rounding)
        unexplained = is_wrong and additivity.difference > _LARGEST_SCATTER * scatter
        return not add_up(self._domain, unexplained=unexplained)["unexplained"]
