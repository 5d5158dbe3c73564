"""Heads of transformers whose loss is not the mean that their labels suggest, by class name.

Measured on the heads of transformers 5.23 that could be built, see ``docs/heads.md``; the others follow the rule of
``auto`` and the probe of the shift. Names are looked up along the class hierarchy, which finds subclasses and the
classes that ``fully_shard`` derives. ``tests/targets/test_known_heads.py`` fails when a name moves.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_gradutils.targets.counter import IGNORE_INDEX, LossUnit

_DENOISING = (
    "it draws noisy copies of the boxes in every forward, as many as the fullest image of a micro-batch needs; with "
    "num_denoising=0 in the configuration it is a mean over boxes"
)

_REASONS = {
    "it contrasts every sample with the others of its micro-batch, so a smaller micro-batch is another task": """
        AltCLIPModel BlipModel ChineseCLIPModel CLIPModel CLIPSegModel GroupViTModel MetaClip2Model Owlv2Model
        OwlViTModel Siglip2Model SiglipModel Tipsv2Model VideoPrismClipModel VisionTextDualEncoderModel
        XCLIPModel
        """,
    "it adds two means over different numbers of targets": """
        AlbertForPreTraining BertForPreTraining BigBirdForPreTraining ErnieForPreTraining FNetForPreTraining
        LxmertForPreTraining MegatronBertForPreTraining MobileBertForPreTraining VisualBertForPreTraining
        Deimv2ForObjectDetection DetrForObjectDetection DetrForSegmentation MaskFormerForInstanceSegmentation
        TableTransformerForObjectDetection YolosForObjectDetection
        """,
    "it draws random points or masks in every forward": """
        EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation Mask2FormerForUniversalSegmentation
        OneFormerForUniversalSegmentation RfDetrForInstanceSegmentation ViTMAEForPreTraining
        """,
    "its autocorrelation picks the delays for all rows of a micro-batch together": "AutoformerForPrediction",
    "it weights two means by the square roots of their numbers of targets": "DFineForObjectDetection",
    "it is the square root of a difference of means": "GLPNForDepthEstimation",
}
NO_UNIT = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Class name → reason why its loss is no mean over countable targets."""

_NAMES: dict[LossUnit, str] = {
    "attended_tokens": "ElectraForPreTraining FunnelForPreTraining",
    "boxes": """
        ConditionalDetrForObjectDetection ConditionalDetrForSegmentation DabDetrForObjectDetection
        DeformableDetrForObjectDetection LwDetrForObjectDetection RfDetrForObjectDetection
        RTDetrForObjectDetection RTDetrV2ForObjectDetection
        """,
    # Tokens as for others, but their decoder cannot start without any label, which the probe of the shift needs.
    "tokens": "MBartForConditionalGeneration PLBartForConditionalGeneration",
    # Labels of tokens, but a mean over questions; and labels that -100 must not be among.
    "rows": "ParakeetForTDT TapasForQuestionAnswering",
    "masked_patches": """
        DeiTForMaskedImageModeling FocalNetForMaskedImageModeling SwinForMaskedImageModeling
        Swinv2ForMaskedImageModeling ViTForMaskedImageModeling
        """,
}
UNITS: dict[str, LossUnit] = {name: unit for unit, names in _NAMES.items() for name in names.split()}
"""Class name → unit of its loss."""


@dataclass(frozen=True, slots=True)
class KnownHead:
    """The unit of a head, by its class."""

    loss_unit: LossUnit | None
    """None: it has none, see ``reason``."""
    ignore_index: int = IGNORE_INDEX
    reason: str = ""


def known_head(model: nn.Module) -> KnownHead | None:
    """Look up a model's class, without wrappers; None if the general rule holds."""
    config: Any = getattr(model, "config", None)
    for name in (base.__name__ for base in type(model).__mro__):
        if name in NO_UNIT:
            return KnownHead(None, reason=f"{name}: {NO_UNIT[name]}")
        if UNITS.get(name) == "boxes" and getattr(config, "num_denoising", None):
            return KnownHead(None, reason=f"{name}: {_DENOISING}")
        if name in UNITS:
            return KnownHead(UNITS[name])
        if name.endswith("ForCTC") and hasattr(config, "ctc_loss_reduction"):
            return KnownHead("sum" if config.ctc_loss_reduction == "sum" else "rows")
        if name.endswith("ForRNNT") and hasattr(config, "blank_token_id"):
            return KnownHead("tokens", ignore_index=config.blank_token_id)
        if name.endswith("ForSemanticSegmentation"):
            for attribute in ("semantic_loss_ignore_index", "loss_ignore_index"):
                if hasattr(config, attribute):
                    # One class: a mean over all pixels, ignored ones with a loss of 0.
                    is_binary = getattr(config, "num_labels", None) == 1
                    return KnownHead("rows" if is_binary else "tokens", ignore_index=getattr(config, attribute))
    return None
