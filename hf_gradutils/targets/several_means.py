"""Heads of transformers whose loss is a sum of means over different targets, by class name.

Looked up along the class hierarchy, as in ``known_heads``. ``tests/targets/test_several_means.py`` fails when a name
moves. The detectors are in ``means_of_boxes``.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.targets.class_names import look_up
from hf_gradutils.targets.counter import IGNORE_INDEX
from hf_gradutils.targets.means_of_boxes import (
    MEANS_OF_BOXES,
    augments_positions,
    has_noisy_boxes,
    is_densely_matched,
)
from hf_gradutils.targets.terms import SeveralMeans
from hf_gradutils.targets.whole_batch import Tensors


def several_means_of(head: nn.Module) -> SeveralMeans | None:
    """Look up a head, without wrappers; None if its loss is no such sum.

    A detector that draws noisy boxes, or positions for all rows, has none, and neither has one that counts its own
    matches (``means_of_matches_of`` has it).
    """
    of_boxes = look_up(MEANS_OF_BOXES, head)
    if of_boxes is None:
        return look_up(SEVERAL_MEANS, head)
    is_other = has_noisy_boxes(head) or is_densely_matched(head) or augments_positions(head.config)
    return None if is_other else of_boxes


# ---- Classes of tokens and of rows ----


def _classified(logits: Mapping[str, str]) -> SeveralMeans:
    """Sum of cross entropies.

    Args:
        logits: Name of the labels in the batch → name of the logits in the outputs.
    """

    def counts(_: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return _stacked([_count(batch.get(labels)) for labels in logits])

    def terms(_: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensors:
        return tuple(
            _mean_or_zero(outputs.get(scores), inputs.get(labels), outputs["loss"]) for labels, scores in logits.items()
        )

    return SeveralMeans(counts, terms)


def _count(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.ne(IGNORE_INDEX).sum()


def _stacked(counts: list[Tensor | None]) -> Tensor:
    """Counts on the device of the labels; 0 for labels that the batch does not have."""
    device = next((count.device for count in counts if count is not None), None)
    return torch.stack([torch.zeros((), device=device) if n is None else n for n in counts]).to(torch.float64)


def _mean_or_zero(scores: Tensor | None, labels: Tensor | None, loss: Tensor) -> Tensor:
    """The mean cross entropy; 0 without labels, where torch's is NaN (its gradient is 0), or without scores."""
    if labels is None or scores is None:
        return torch.zeros_like(loss)
    mean = nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), labels.reshape(-1))
    return mean.where(labels.ne(IGNORE_INDEX).any(), 0.0)


# ---- LXMERT, which has up to four tasks ----

_TASKS = {
    "labels": ("task_mask_lm", "prediction_logits"),
    "matched_label": ("task_matched", "cross_relationship_score"),
    "ans": ("task_qa", "question_answering_score"),
}
"""Labels → (switch of the task, name of the logits). The fourth is about objects, whose scores are no output."""


def _count_tasks(head: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    counts = [_count(batch.get(labels)) if getattr(head, task) else None for labels, (task, _) in _TASKS.items()]
    objects: Any = batch.get("obj_labels")
    if not objects or not getattr(head, "task_obj_predict", False):
        return _stacked([*counts, None])
    # A mean over all objects: those without confidence count, with a loss of 0.
    confidence: Tensor = next(iter(objects.values()))[1]
    return _stacked([*counts, torch.full((), confidence.numel(), device=confidence.device)])


def _terms_of_tasks(head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensors:
    loss = outputs["loss"]
    classified = [
        _mean_or_zero(outputs[scores], inputs.get(labels) if getattr(head, task) else None, loss)
        for labels, (task, scores) in _TASKS.items()
    ]
    return (*classified, loss - torch.stack(classified).sum())


@contextlib.contextmanager
def _staying_finite(head: nn.Module) -> Iterator[None]:
    """Let a head's cross entropies without labels be 0, so that what is left of its loss is not NaN."""
    functions: Any = head.loss_fcts
    head.loss_fcts = functions | {"ce": lambda scores, labels: _mean_or_zero(scores, labels, scores)}
    try:
        yield
    finally:
        head.loss_fcts = functions


# ---- SpeechT5, whose spectrogram, stop and attention are means over numbers, frames, and pairs of frame and word ----

_CRITERIA = ("l1_criterion", "bce_criterion", "attn_criterion")
_spoken: weakref.WeakKeyDictionary[nn.Module, dict[str, list[Tensor]]] = weakref.WeakKeyDictionary()
"""Results of the criteria in a forward that has not ended."""


def _count_frames(head: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    config: Any = head.config
    is_spoken = batch["labels"].ne(float(IGNORE_INDEX))
    pairs = None
    if config.use_guided_attention_loss:
        frames = is_spoken[:, config.reduction_factor - 1 :: config.reduction_factor, 0].sum(dim=1)
        pairs = (frames * batch["attention_mask"].eq(1).sum(dim=1)).sum()
    return _stacked([is_spoken.sum(), is_spoken[:, :, 0].sum(), pairs])


def _terms_of_speech(head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensors:
    zero, seen = torch.zeros_like(outputs["loss"]), _spoken[head]
    terms = (torch.stack([zero, *seen.get(name, ())]).sum() for name in _CRITERIA)
    counts = _count_frames(head, inputs)
    return tuple(term.where(count.to(term.device) > 0, 0.0) for term, count in zip(terms, counts, strict=True))


@contextlib.contextmanager
def _hearing_terms(head: nn.Module) -> Iterator[None]:
    """Keep the terms of a loss that is made anew in every forward."""
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5SpectrogramLoss

    seen = _spoken[head] = {}
    loss_class: Any = SpeechT5SpectrogramLoss
    forward = loss_class.forward

    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, criterion in self.named_children():
            found = seen.setdefault(name, [])
            criterion.register_forward_hook(lambda _, __, term, found=found: found.append(term))
        return forward(self, *args, **kwargs)

    loss_class.forward = heard
    try:
        yield
    finally:
        loss_class.forward = forward
        _spoken.pop(head, None)


_NEXT_SENTENCE = """
    BertForPreTraining BigBirdForPreTraining ErnieForPreTraining FNetForPreTraining MegatronBertForPreTraining
    MobileBertForPreTraining
    """
_MASKED = {"labels": "prediction_logits"}
SEVERAL_MEANS = {
    **dict.fromkeys(_NEXT_SENTENCE.split(), _classified(_MASKED | {"next_sentence_label": "seq_relationship_logits"})),
    "AlbertForPreTraining": _classified(_MASKED | {"sentence_order_label": "sop_logits"}),
    "VisualBertForPreTraining": _classified(_MASKED | {"sentence_image_labels": "seq_relationship_logits"}),
    "LukeForMaskedLM": _classified({"labels": "logits", "entity_labels": "entity_logits"}),
    "SpeechT5ForTextToSpeech": SeveralMeans(_count_frames, _terms_of_speech, _hearing_terms),
    "LxmertForPreTraining": SeveralMeans(_count_tasks, _terms_of_tasks, _staying_finite),
}
"""Class name → its sum of means; without the detectors."""
