"""Sums of several means in evaluation: each term is a mean over its targets of the evaluation set."""

import contextlib
from typing import Protocol

from torch import Tensor

from hf_gradutils.trainer._shares import Seen


class Means(Protocol):
    """A sum of several means, in evaluation."""

    def seeing(self, seen: list[Seen]) -> contextlib.AbstractContextManager[None]:
        """The context of a loss, whose terms and counts are appended."""

    def sums_of(self, seen: Seen) -> Tensor:
        """What adds up over batches: counts, and terms times what they are divided by; shape (2, terms), float64."""

    def mean_of(self, counts: Tensor, sums: Tensor) -> Tensor:
        """The sum of the means over all batches, from what has added up."""
