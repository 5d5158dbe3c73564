"""When gradients are communicated while a window of micro-batches accumulates."""

import contextlib
from types import TracebackType

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils import upstream


class SyncContext:
    """Forward and backward of one micro-batch, with or without gradient communication.

    State changes on enter and goes back to what it was on exit, also after an exception. Every wrapper in
    the module tree is found, whatever stands around it: ``torch.compile``, PEFT and accelerate keep the
    wrapped module in the tree.
    """

    def __init__(self, model: nn.Module, *, communicate: bool):
        self._model = model
        self._communicate = communicate
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        if self._undo is not None:
            raise RuntimeError("expected one entry at a time, got a second; call get_sync_ctx once per micro-batch")
        with contextlib.ExitStack() as undo:
            inside_fsdp1: set[nn.Module] = set()
            for module in self._model.modules():
                if isinstance(module, DistributedDataParallel):
                    undo.callback(setattr, module, "require_backward_grad_sync", module.require_backward_grad_sync)
                    module.require_backward_grad_sync = self._communicate
                elif isinstance(module, FSDPModule):
                    undo.callback(upstream.restore_fsdp2_sync_flags, upstream.fsdp2_sync_flags(module))
                    module.set_requires_gradient_sync(self._communicate, recurse=False)
                elif isinstance(module, FullyShardedDataParallel) and module not in inside_fsdp1:
                    inside_fsdp1.update(module.modules())
                    if not self._communicate:
                        undo.enter_context(module.no_sync())
            self._undo = undo.pop_all()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        undo, self._undo = self._undo, None
        assert undo is not None
        undo.close()
