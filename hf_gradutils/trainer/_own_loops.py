"""Training loops of the user's own, in place of transformers': exact if they go through ours, else refused."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_gradutils.accelerator import check_weighted
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.trainer._overrides import is_users

_LOOPS = ("train", "_inner_training_loop")


@contextlib.contextmanager
def refusing_loops(trainer: Any) -> Iterator[None]:
    """Look at the first step of the Trainer's model, if a method of the user's may run the loop.

    Raises:
        InvalidArgumentError: before a step on gradients that no window of ours has closed.
    """
    if trainer.is_deepspeed_enabled or not any(is_users(trainer, name) for name in _LOOPS):
        yield
        return
    is_ours = False

    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        nonlocal is_ours
        is_ours = is_ours or any(window.num_closed for window in trainer.accelerator.windows.by_models)
        if is_ours:
            return
        trained = {id(parameter) for parameter in trainer.model_wrapped.parameters()}  # now: model_init made it anew
        trained |= {id(parameter) for parameter in trainer.model.parameters()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        try:  # torch steps on gradients of 0 to make the state of an optimizer that is resumed
            check_weighted(parameter for parameter in parameters if id(parameter) in trained)
        except TargetCountError:
            raise InvalidArgumentError(
                f"{type(trainer).__name__} has a training loop of its own, whose {type(optimizer).__name__} steps on "
                "gradients that are not weighted; let it call super().train(), or training_step, "
                "self.accelerator.clip_grad_norm_ and self.optimizer.step() as transformers' loop does"
            ) from None

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        handle.remove()
