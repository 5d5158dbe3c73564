"""Private names of trl's trainers (1.16)."""

import types
from typing import Any

from torch import nn

TRL_METRICS = ("_metrics", "_total_train_tokens")
"""Private attributes in which ``compute_loss`` of trl's trainers collects metrics."""

TRL_AUXILIARY = ("aux_loss_enabled",)
"""Attributes, of some trainers, by which ``compute_loss`` adds a mixture's auxiliary loss."""

TRL_ENTROPY_BONUS = "_entropy_bonus_enabled"
"""Attribute by which ``GRPOTrainer`` adds a bonus to its loss."""

TRL_LOSSES = ("compute_loss", "_compute_loss")
"""Methods of generating trainers that users override for a loss of their own."""


def join_step_time(trainer: Any) -> None:
    """Let a generating trainer go on with a step whose time it has just logged."""
    if times := trainer._metrics["train"]["step_time"]:  # a step of the user's own may log none
        trainer._current_train_step_time = times.pop()


def rebind_forward(model: nn.Module, copied: nn.Module) -> None:
    """Let a copy of a model whose ``forward`` trl has replaced run the copy.

    The replacement encloses the model's own method, which a deep copy of a function leaves as it is.
    """
    forward = vars(copied).get("forward")
    function = getattr(forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return

    def own(cell: types.CellType) -> types.CellType:
        value = None if cell == types.CellType() else cell.cell_contents
        if isinstance(value, types.MethodType) and value.__self__ is model:
            return types.CellType(types.MethodType(value.__func__, copied))
        return cell

    closure = tuple(map(own, function.__closure__ or ()))
    code, names, defaults = function.__code__, function.__globals__, function.__defaults__
    rebound = types.FunctionType(code, names, function.__name__, defaults, closure)
    rebound.__kwdefaults__ = function.__kwdefaults__
    vars(copied)["forward"] = types.MethodType(rebound, copied)
