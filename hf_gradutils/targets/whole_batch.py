"""Losses of the whole batch, in two passes.

A contrastive loss compares every row with all others, so no weight makes micro-batches add up to it. Two passes do:

    pass 1, no gradients:   S[m] of every micro-batch; S of all ranks together;  L(S),  G = dL/dS
    pass 2:                 forward m again with the same random numbers;  backward of <G[m], S[m]>

S[m] is what micro-batch m contributes: rows of embeddings, or one row of sums.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

Tensors: TypeAlias = tuple[Tensor, ...]


def _nothing(_: nn.Module) -> Tensors:
    return ()


def not_watched(_: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Watch nothing."""
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class WholeBatchHead:
    """A head's loss of the whole batch."""

    rows: Callable[[nn.Module, Mapping[str, Any], Any], Tensors]
    """(head, inputs of its forward, outputs) → S of these inputs: tensors whose first dimensions follow each other
    over micro-batches and ranks. Called when the forward ends; differentiable."""
    loss: Callable[[Tensors, Tensors], Tensor]
    """(S of the whole batch, shared) → the loss, shape ()."""
    shared: Callable[[nn.Module], Tensors] = _nothing
    """Head → parameters that the loss reads besides: a temperature, a bias. Called when the forward ends."""
    watching: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = not_watched
    """Head → the context of a forward, where outputs do not have all of S."""
    can_be_cut: bool = True
    """False: rows of a batch have numbers of other rows in them, so that it cannot be cut between them."""


@contextlib.contextmanager
def at_forwards_end(head: nn.Module, see: Callable[[Mapping[str, Any], Any], Any]) -> Iterator[None]:
    """Show the inputs and outputs of each forward of a head when it ends, where FSDP's parameters are still whole.

    What ``see`` returns takes the place of the outputs, unless it is None.
    In place of a hook, which a forward that is called by its name, as by peft, does not run.
    """
    attributes = vars(head)
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    forward = head.forward
    signature = inspect.signature(forward)
    named_otherwise = [name for name, p in signature.parameters.items() if p.kind == p.VAR_KEYWORD]

    @functools.wraps(forward)
    def seen(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        inputs = dict(signature.bind(*args, **kwargs).arguments)
        for name in named_otherwise:
            inputs |= inputs.pop(name, {})
        replaced = see(inputs, outputs)
        return outputs if replaced is None else replaced

    attributes["forward"] = seen
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)
