"""DPO with several losses: Σ of weights · means, over pairs or over the tokens of the chosen answers (trl 1.16).

    loss = Σ_k w[k] · L[k],   L[k] a mean over n[k] targets of its micro-batch
    the whole batch's = Σ over micro-batches of Σ_k w[k] · L[k] · n[k] / N[k]

So each term needs a ratio of its own, which ``compute_loss`` applies by the weights that it reads.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_gradutils.targets.trl import DPO_WITHOUT_UNIT, count_chosen_tokens, count_pairs, dpo_loss_types
from hf_gradutils.upstream.trl import TRL_AUXILIARY


def why_not_split(trainer: Any) -> str:
    """The reason why a loss of DPO is no sum of means over pairs or tokens; empty if it is one."""
    loss_types = dpo_loss_types(trainer)
    for loss_type in loss_types:
        if loss_type in DPO_WITHOUT_UNIT and loss_type != "sft":
            return f"loss_type {loss_type!r} {DPO_WITHOUT_UNIT[loss_type]}"
    if "sft" in loss_types and trainer.use_weighting:
        return "loss_type 'sft' with use_weighting is a product of two means of the micro-batch"
    return ""


def has_several_means(trainer: Any) -> bool:
    """True if a ``DPOTrainer`` adds means over pairs and over tokens, which can be split."""
    loss_types = dpo_loss_types(trainer)
    return "sft" in loss_types and len(loss_types) > 1 and not why_not_split(trainer)


def dpo_counts(trainer: Any, batch: Mapping[str, Any]) -> Tensor:
    """Targets of a micro-batch that each term of the loss is a mean over; shape (terms,), float64. Host syncs: none.

    Terms: the losses in the order of ``loss_type``, and the auxiliary loss of a mixture of experts where it is trained,
    which is weighted by pairs like its micro-batch.
    """
    device = batch["completion_mask"].device
    pairs = count_pairs(batch).to(device, torch.float64)
    tokens = count_chosen_tokens(batch).double()
    counts = [tokens if loss_type == "sft" else pairs for loss_type in dpo_loss_types(trainer)]
    return torch.stack([*counts, pairs] if _has_auxiliary(trainer) else counts)


@contextlib.contextmanager
def dpo_shares(trainer: Any, ratios: Tensor) -> Iterator[None]:
    """Let ``compute_loss`` return Σ_k w[k] · L[k] · ratios[k]; its metrics are unchanged. Host syncs: none.

    Args:
        trainer: A ``DPOTrainer`` or a subclass.
        ratios: Shape (terms,), as :func:`dpo_counts` has them: the share n[k] / N[k], on the device of the loss.
    """
    shares = ratios.float().unbind()  # as the log-probabilities of trl's head are, also those of a float64 model
    weights = trainer.loss_weights
    before = {"loss_weights": weights}
    changed: dict[str, Any] = {
        "loss_weights": [weight * share for weight, share in zip(weights, shares[: len(weights)], strict=True)]
    }
    if _has_auxiliary(trainer):
        before["router_aux_loss_coef"] = trainer.router_aux_loss_coef
        changed["router_aux_loss_coef"] = trainer.router_aux_loss_coef * shares[-1]
    for name, value in changed.items():
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _has_auxiliary(trainer: Any) -> bool:
    return any(getattr(trainer, name, False) for name in TRL_AUXILIARY)
