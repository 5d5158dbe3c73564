"""Heads of transformers whose loss is exact in two passes, by class name.

Rows are embeddings, the similarities of pairs, or (one head) sums. Formulas are those of the heads in transformers
5.24, oddities included: ``tests/targets/test_contrastive_heads.py`` fails when one differs. Names are looked up along
the class hierarchy, as in ``known_heads.py``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets.class_names import class_names, look_up
from hf_gradutils.targets.whole_batch import Tensors, WholeBatchHead

_Inputs = Mapping[str, Any]
_Rows = Callable[[nn.Module, _Inputs, Any], Tensors]
_LABEL_SMOOTHING = 0.1
"""Of AlignModel."""
_DEPTH_LAMBDA = 0.5
"""Of GLPNForDepthEstimation."""


def whole_batch_loss_of(head: nn.Module) -> WholeBatchHead | None:
    """Look up a head's class, without wrappers; None if its loss is not in the table.

    Rows raise ``TargetCountError`` where outputs do not pair up. Call ``loss`` outside autocast.
    """
    return _of_prompted_text(head) if "XCLIPModel" in class_names(head) else look_up(_TABLE, head)


# ---- Rows and parameters ----


def _outputs(*names: str) -> _Rows:
    """Make a function that returns outputs by name: one row of each belongs to one pair."""

    def rows(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
        return _paired(head, names, [getattr(outputs, name, None) for name in names])

    return rows


def _paired(head: nn.Module, names: tuple[str, ...], parts: list[Tensor | None]) -> Tensors:
    rows = tuple(part for part in parts if part is not None)
    if len(rows) < len(parts):
        raise TargetCountError(
            f"the loss of {type(head).__name__} needs {' and '.join(names)}, but its forward did not return all of "
            f"them; give it both sides of each pair and return_dict=True"
        )
    if len(set(map(len, rows))) > 1:
        numbers = " and ".join(f"{len(part)} {name}" for part, name in zip(rows, names, strict=True))
        raise TargetCountError(f"{type(head).__name__} compares pairs, but a micro-batch has {numbers}")
    return rows


def _diagonals(*names: str) -> _Rows:
    """Make a function that returns the similarity of each pair, in those matrices that the head computed."""

    def rows(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
        logits = {name: getattr(outputs, name, None) for name in names}
        found = {name: matrix for name, matrix in logits.items() if matrix is not None}
        for name, matrix in found.items():
            if matrix.shape[0] != matrix.shape[1]:
                raise TargetCountError(
                    f"{type(head).__name__} compares pairs, but {name} of a micro-batch is {tuple(matrix.shape)}"
                )
        return _paired(head, tuple(found or names), [matrix.diagonal() for matrix in found.values()] or [None])

    return rows


def _parameters(*names: str) -> Callable[[nn.Module], Tensors]:
    return lambda head: tuple(getattr(head, name) for name in names)


def precise(tensors: Tensors) -> Tensors:
    """Put tensors on the device of the first, in float32 or wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(tensors[0].device, dtype) for tensor in tensors)


# ---- Losses ----


