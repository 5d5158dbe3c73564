"""Private names of transformers (5.17 to 5.24)."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from accelerate import DistributedType
from torch import nn
from torch.distributed import ProcessGroup

TRAINER_METHODS = {
    "_clip_grad_norm": ("self", "model"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_get_num_items_in_batch": ("self", "batch_samples", "device"),
    "_init_training_state": (
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_inner_training_loop": ("self", "batch_size", "args"),
    "_prepare_inputs": ("self", "inputs"),
    "_track_num_input_tokens": ("self", "inputs"),
    "_update_auto_batch_size": ("self", "batch_size"),
}
"""Private methods of ``transformers.Trainer`` with the parameters that the overrides rely on."""

TRAINER_ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")
"""Private attributes of the running loss in ``transformers.Trainer.train``."""

_PARTIAL_STYLE = "ReplicatedWithGradAllReduce"
"""The tensor-parallel style whose hook all-reduces an accumulated gradient."""


def take_accumulated_all_reduces(model: nn.Module) -> list[tuple[nn.Module, ProcessGroup]]:
    """Remove the hooks of transformers' tensor parallelism that all-reduce ``.grad``, the accumulated gradient.

    Returns:
        The modules whose own parameters' gradients are to be summed over the group instead. 5.17 hooks the module's
        backward, 5.23 its parameters, on the first forward.
    """
    hooked = []
    for module in model.modules():
        forward: Any = vars(module).get("forward")
        if _PARTIAL_STYLE in getattr(forward, "__qualname__", ""):
            names = inspect.getclosurevars(forward).nonlocals
            module.forward = names["original_forward"]
            for parameter in names["is_already_hooked"].values():
                _drop(parameter._post_accumulate_grad_hooks)
            hooked.append((module, inspect.getclosurevars(names["_all_reduce_grad"]).nonlocals["mesh"].get_group()))
        for hook in _drop(module._backward_hooks):
            hooked.append((module, inspect.getclosurevars(hook).nonlocals["mesh"].get_group()))
    return hooked


def _drop(hooks: dict[int, Any]) -> list[Any]:
    """Remove transformers' hooks from a dict of hooks; returns them."""
    keys = [key for key, hook in hooks.items() if _PARTIAL_STYLE in getattr(hook, "__qualname__", "")]
    return [hooks.pop(key) for key in keys]


def trainer_no_sync(trainer: Any, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The context in which ``transformers.Trainer`` runs a micro-batch that does not end its window."""
    from transformers.distributed.fsdp import is_fsdp_managed_module

    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return contextlib.nullcontext()
    if getattr(trainer, "is_distributed_loading_by_transformers", False) and is_fsdp_managed_module(trainer.model):
        return trainer._defer_fsdp_gradient_reduction()  # type: ignore[no-any-return]
    return trainer.accelerator.no_sync(model)  # type: ignore[no-any-return]


@contextlib.contextmanager
def without_average(args: Any) -> Iterator[None]:
    """Let a Trainer neither count over ranks nor multiply its loss by their number."""
    before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside peft's."""
    inside: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inside


def head_of(trainer: Any) -> nn.Module:
    """A Trainer's model without wrappers and adapters."""
    return without_adapters(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
