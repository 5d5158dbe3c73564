"""The unit of trainers that generate their batches: it is known, because no question may be put to them."""

from typing import Any

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets import trl_generating
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.trl import trl_name
from hf_gradutils.trainer._overrides import is_users
from hf_gradutils.upstream.trl import TRL_LOSSES


def settled_counter(trainer: Any) -> TargetCounter:
    """The count of what is trained, from the table; from the user only for a loss of the user's own.

    Raises:
        InvalidArgumentError: a loss that cannot be exact, one of the user's own without a count, or a count for a loss
            that is known.
    """
    counter: TargetCounter = trainer.grad_plugin.counter()
    name = trl_name(trainer)
    if any(is_users(trainer, method) for method in TRL_LOSSES):
        if counter.is_default:
            raise InvalidArgumentError(
                f"{name} generates its batches, so it cannot be asked what a loss of your own is a mean over; say so "
                "with count_targets=lambda batch: <0-d tensor> (batch: what _prepare_inputs returns), for example "
                "batch['completion_mask'].sum(), or with loss_unit='rows'"
            )
        return counter
    trl_generating.check_options(trainer)
    if not counter.is_default:
        raise InvalidArgumentError(
            f"loss_unit and count_targets cannot be checked for {name}, which generates its batches; leave them out: "
            "what its loss is a mean over is known"
        )
    return trl_generating.counter_of(trainer)