def cross_entropy_of_pairs(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy where the right class of row i is i."""
    targets = torch.arange(len(logits), device=logits.device)
    return nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def _both_ways(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return (cross_entropy_of_pairs(logits, label_smoothing) + cross_entropy_of_pairs(logits.T, label_smoothing)) / 2


def _every_pair(logits: Tensor) -> Tensor:
    """Sum over a row of −log σ(±logit), + on the diagonal; mean over rows."""
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -nn.functional.logsigmoid(signs * logits).sum(dim=-1).mean()


def _clip(rows: Tensors, shared: Tensors) -> Tensor:
    text, image, scale = precise(rows + shared)
    return _both_ways(text @ image.T * scale.exp())


def _siglip(rows: Tensors, shared: Tensors) -> Tensor:
    text, image, scale, bias = precise(rows + shared)
    return _every_pair(text @ image.T * scale.exp() + bias)


def _tips(rows: Tensors, shared: Tensors) -> Tensor:
    text, image, temperature = precise(rows + shared)
    return _both_ways(text @ image.T / temperature)


def _align(rows: Tensors, shared: Tensors) -> Tensor:
    text, image, temperature = precise(rows + shared)
    return _both_ways(text @ image.T / temperature, _LABEL_SMOOTHING)


def _clap(rows: Tensors, shared: Tensors) -> Tensor:
    """Compare texts with sounds, twice: the head transposes the similarities of sounds with texts once more."""
    text, audio, scale_text, scale_audio = precise(rows + shared)
    similarities = text @ audio.T
    return (
        cross_entropy_of_pairs(similarities * scale_text.exp())
        + cross_entropy_of_pairs(similarities * scale_audio.exp())
    ) / 2


def _bridge_tower(rows: Tensors, shared: Tensors) -> Tensor:
    text, image, cross, scale = precise(rows + shared)
    pairs = ((text, image), (text, cross), (image, cross))
    return torch.stack([cross_entropy_of_pairs(one @ other.T * scale.exp()) for one, other in pairs]).mean()


def _video_prism(rows: Tensors, shared: Tensors) -> Tensor:
    text, video, temperature = precise(rows)
    similarities = video @ text.T / temperature[:, None]
    return _every_pair(similarities.softmax(dim=1).T)


def _video_prism_rows(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
    """Text, video and the temperature, an argument of the forward, of each video."""
    text, video = _outputs("text_embeds", "video_embeds")(head, inputs, outputs)
    temperature = inputs.get("temperature")
    dtype = torch.promote_types(video.dtype, torch.float32)
    one = torch.ones((), dtype=dtype, device=video.device)
    return text, video, (one if temperature is None else one * temperature).expand(len(video))


def _perception(rows: Tensors, shared: Tensors) -> Tensor:
    """Of each matrix: −log σ of the logits times the unit matrix, so that all other pairs add a constant."""
    others = (len(rows[0]) - 1) * math.log(2)
    return torch.stack([nn.functional.softplus(-part).mean() + others for part in precise(rows)]).sum()


def _depth(rows: Tensors, shared: Tensors) -> Tensor:
    """√(Σd²/n − λ·(Σd/n)²) over valid pixels."""
    count, first, second = precise(rows)[0].sum(dim=0)
    loss: Tensor = (second / count - _DEPTH_LAMBDA * (first / count).square()).sqrt()
    return loss


def _depth_rows(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
    """One row: n, Σd and Σd² with d = log label − log prediction."""
    parts = [getattr(outputs, "predicted_depth", None), inputs.get("labels")]
    predicted, labels = precise(_paired(head, ("predicted_depth", "labels"), parts))
    valid = labels > 0
    # Ones instead of a selection by mask, which would wait for the device.
    one = torch.ones_like(labels)
    difference = torch.where(valid, labels, one).log() - torch.where(valid, predicted, one).log()
    return (torch.stack([valid.sum().to(labels), difference.sum(), difference.square().sum()])[None],)


# ---- Texts that depend on the videos they are compared with ----


def _of_prompted_text(head: nn.Module) -> WholeBatchHead | None:
    """Make the loss of an XCLIPModel: every text is prompted by every video, also those of other micro-batches.

    None with dropout in the prompts: ranks would draw different masks for the same rows.
    """
    config: Any = head.config
    if config.prompt_attention_dropout or config.prompt_projection_dropout:
        return None
    generator: Any = head.prompts_generator
    names = [name for name, _ in generator.named_parameters()]
    met: list[Tensors] = []

    def meet(_: nn.Module, arguments: Tensors) -> None:
        text, visual = arguments  # text: (videos, texts, dim), the same for all videos
        met.append((text[0], visual))

    @contextlib.contextmanager
    def watching(_: nn.Module) -> Iterator[None]:
        met.clear()
        handle = generator.register_forward_pre_hook(meet)
        try:
            yield
        finally:
            handle.remove()

    def rows(head: nn.Module, inputs: _Inputs, outputs: Any) -> Tensors:
        if not met:
            raise TargetCountError(f"the forward of {type(head).__name__} was not watched")
        text, visual = met.pop()
        return _paired(head, ("texts", "video_embeds", "videos"), [text, outputs.video_embeds, visual])

    def shared(head: nn.Module) -> Tensors:
        return (head.get_parameter("logit_scale"), *generator.parameters())

    def loss(rows: Tensors, shared: Tensors) -> Tensor:
        text, video, visual, scale, *weights = precise(rows + shared)
        text = text.expand(len(video), -1, -1)
        prompts = torch.func.functional_call(generator, dict(zip(names, weights, strict=True)), (text, visual))
        text = nn.functional.normalize(text + prompts, dim=-1, eps=0.0)
        return _both_ways(torch.einsum("vd,vtd->tv", video, text) * scale.exp())

    return WholeBatchHead(rows, loss, shared, watching)


# ---- The table ----

_IMAGES = _outputs("text_embeds", "image_embeds")
_SCALE = _parameters("logit_scale")
_TEMPERATURE = _parameters("temperature")
_LOSSES = [
    (
        WholeBatchHead(_IMAGES, _clip, _SCALE),
        """
        AltCLIPModel BlipModel ChineseCLIPModel CLIPModel CLIPSegModel GroupViTModel MetaClip2Model Owlv2Model
        OwlViTModel VisionTextDualEncoderModel
        """,
    ),
    (WholeBatchHead(_IMAGES, _siglip, _parameters("logit_scale", "logit_bias")), "Siglip2Model SiglipModel"),
    (WholeBatchHead(_IMAGES, _tips, _TEMPERATURE), "Tipsv2Model"),
    (WholeBatchHead(_IMAGES, _align, _TEMPERATURE), "AlignModel"),
    (
        WholeBatchHead(_outputs("text_embeds", "audio_embeds"), _clap, _parameters("logit_scale_t", "logit_scale_a")),
        "ClapModel",
    ),
    (WholeBatchHead(_outputs("text_embeds", "speech_embeds"), _clip, _SCALE), "ClvpModelForConditionalGeneration"),
    (
        WholeBatchHead(_outputs("text_embeds", "image_embeds", "cross_embeds"), _bridge_tower, _SCALE),
        "BridgeTowerForContrastiveLearning",
    ),
    (WholeBatchHead(_video_prism_rows, _video_prism), "VideoPrismClipModel"),
    (WholeBatchHead(_diagonals("logits_audio_text"), _perception), "PeAudioModel"),
    (WholeBatchHead(_diagonals("logits_video_text"), _perception), "PeVideoModel"),
    (
        WholeBatchHead(
            _diagonals(
                "logits_audio_video",
                "logits_audio_text",
                "logits_video_text",
                "logits_audio_video_text",
                "logits_audio_plus_text_video",
                "logits_video_plus_text_audio",
            ),
            _perception,
        ),
        "PeAudioVideoModel",
    ),
    (WholeBatchHead(_depth_rows, _depth), "GLPNForDepthEstimation"),
]
_TABLE = {name: loss for loss, names in _LOSSES for name in names.split()}
WHOLE_BATCH_HEADS = frozenset(_TABLE) | {"XCLIPModel"}
"""Names of classes with a loss of the whole batch."""
