"""When gradients are communicated while a window of micro-batches accumulates.

    policy           before the last micro-batch   on the last     kept meanwhile
    defer            nothing                       everything      whole gradients
    every            everything                    everything      each rank its shards
    reduce_scatter   shards                        everything      each rank its shards

Gradients are summed over micro-batches and averaged over ranks, and these two change places freely: every policy
gives the same gradient. ``auto`` is one of these, chosen by :mod:`hf_gradutils.sync_auto`.
"""

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.fsdp import (
    discard_fsdp2_gradients,
    fsdp1_sync_flag,
    fsdp2_has_not_run,
    fsdp2_loses_gradients,
    fsdp2_sync_flags,
    fsdp2_widened_new_gradients,
    restore_fsdp2_sync_flags,
    set_fsdp1_sync_flag,
)
from hf_gradutils.upstream.torch import why_ddp_has_not_averaged

SyncPolicy: TypeAlias = Literal["defer", "every", "reduce_scatter"]


class Communicates(NamedTuple):
    """What one backward does with gradients."""

    shards: bool
    """Average them between the ranks that hold different shards, each keeping its own (reduce-scatter)."""
    replicas: bool
    """Average them between the ranks that hold copies (all-reduce)."""


def communicates(policy: SyncPolicy, *, is_last: bool) -> Communicates:
    """What the backward of a micro-batch communicates; ``is_last``: the optimizer steps after it.

    A wrapper takes from it what it has: DDP has replicas only, FSDP1 couples both to its shards, and FSDP2 has
    either or both (HSDP).
    """
    return Communicates(
        shards=is_last or policy != "defer",
        replicas=is_last or policy == "every",
    )


def find_wrappers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of everything in a model that communicates gradients."""
    kinds: tuple[type[Any], ...] = (DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


class SyncContext:
    """Forward and backward of one micro-batch, with the communication that the policy asks for.

    State changes on enter and goes back to what it was on exit, also after an exception. Every wrapper in
    the module tree is found, whatever stands around it: ``torch.compile``, PEFT and accelerate keep the
    wrapped module in the tree.

    Args:
        model: What is trained.
        policy: When gradients are communicated.
        is_last: The optimizer steps after this micro-batch.
        wrappers: ``find_wrappers(model)`` of before, where that is known to hold still.

    Raises:
        InvalidArgumentError: on exit, where HSDP before torch 2.15 would have lost gradients under ``reduce_scatter``,
            or DDP has not averaged all gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: SyncPolicy = "defer",
        *,
        is_last: bool,
        wrappers: Sequence[tuple[str, nn.Module]] | None = None,
    ):
        self._wrappers = find_wrappers(model) if wrappers is None else wrappers
        self._communicates = communicates(policy, is_last=is_last)
        self._is_last = is_last
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        if self._undo is not None:
            raise RuntimeError("expected one entry at a time, got a second; call get_sync_ctx once per micro-batch")
        shards, replicas = self._communicates
        with contextlib.ExitStack() as undo:
            for _, module in self._wrappers:
                if isinstance(module, DistributedDataParallel):
                    undo.callback(setattr, module, "require_backward_grad_sync", module.require_backward_grad_sync)
                    module.require_backward_grad_sync = replicas
                elif isinstance(module, FSDPModule):
                    undo.callback(restore_fsdp2_sync_flags, fsdp2_sync_flags(module))
                    has_not_run = not shards and fsdp2_has_not_run(module)  # then its first time does not wait
                    module.set_requires_gradient_sync(shards or has_not_run, recurse=False)
                    module.set_requires_all_reduce(replicas or has_not_run, recurse=False)
                elif isinstance(module, FullyShardedDataParallel):
                    undo.callback(set_fsdp1_sync_flag, module, fsdp1_sync_flag(module))
                    set_fsdp1_sync_flag(module, shards)
            if self._is_last:
                undo.enter_context(reduces_in_one_dtype(self._wrappers))
            self._undo = undo.pop_all()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        undo, self._undo = self._undo, None
        assert undo is not None
        undo.close()
        if exc_type is None and self._communicates.shards:
            self._check_shards_are_whole()
        if exc_type is None and self._communicates.replicas:
            self._check_replicas_are_averaged()

    def _check_shards_are_whole(self) -> None:
        """HSDP adds up reduced shards by their position, which moves if a parameter takes part only sometimes."""
        for name, module in self._wrappers:
            if isinstance(module, FSDPModule) and fsdp2_loses_gradients(module, is_last=self._communicates.replicas):
                raise InvalidArgumentError(
                    "expected every trainable parameter of an FSDP2 group to take part in every micro-batch, which "
                    "sync='reduce_scatter' needs under HSDP before torch 2.15, got one in "
                    f"{name or 'the model itself'} that did not; use sync='defer', or sync='every' for less memory"
                )

    def _check_replicas_are_averaged(self) -> None:
        """DDP waits for a gradient of every parameter unless told otherwise, and says so only in the next forward."""
        for name, module in self._wrappers:
            if isinstance(module, DistributedDataParallel) and (why := why_ddp_has_not_averaged(module)):
                raise InvalidArgumentError(
                    f"expected DDP to average all gradients of {name or 'the model'}, but it waits for parameters that "
                    f"took no part in the loss ({why}); pass TrainingArguments(ddp_find_unused_parameters=True), which "
                    "gradient checkpointing turns off, or accelerate's "
                    "DistributedDataParallelKwargs(find_unused_parameters=True)"
                )


def reduces_in_one_dtype(wrappers: Sequence[tuple[str, nn.Module]]) -> contextlib.AbstractContextManager[None]:
    """A backward that reduces gradients of which FSDP2 has accumulated some, in float32, and others not."""
    return fsdp2_widened_new_gradients([module for _, module in wrappers if isinstance(module, FSDPModule)])


def discard_deferred(model: nn.Module) -> None:
    """Drop all gradients of a window that was given up, also those that ``zero_grad`` does not reach.

    FSDP2 keeps gradients that are not communicated yet beside ``.grad``: whole ones under ``defer``, and under
    ``reduce_scatter`` with HSDP shards that lack the other replicas'. Left alone, they go into the next window.

    Collectives: none.
    """
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            discard_fsdp2_gradients(module)
