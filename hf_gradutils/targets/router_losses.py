"""The router loss of a mixture of experts, as a function of sums over the tokens of the whole batch.

    balance = E · Σ_e f_e · P_e      f_e: share of tokens sent to expert e, no gradient;  P_e: mean probability of e

f and P are means over tokens, so their sums add up over micro-batches and ranks, but the balances of micro-batches do
not. Read from transformers 5.24: ``tests/targets/test_router_losses.py`` compares every class with its own loss, and
fails when a name moves.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.targets.auxiliary_loss import auxiliary_coefficient
from hf_gradutils.targets.class_names import look_up
from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead

# One f and one P over the tokens of all layers that the attention mask keeps.
_POOLED = """
    DbrxForCausalLM DeepseekV4ForCausalLM Ernie4_5_MoeForCausalLM FlexOlmoForCausalLM FlintForCausalLM
    GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
    GraniteMoeSharedForCausalLM JambaForCausalLM JetMoeForCausalLM LagunaForCausalLM LaraMiniForCausalLM
    MellumForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM MixtralForCausalLM
    OlmoeForCausalLM PhimoeForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
    Qwen3_5MoeForCausalLM Qwen4ExpForCausalLM

    Ernie4_5_VLMoeForConditionalGeneration Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration
    MiniMaxM3SparseForConditionalGeneration Qwen3OmniMoeThinkerForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5MoeForConditionalGeneration Qwen4ExpForConditionalGeneration
    """
# Encoder and decoder apart, each with its own mask. Exact while no expert of this head is beyond its capacity, which
# counts the tokens of a micro-batch.
_TWO_STACKS = "NllbMoeForConditionalGeneration"
# Encoder and decoder apart: the mean over rows of a balance each, and the mean over tokens of (log Σ exp logits)². Both
# take in padding, so that micro-batches have to be padded to one length, as the whole batch is.
_BY_ROW = "SwitchTransformersForConditionalGeneration"

NO_SUMS = {
    "DogeForCausalLM": "its routers mix the tokens of different rows, so that a smaller micro-batch is another model",
    "Qwen3OmniMoeTalkerForConditionalGeneration": "its outputs have no router logits",
}
"""Class name → reason why it is left out."""


@dataclass(frozen=True, slots=True)
class _Family:
    rows: Callable[[nn.Module, Mapping[str, Any], Any], Tensors]
    loss: Callable[[Tensors, Tensors], Tensor]
    own: Callable[[nn.Module, Any], Any]


def router_loss_of(head: nn.Module) -> WholeBatchHead | None:
    """The router loss of a head's class, without ``add_coefficient``; None if it has none, or none of sums.

    A forward without ``output_router_logits`` has no rows, ``()``, which ``loss`` cannot be given.
    """
    family = look_up(_FAMILIES, head)
    return None if family is None else WholeBatchHead(rows=family.rows, loss=family.loss)


def own_router_loss(head: nn.Module, outputs: Any) -> Tensor | None:
    """The router loss that a forward computed by itself: what ``loss`` gives for its rows alone.

    Args:
        head: One with a ``router_loss_of``.
        outputs: Of its forward. With labels, ``outputs.loss`` has ``add_coefficient(head)`` times this in it.

    Returns:
        Shape (); None if the forward computed none.
    """
    family = look_up(_FAMILIES, head)
    own = None if family is None else family.own(head, outputs)
    return own if isinstance(own, Tensor) else None


def add_coefficient(head: nn.Module) -> float:
    """The factor with which a head adds its router loss to its loss; 1 where that has its coefficients in it."""
    return 1.0 if look_up(_FAMILIES, head) is _FAMILIES[_BY_ROW] else auxiliary_coefficient(head)


# ---- One f and one P ----


def _pooled_rows(head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensors:
    return _sums(outputs.get("router_logits"), _top_k(head), inputs.get("attention_mask"))


def _top_k(head: nn.Module) -> int:
    if hasattr(head, "num_experts_per_tok"):
        return int(head.num_experts_per_tok)  # type: ignore[arg-type]
    config: Any = head.config
    return int(config.get_text_config().num_experts_per_tok)


def _two_stacks_rows(_: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensors:
    encoder = _sums(outputs.get("encoder_router_logits"), 2, inputs.get("attention_mask"))
    return encoder + _sums(outputs.get("decoder_router_logits"), 2, inputs.get("decoder_attention_mask"))


def _sums(logits: Any, top_k: int, mask: Tensor | None) -> Tensors:
    """Over layers and tokens that the mask keeps: Σ of probabilities (1, E), Σ of choices (1, E), their number (1,)."""
    if not isinstance(logits, tuple) or not logits:
        return ()
    of_layers = [_sums_of_layer(of_layer.to(logits[0].device), top_k, mask) for of_layer in logits]
    return tuple(torch.stack(sums).sum(dim=0) for sums in zip(*of_layers, strict=True))


def _sums_of_layer(logits: Tensor, top_k: int, mask: Tensor | None) -> Tensors:
    probabilities = logits.softmax(dim=-1)
    # Chosen in the logits' own precision, where ties are decided as in the head; summed in more.
    chosen = _one_hot(probabilities, probabilities.detach().topk(top_k, dim=-1).indices)
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    kept = torch.ones_like(logits[:, :1]) if mask is None else mask.reshape(-1, 1)
    kept = kept.to(logits.device, dtype)
    return (
        (kept * probabilities).sum(dim=0, keepdim=True),
        (kept * chosen).sum(dim=0, keepdim=True),
        kept.sum(dim=0),
    )


def _one_hot(like: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(like, requires_grad=False).scatter_(-1, chosen, 1.0)


def _balance(rows: Tensors, _: Tensors) -> Tensor:
    """Σ of the balances of each stack."""
    balances = []
    for probability_sum, chosen_sum, num_tokens in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        total = num_tokens.sum()
        share, probability = chosen_sum.sum(dim=0) / total, probability_sum.sum(dim=0) / total
        balances.append(share.numel() * (share * probability).sum())
    return torch.stack(balances).sum()


# ---- A mean over rows, and one over tokens ----


def _by_row_rows(head: nn.Module, _: Mapping[str, Any], outputs: Any) -> Tensors:
    """Of each stack: Σ of the rows' balances, rows, Σ (log Σ exp)², tokens; shape (1,) each, coefficients in them."""
    rows: Tensors = ()
    for stack in _routing_stacks(head):
        of_layers = outputs.get(f"{stack}_router_logits")
        if not of_layers:
            return ()
        logits = torch.cat(of_layers, dim=1)  # (rows, tokens of all layers, E)
        probability = logits.softmax(dim=-1).mean(dim=1)
        share = _one_hot(logits, logits.detach().argmax(dim=-1, keepdim=True)).mean(dim=1)
        balance = logits.shape[-1] * (share * probability).sum()
        squares = logits.logsumexp(dim=-1).square()
        rows += (
            (float(head.router_aux_loss_coef) * balance).reshape(1),  # type: ignore[arg-type]
            torch.full_like(probability[:1, 0], logits.shape[0], requires_grad=False),
            (float(head.router_z_loss_coef) * squares.sum()).reshape(1),  # type: ignore[arg-type]
            torch.full_like(probability[:1, 0], squares.numel(), requires_grad=False),
        )
    return rows


