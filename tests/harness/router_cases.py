"""Mixtures of experts on micro-batches of ragged lengths: the gradient of the whole batch, two passes, and a mean."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from hf_gradutils.targets.auxiliary_loss import auxiliary_places
from hf_gradutils.targets.router_losses import add_coefficient, own_router_loss, router_loss_of
from tests.harness import head_configs as cfg
from tests.harness.gradients import loss_of_micro_batches, whole_gradients
from tests.harness.head_rows import FIRST_WORD, PAD, VOCAB

Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]
RouterLoss = Callable[[Any, Batch], Tensor]
"""(outputs, batch) → the router loss of the batch."""

LENGTHS = ((3, 5, 4, 2), (14, 11, 16, 9), (6, 6, 3, 8), (2, 12, 5, 7))
"""Of the rows of each micro-batch."""
_IGNORED = -100
_MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3 moe": (hf.Qwen3MoeForCausalLM, cfg.QWEN3_MOE),
    "mixtral": (hf.MixtralForCausalLM, cfg.EXPERTS),
    "nllb moe": (
        hf.NllbMoeForConditionalGeneration,
        cfg.BART
        | {
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_experts": 4,
            "expert_capacity": 1000,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "moe_token_dropout": 0.0,
        },
    ),
    "switch": (
        hf.SwitchTransformersForConditionalGeneration,
        cfg.T5
        | {
            "num_layers": 2,
            "d_model": 16,
            "num_heads": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "router_jitter_noise": 0.0,
        },
    ),
}


def make_router_model(name: str, coefficient: float) -> nn.Module:
    """In float64, with this coefficient of its router loss (of both, where there are two)."""
    model_class, options = _MODELS[name]
    torch.manual_seed(11)
    model = model_class(model_class.config_class(**options)).double().train()
    for place, attribute in list(auxiliary_places(model)):
        setattr(place, attribute, coefficient)
    for module in model.modules():
        if type(module).__name__ in ("NllbMoeTop2Router", "SwitchTransformersTop1Router"):
            module.dtype = torch.float64  # which their configurations do not offer
    return model


def ragged_micro_batches(
    model: nn.Module, *, unequal: bool, one_length: bool = False, times: int = 1, seed: int = 5
) -> list[Batch]:
    """One for each of ``LENGTHS``, padded to its own longest row or all to one length.

    Args:
        model: Encoders and decoders get labels of lengths of their own.
        unequal: Each micro-batch has words of its own, so that its tokens go to other experts.
        one_length: Pad to the longest row of all.
        times: How often each length.
        seed: Of the words.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = times * max(map(max, LENGTHS))
    share = (VOCAB - FIRST_WORD) // len(LENGTHS)
    batches = []
    for index, lengths in enumerate(LENGTHS):
        first, last = (FIRST_WORD + index * share, FIRST_WORD + (index + 1) * share) if unequal else (FIRST_WORD, VOCAB)
        lengths = tuple(times * length for length in lengths)
        words = [torch.randint(first, last, (length,), generator=generator) for length in lengths]
        width = longest if one_length else max(lengths)
        batch = {"input_ids": _padded(words, width, PAD), "attention_mask": _padded_mask(lengths, width)}
        if model.config.is_encoder_decoder:
            said = [torch.randint(first, last, (1 + length // 2,), generator=generator) for length in lengths]
            width = 1 + width // 2
            batch["labels"] = _padded(said, width, _IGNORED)
            if "nllb" in model.config.model_type:
                batch["decoder_attention_mask"] = _padded_mask(list(map(len, said)), width)
        else:
            batch["labels"] = _padded(words, width, _IGNORED)
        batches.append(batch)
    return batches


def _padded(rows: Sequence[Tensor], width: int, value: int) -> Tensor:
    return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])


def _padded_mask(lengths: Sequence[int], width: int) -> Tensor:
    return _padded([torch.ones(length, dtype=torch.int64) for length in lengths], width, 0)


def one_batch(batches: Sequence[Batch]) -> Batch:
    """All rows, padded to the longest."""
    fill = {"input_ids": PAD, "labels": _IGNORED}
    return {
        name: torch.cat(
            [_padded(list(b[name]), max(c[name].shape[1] for c in batches), fill.get(name, 0)) for b in batches]
        )
        for name in batches[0]
    }


def num_targets(model: nn.Module, batch: Batch) -> int:
    labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
    return int((labels != _IGNORED).sum())


# ---- Gradients of cross-entropy + coefficient · router loss ----


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """The cross-entropy, a mean over the batch's targets, and the outputs."""
    outputs = model(**batch, output_router_logits=True)
    own = own_router_loss(model, outputs)
    assert own is not None
    return outputs.loss - add_coefficient(model) * own, outputs


def gradient_of_whole_batch(
    model: nn.Module, batches: Sequence[Batch], router_loss: RouterLoss | None = None
) -> Gradients:
    """Of all rows in one forward; ``router_loss`` takes the place of the head's own."""
    model.zero_grad()
    batch = one_batch(batches)
    loss, outputs = _forward(model, batch)
    routers = own_router_loss(model, outputs) if router_loss is None else router_loss(outputs, batch)
    (loss + add_coefficient(model) * routers).backward()
    return whole_gradients(model)


def gradient_of_mean(model: nn.Module, batches: Sequence[Batch]) -> Gradients:
    """The mean of the micro-batches' own losses, weighted by their targets."""
    model.zero_grad()
    counts = [num_targets(model, batch) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        (model(**batch, output_router_logits=True).loss * count / sum(counts)).backward()
    return whole_gradients(model)


def gradient_of_two_passes(model: nn.Module, batches: Sequence[Batch]) -> Gradients:
    """The router loss of the rows of all micro-batches, and the mean of their cross-entropies."""
    model.zero_grad()
    found = router_loss_of(model)
    assert found is not None
    counts, rows, losses = [num_targets(model, batch) for batch in batches], [], []
    for batch, count in zip(batches, counts, strict=True):
        loss, outputs = _forward(model, batch)
        rows.append(found.rows(model, batch, outputs))
        losses.append(loss * count / sum(counts))
    routers = loss_of_micro_batches(found, model, rows)
    (torch.stack(losses).sum() + add_coefficient(model) * routers).backward()
    return whole_gradients(model)
