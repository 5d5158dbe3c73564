"""Detectors of transformers whose loss is a sum of means over different targets, by class name.

The classes of the queries are a mean of their own:

- DETR, MaskFormer and their families weight the class "no object" less, and divide by the sum of the weights. It
  follows from the labels, since every box or mask finds a query.
- D-FINE and DEIMv2 weight two means, over matched and over other queries, by the square roots of their numbers p and q:
  (√p · mean + √q · mean) / (√p + √q), which divides the two sums by √p·(√p + √q) and √q·(√p + √q).
- DEIMv2 also matches more queries than boxes, by what the model predicts. Its divisors are known after the forward, and
  its exact loss takes two passes.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.targets.class_names import look_up
from hf_gradutils.targets.terms import SeveralMeans
from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead

_Labels = list[Tensor]
"""Classes of the boxes of each image."""


def _labels_of_boxes(batch: Mapping[str, Any]) -> _Labels:
    return [image["class_labels"] for image in batch["labels"]]


def _count(labels: _Labels, num_queries: int) -> tuple[int, int, int]:
    """Boxes, matched queries, other queries."""
    num_matched = sum(min(len(image), num_queries) for image in labels)
    return sum(map(len, labels)), num_matched, len(labels) * num_queries - num_matched


# ---- Weighted classes: DETR ----


def _num_queries(config: Any) -> int:
    for part in (config, getattr(config, "decoder_config", None)):
        for name in ("num_queries", "num_detection_tokens"):
            if (number := getattr(part, name, None)) is not None:
                return int(number)
    raise AttributeError(f"{type(config).__name__} does not say how many queries it has")


def _count_weights_of_detr(head: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    config: Any = head.config
    num_boxes, num_matched, num_others = _count(_labels_of_boxes(batch), _num_queries(config))
    return torch.tensor([num_matched + config.eos_coefficient * num_others, num_boxes], dtype=torch.float64)


def _count_weights_of_maskformer(head: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The weights, as the head has them in its own type and on its device, and the masks."""
    criterion: Any = head.criterion
    weight_of_others = criterion.empty_weight[-1].double()
    num_masks, num_matched, num_others = _count(list(batch["class_labels"]), _num_queries(head.config))
    weights = num_matched + weight_of_others * num_others
    return torch.stack([weights, torch.full_like(weights, num_masks)])


def _split_off(loss: Tensor, losses: Iterable[tuple[str, Tensor]], prefix: str) -> Tensors:
    """(the losses of that name, those of inner layers too; the rest of their sum)."""
    part = torch.stack([value for name, value in losses if name.startswith(prefix)]).sum()
    return part, loss.reshape(()) - part  # shape (1,) in OneFormer


def _terms_of_detr(_: nn.Module, __: Mapping[str, Any], outputs: Any) -> Tensors:
    return _split_off(outputs["loss"], outputs["loss_dict"].items(), "loss_ce")  # its coefficient is 1 always


_losses: weakref.WeakKeyDictionary[nn.Module, list[dict[str, Tensor]]] = weakref.WeakKeyDictionary()
"""Losses of a MaskFormer's forward that has not ended; EoMT computes them for several layers, one after the other."""


@contextlib.contextmanager
def _keeping_losses(head: nn.Module) -> Iterator[None]:
    """Keep the losses that a MaskFormer's outputs leave out; it puts their coefficients on in place."""
    criterion: Any = head.criterion
    found = _losses[head] = []
    handle = criterion.register_forward_hook(lambda _, __, losses: found.append(losses))
    try:
        yield
    finally:
        handle.remove()
        _losses.pop(head, None)


def _terms_of_maskformer(head: nn.Module, _: Mapping[str, Any], outputs: Any) -> Tensors:
    losses = itertools.chain.from_iterable(of_layers.items() for of_layers in _losses[head])
    return _split_off(outputs["loss"], losses, "loss_cross_entropy")


# ---- Square roots: D-FINE, DEIMv2 ----


def has_noisy_boxes(head: nn.Module) -> bool:
    """True if the head draws noisy copies of the boxes in every forward: its loss is then another one each time."""
    return bool(getattr(head.config, "num_denoising", 0))


def augments_positions(config: Any) -> bool:
    """True if an EoMT changes the positions of all rows of a micro-batch by one draw."""
    return any(getattr(config, f"pos_embed_{change}", None) for change in ("shift", "jitter", "rescale"))


def is_densely_matched(head: nn.Module) -> bool:
    """True if the predictions decide how many queries are matched."""
    return bool(getattr(head.config, "use_dense_one_to_one", False))


@dataclass(slots=True)
class _Matched:
    """Seen in a forward that has not ended."""

    num_queries: int = 0
    """Matched ones, of the last layer."""
    distilled: list[Tensor] = field(default_factory=list)
    """Each layer's part of the distillation loss that is over matched queries."""


