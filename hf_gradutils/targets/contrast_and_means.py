"""Heads of transformers whose loss adds sums, or means over targets, to a comparison of rows or a score of sums.

They take two passes, as those of ``contrastive_heads.py``; the sums of a micro-batch are one more row. Formulas are
those of the heads in transformers 5.24: ``tests/targets/test_contrast_and_means.py`` fails when one differs.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets.class_names import look_up
from hf_gradutils.targets.contrastive_heads import cross_entropy_of_pairs, precise
from hf_gradutils.targets.counter import IGNORE_INDEX
from hf_gradutils.targets.means_of_boxes import MEANS_OF_BOXES
from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead
from hf_gradutils.upstream.accelerate import without_accelerate_state

_Inputs = Mapping[str, Any]
_SCALE_OF_ROCBERT = 100.0
_LARGEST_SCALE = 100.0
"""Of OneFormer."""


def contrast_and_means_of(head: nn.Module) -> WholeBatchHead | None:
    """Look up a head's class, without wrappers; None if its loss is not in the table."""
    make = look_up(_TABLE, head)
    return None if make is None else make(head)


# ---- What outputs do not have ----

_seen: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()
"""What a part of a head has returned, in a forward that has not ended."""


@contextlib.contextmanager
def _seeing(head: nn.Module, part: nn.Module, take: Callable[[Any], Tensor]) -> Iterator[None]:
    """Keep a tensor of the outputs of each forward of a part."""
    found = _seen[head] = []
    handle = part.register_forward_hook(lambda _, __, outputs: found.append(take(outputs)))
    try:
        yield
    finally:
        handle.remove()
        _seen.pop(head, None)


# ---- wav2vec 2.0: a sum over masked frames, and how evenly all of them use the codes ----


def _seeing_codes(head: Any) -> contextlib.AbstractContextManager[None]:
    return _seeing(head, head.quantizer.weight_proj, lambda logits: logits)


def _frames_and_codes(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
    """One row each: the contrast of masked frames, their number, and their probabilities of each code (1, G, V)."""
    contrast, masked = outputs.get("contrastive_loss"), inputs.get("mask_time_indices")
    if contrast is None or masked is None:
        raise TargetCountError(
            f"{type(head).__name__} returned no loss; give it mask_time_indices and sampled_negative_indices"
        )
    quantizer: Any = head.quantizer
    logits = _seen[head][-1].reshape(*masked.shape, quantizer.num_groups, quantizer.num_vars)
    used = logits.float().softmax(dim=-1)
    if not quantizer.training:
        used = nn.functional.one_hot(logits.argmax(dim=-1), quantizer.num_vars).to(used)
    used = used.masked_fill(~masked.bool()[..., None, None], 0.0)
    return contrast.reshape(1), masked.sum().reshape(1).to(contrast), used.sum(dim=(0, 1))[None]


def _of_frames_and_codes(head: nn.Module) -> WholeBatchHead:
    weight = float(head.config.diversity_loss_weight)  # type: ignore[union-attr, arg-type]

    def loss(rows: Tensors, _: Tensors) -> Tensor:
        contrast, num_frames, used = (part.sum(dim=0) for part in precise(rows))
        share = used / num_frames
        perplexity = (-torch.xlogy(share, share).sum(dim=-1)).exp().sum()
        return contrast + weight * (1 - perplexity / share.numel()) * num_frames

    return WholeBatchHead(_frames_and_codes, loss, watching=_seeing_codes, can_be_cut=False)


# ---- RoCBERT: masked words, and texts compared with attacks on them ----


def _seeing_texts(head: Any) -> contextlib.AbstractContextManager[None]:
    """Pooled texts, attacked ones last."""
    return _seeing(head, head.roc_bert, lambda outputs: outputs[1])


def _words_and_texts(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
    """Sum over masked words and their number, one row each, and the texts if they are attacked."""
    labels, scores = inputs.get("labels_input_ids"), outputs.get("logits")
    if labels is None or scores is None:
        raise TargetCountError(f"{type(head).__name__} returned no loss; give it labels_input_ids")
    words = nn.functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    texts = _seen[head] if inputs.get("attack_input_ids") is not None else ()
    return words[None], labels.ne(IGNORE_INDEX).sum()[None].to(words), *texts


def _words_and_compared_texts(rows: Tensors, _: Tensors) -> Tensor:
    words, num_words, *texts = precise(rows)
    loss: Tensor = words.sum() / num_words.sum()
    if not texts:
        return loss
    *originals, attacked = (nn.functional.normalize(part, dim=-1) for part in texts)
    return loss + torch.stack([cross_entropy_of_pairs(_SCALE_OF_ROCBERT * x @ attacked.T) for x in originals]).mean()


# ---- OneFormer in training: classes, masks, and its queries compared with texts ----


def _of_queries_and_texts(head: nn.Module) -> WholeBatchHead | None:
    config, criterion = head.config, head.criterion
    if not config.is_training or config.contrastive_temperature is None:  # type: ignore[union-attr]
        return None  # a sum of means
    means, weight = MEANS_OF_BOXES["OneFormerForUniversalSegmentation"], float(config.contrastive_weight)  # type: ignore[union-attr, arg-type]

    @contextlib.contextmanager
    def watching(head: nn.Module) -> Iterator[None]:
        with means.watching(head), without_accelerate_state():  # which counts masks of all ranks
            yield

    def shared(_: nn.Module) -> Tensors:
        return (criterion.logit_scale,)  # type: ignore[union-attr, return-value]

    def contrast(texts: Tensor, queries: Tensor, scale: Tensor) -> Tensor:
        logits = texts @ queries.T * scale.exp().clamp(max=_LARGEST_SCALE)
        return weight * (cross_entropy_of_pairs(logits) + cross_entropy_of_pairs(logits.T))

    def rows(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
        parts = outputs["text_queries"], outputs["transformer_decoder_contrastive_queries"]
        if parts[0] is None:
            raise TargetCountError(f"{type(head).__name__} returned no loss; give it text_inputs")
        texts, queries = (nn.functional.normalize(part.float().flatten(1), dim=-1) for part in parts)
        classes, rest = means.terms(head, inputs, outputs)
        masks = rest - contrast(*precise((texts, queries, *shared(head))))
        counts = means.counts(head, inputs).to(classes)
        return texts, queries, torch.cat([torch.stack([classes, masks]) * counts, counts])[None]

    def loss(rows: Tensors, shared: Tensors) -> Tensor:
        texts, queries, terms, scale = precise(rows + shared)
        sums, counts = terms.sum(dim=0).chunk(2)
        return contrast(texts, queries, scale) + (sums / counts.where(counts > 0, 1.0)).sum()

    return WholeBatchHead(rows, loss, shared, watching)


_TABLE: dict[str, Callable[[nn.Module], WholeBatchHead | None]] = {
    **dict.fromkeys(("Wav2Vec2ForPreTraining", "Wav2Vec2ConformerForPreTraining"), _of_frames_and_codes),
    "RoCBertForPreTraining": lambda _: WholeBatchHead(
        _words_and_texts, _words_and_compared_texts, watching=_seeing_texts
    ),
    "OneFormerForUniversalSegmentation": _of_queries_and_texts,
}
CONTRAST_AND_MEANS = frozenset(_TABLE)
"""Names of classes with such a loss; OneFormer has it in training only."""