def _routing_stacks(head: nn.Module) -> Iterator[str]:
    for stack in ("encoder", "decoder"):
        if getattr(getattr(head, stack).config, f"{stack}_sparse_step") > 1:
            yield stack


def _mean_by_row(rows: Tensors, _: Tensors) -> Tensor:
    means = [total.sum() / number.sum() for total, number in zip(rows[0::2], rows[1::2], strict=True)]
    return torch.stack(means).sum()


def _own_by_row(head: nn.Module, outputs: Any) -> Any:
    terms = [
        coefficient * outputs.get(f"{stack}_{term}")
        for term, coefficient in (("aux_loss", head.router_aux_loss_coef), ("z_loss", head.router_z_loss_coef))
        for stack in _routing_stacks(head)
        if outputs.get(f"{stack}_{term}") is not None
    ]
    return sum(terms)


def _own_of_two_stacks(_: nn.Module, outputs: Any) -> Any:
    terms = [outputs.get("encoder_aux_loss"), outputs.get("decoder_aux_loss")]
    return sum(term for term in terms if term is not None)


_FAMILIES = (
    dict.fromkeys(_POOLED.split(), _Family(_pooled_rows, _balance, lambda _, outputs: outputs.get("aux_loss")))
    | {_TWO_STACKS: _Family(_two_stacks_rows, _balance, _own_of_two_stacks)}
    | {_BY_ROW: _Family(_by_row_rows, _mean_by_row, _own_by_row)}
)