_matched: weakref.WeakKeyDictionary[nn.Module, _Matched] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _splitting_distillation(head: nn.Module) -> Iterator[None]:
    """Look at how the loss of a forward matches, and split its distillation."""
    from transformers.loss.loss_d_fine import DFineLoss

    seen = _matched[head] = _Matched()
    loss_local: Any = DFineLoss.loss_local

    def looked_at(self: Any, outputs: Any, targets: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
        seen.num_queries = sum(len(queries) for queries, _ in indices)
        losses = loss_local(self, outputs, targets, indices, *args, **kwargs)
        if "loss_ddf" in losses:
            # With the teacher's own corners for the others, matched queries are all that is left.
            corners = outputs["teacher_corners"].detach().clone()
            for image, (queries, _) in enumerate(indices):
                corners[image, queries] = outputs["pred_corners"][image, queries]
            alone = loss_local(self, {**outputs, "pred_corners": corners}, targets, indices, *args, **kwargs)
            seen.distilled.append(alone["loss_ddf"] * self.weight_dict["loss_ddf"])
        return losses

    DFineLoss.loss_local = looked_at
    try:
        yield
    finally:
        DFineLoss.loss_local = loss_local
        _matched.pop(head, None)


def _count_matched(head: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    num_boxes, num_matched, num_others = _count(_labels_of_boxes(batch), _num_queries(head.config))
    return torch.tensor([num_boxes, num_boxes, num_matched, num_others], dtype=torch.float64)


def _divisors_of_matched(counts: Tensor) -> Tensor:
    """Of (classes, boxes, matched queries, other queries): boxes are taken as one at least."""
    roots = counts[2:].sqrt()
    return torch.cat([counts[:2].clamp(min=1), roots * roots.sum()])


def _terms_of_matched(head: nn.Module, _: Mapping[str, Any], outputs: Any) -> Tensors:
    loss, losses = outputs["loss"], outputs["loss_dict"]
    zero = torch.zeros_like(loss)
    classes, distillation = (
        torch.stack([zero, *(value for name, value in losses.items() if name.startswith(prefixes))]).sum()
        for prefixes in (("loss_vfl", "loss_mal"), "loss_ddf")
    )
    matched = torch.stack([zero, *_matched[head].distilled]).sum()
    return classes, loss - classes - distillation, matched, distillation - matched


def _sums_and_counts(head: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensors:
    """One row: what each divisor of the whole batch divides, and the counts; shape (1, 2 · terms)."""
    terms = torch.stack(_terms_of_matched(head, inputs, outputs))
    num_boxes, num_matched = sum(map(len, _labels_of_boxes(inputs))), _matched[head].num_queries
    num_others = outputs["pred_boxes"].shape[:2].numel() - num_matched
    counts = torch.tensor([num_boxes, num_matched, num_matched, num_others]).to(terms)
    return (torch.cat([terms * _divisors_of_matched(counts), counts])[None],)


def _of_sums_and_counts(rows: Tensors, _: Tensors) -> Tensor:
    sums, counts = rows[0].sum(0).chunk(2)
    divisors = _divisors_of_matched(counts)
    return (sums / divisors.where(divisors > 0, 1.0)).sum()


_MEANS_OF_MATCHES = {
    "Deimv2ForObjectDetection": WholeBatchHead(_sums_and_counts, _of_sums_and_counts, watching=_splitting_distillation)
}


def means_of_matches_of(head: nn.Module) -> WholeBatchHead | None:
    """Look up a head, without wrappers, whose divisors only its forward tells; None if it is not one."""
    found = look_up(_MEANS_OF_MATCHES, head)
    return found if found is not None and is_densely_matched(head) and not has_noisy_boxes(head) else None


_DETR = SeveralMeans(_count_weights_of_detr, _terms_of_detr, counts_boxes=True)
_DETRS = "DetrForObjectDetection DetrForSegmentation TableTransformerForObjectDetection YolosForObjectDetection"
_MASKFORMER = SeveralMeans(_count_weights_of_maskformer, _terms_of_maskformer, _keeping_losses, counts_boxes=True)
_MASKFORMERS = """
    MaskFormerForInstanceSegmentation Mask2FormerForUniversalSegmentation EomtForUniversalSegmentation
    EomtDinov3ForUniversalSegmentation OneFormerForUniversalSegmentation
    """
_D_FINE = SeveralMeans(_count_matched, _terms_of_matched, _splitting_distillation, _divisors_of_matched)
MEANS_OF_BOXES = {
    **dict.fromkeys(_DETRS.split(), _DETR),
    **dict.fromkeys(_MASKFORMERS.split(), _MASKFORMER),
    "DFineForObjectDetection": _D_FINE,
    "Deimv2ForObjectDetection": _D_FINE,
}
"""Class name → its sum of means."""
