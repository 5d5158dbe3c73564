"""The trainers of trl: the units of their losses, and the side effects of their ``compute_loss``.

trl is optional and never imported. A trainer is identified by the first class in its hierarchy that trl defines: users'
subclasses are found, and trl's own, which may batch or divide differently, are not taken for their parents. Checked on
trl 1.16; ``tests/trainer/test_trl.py`` fails when a name moves.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.targets.counter import CountTargets
from hf_gradutils.targets.rows import count_rows
from hf_gradutils.upstream.trl import TRL_AUXILIARY, TRL_METRICS

PAIRED = ("DPOTrainer", "RewardTrainer")
"""Trainers whose loss is a mean over pairs; a batch holds all chosen rows, then all rejected ones."""

EXACT = ("SFTTrainer", "GKDTrainer", *PAIRED, "GRPOTrainer", "RLOOTrainer")

NOT_EXACT = {
    "DistillationTrainer": "divides its loss by the tokens of all that it has generated together",
    "KTOTrainer": "estimates a divergence from each micro-batch, whose loss changes with its size",
}
"""Class name → reason why no weight makes its micro-batches add up."""

DPO_WITHOUT_UNIT = {
    **dict.fromkeys(
        ["aot", "aot_unpaired"], "sorts the pairs of its micro-batch, so a smaller micro-batch is another loss"
    ),
    "sft": "is a mean over the tokens of the chosen answers, and exact only alone",
}
"""``DPOConfig.loss_type`` → reason why it is no mean over pairs."""


def trl_name(trainer: object) -> str | None:
    """Name of the trl trainer that this one is or derives from, or None."""
    for base in trainer.__class__.__mro__:  # not its type: it may be a weak proxy
        if "_made_exact" in vars(base):  # by exact(), in the module of the class behind it
            continue
        if base.__module__.partition(".")[0] == "trl" and not base.__name__.startswith("_"):
            return base.__name__
    return None


def why_not_exact(trainer: object) -> str:
    """The reason why a trainer of trl cannot be made exact, after its name; empty if it can, or is not trl's."""
    name = trl_name(trainer)
    if name is None or name in EXACT:
        return ""
    return NOT_EXACT.get(name, "is not known to take a mean over samples or tokens")


def why_without_unit(trainer: Any) -> str:
    """The reason why the loss of a trainer for pairs is no mean over them; empty if it is one."""
    for loss_type in dpo_loss_types(trainer):
        if loss_type in DPO_WITHOUT_UNIT and not _is_by_tokens(trainer):
            return f"loss_type {loss_type!r} {DPO_WITHOUT_UNIT[loss_type]}"
    return ""


def num_blocks(trainer: object) -> int:
    """Number of blocks in which the rows of a batch lie, see :mod:`hf_gradutils.targets.rows`."""
    return 2 if trl_name(trainer) in PAIRED else 1


def dpo_loss_types(trainer: Any) -> list[str]:
    """The names of the losses that a trainer of DPO adds; none of another trainer."""
    loss_types = trainer.args.loss_type if trl_name(trainer) == "DPOTrainer" else []
    return [loss_types] if isinstance(loss_types, str) else list(loss_types)


def _is_by_tokens(trainer: Any) -> bool:
    return set(dpo_loss_types(trainer)) == {"sft"} and not trainer.use_weighting


def paired_counter(trainer: Any) -> CountTargets:
    """The count of what the loss of a trainer for pairs is a mean over: mostly pairs."""
    return count_chosen_tokens if _is_by_tokens(trainer) else count_pairs


def count_chosen_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Tokens of the chosen answers in a batch of preferences, shape ()."""
    num_tokens: Tensor = batch["completion_mask"].chunk(2)[0][:, 1:].sum()
    return num_tokens


def count_pairs(batch: Mapping[str, Any]) -> Tensor:
    """Pairs of a batch of preferences, shape ()."""
    return torch.tensor(count_rows(batch, num_blocks=2))


@contextlib.contextmanager
def loss_only(trainer: Any, *, with_auxiliary: bool = True) -> Iterator[None]:
    """Let ``compute_loss`` of a trl trainer neither store nor gather metrics: ranks may call it differently often.

    Other Trainers are left alone. ``with_auxiliary``: keep the auxiliary loss of a mixture of experts.
    """
    if trl_name(trainer) is None:
        yield
        return
    accelerator, attributes = trainer.accelerator, vars(trainer)
    before = {name: attributes[name] for name in (*TRL_METRICS, *TRL_AUXILIARY) if name in attributes}
    attributes.update({name: copy.deepcopy(attributes[name]) for name in TRL_METRICS})
    if not with_auxiliary:
        attributes.update({name: False for name in TRL_AUXILIARY if name in attributes})
    gathers = dict.fromkeys(("gather", "gather_for_metrics"), lambda tensor, *args, **kwargs: tensor)
    vars(accelerator).update(gathers)
    try:
        yield
    finally:
        for name in gathers:
            del vars(accelerator)[name]
        attributes.update(before)
