"""When gradients are communicated while a window of micro-batches accumulates.

    policy           before the last micro-batch   on the last     between micro-batches
    defer            nothing                       everything      whole gradients
    every            everything                    everything      each rank's shards
    reduce_scatter   shards                        everything      each rank's shards

The sum over micro-batches and the average over ranks commute: every policy gives the same gradient. ``auto`` is one of
these, chosen by :mod:`hf_gradutils.sync._auto`.
"""

import contextlib
from collections.abc import Iterable, Sequence
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
    """The communication of one backward."""

    shards: bool
    """Average gradients between the ranks that hold different shards; each keeps its own (reduce-scatter)."""
    replicas: bool
    """Average gradients between the ranks that hold copies (all-reduce)."""


def communicates(policy: SyncPolicy, *, is_last: bool) -> Communicates:
    """The communication of a micro-batch's backward; ``is_last``: the optimizer steps after it.

    DDP has replicas only, FSDP1 couples both to its shards, and FSDP2 has either or both (HSDP).
    """
    return Communicates(shards=is_last or policy != "defer", replicas=is_last or policy == "every")


def find_wrappers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the wrappers in a model that communicate gradients."""
    kinds: tuple[type[Any], ...] = (DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def reduces_gradients(wrapper: nn.Module) -> bool:
    """True if a backward leaves reduced gradients in ``.grad`` now: not where FSDP defers them."""
    if isinstance(wrapper, FSDPModule):
        return all(reduces and all_reduces for _, reduces, all_reduces in fsdp2_sync_flags(wrapper))
    return not isinstance(wrapper, FullyShardedDataParallel) or fsdp1_sync_flag(wrapper)


def shard_again(wrappers: Iterable[tuple[str, nn.Module]]) -> None:
    """Let FSDP2 shard what it has left whole after a forward without gradients, as of an evaluation in mid-window.

    A step would not reach the whole parameters, and the next forward would use them as they are.
    """
    for _, module in wrappers:
        if isinstance(module, FSDPModule):
            module.reshard()


class SyncContext:
    """The context of one micro-batch's forward and backward, with the communication of the policy.

    State changes on enter, and is restored on exit, also after an exception. All wrappers in the module tree are found,
    also under ``torch.compile``, PEFT and accelerate.

    Args:
        model: To be trained.
        policy: When gradients are communicated.
        is_last: The optimizer steps after this micro-batch.
        wrappers: ``find_wrappers(model)``, if known.

    Raises:
        InvalidArgumentError: on exit, if HSDP before torch 2.15 has lost gradients under ``reduce_scatter``, or DDP has
            not averaged all gradients.
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
            raise RuntimeError("this context is already entered; call get_sync_ctx once per micro-batch")
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
        """Check HSDP, which adds reduced shards by position; a parameter that takes no part shifts the others."""
        for name, module in self._wrappers:
            if isinstance(module, FSDPModule) and fsdp2_loses_gradients(module, is_last=self._communicates.replicas):
                raise InvalidArgumentError(
                    f"a trainable parameter of {name or 'the model'} took no part in a micro-batch; under HSDP before "
                    "torch 2.15 sync='reduce_scatter' needs every one in every micro-batch: use sync='defer', or "
                    "sync='every' for less memory"
                )

    def _check_replicas_are_averaged(self) -> None:
        """Check DDP, which waits for a gradient of every parameter and would raise only in the next forward."""
        for name, module in self._wrappers:
            if isinstance(module, DistributedDataParallel) and (why := why_ddp_has_not_averaged(module)):
                raise InvalidArgumentError(
                    f"DDP has not averaged all gradients of {name or 'the model'}: it waits for parameters that took "
                    f"no part in the loss ({why}); pass TrainingArguments(ddp_find_unused_parameters=True), which "
                    "gradient checkpointing turns off, or accelerate's "
                    "DistributedDataParallelKwargs(find_unused_parameters=True)"
                )


def reduces_in_one_dtype(wrappers: Sequence[tuple[str, nn.Module]]) -> contextlib.AbstractContextManager[None]:
    """The context of a backward that reduces FSDP2's accumulated float32 gradients together with new ones."""
    return fsdp2_widened_new_gradients([module for _, module in wrappers if isinstance(module, FSDPModule)])


def discard_deferred(model: nn.Module) -> None:
    """Drop all gradients of an unfinished window, also those that ``zero_grad`` does not reach.

    FSDP2 keeps gradients that are not communicated yet beside ``.grad``: whole ones under ``defer``, and under
    ``reduce_scatter`` with HSDP shards without the other replicas' parts. Otherwise they enter the next window.
    Collectives: none.
    """
    model.zero_grad()  # of DeepSpeed's engine too, which takes no argument
    for module in model.modules():
        if isinstance(module, FSDPModule):
            discard_fsdp2_gradients(module)
