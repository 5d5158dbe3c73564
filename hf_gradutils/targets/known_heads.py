"""Heads of transformers whose loss is not the mean that their labels suggest, by class name.

Measured on the heads of transformers 5.24 that could be built, see ``docs/heads.md``; the others follow the rule of
``auto`` and the probe of the shift. Names are looked up along the class hierarchy, which finds subclasses and the
classes that ``fully_shard`` derives. ``tests/targets/test_known_heads.py`` fails when a name moves.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_gradutils.targets.class_names import class_names
from hf_gradutils.targets.contrast_and_means import CONTRAST_AND_MEANS, contrast_and_means_of
from hf_gradutils.targets.contrastive_heads import WHOLE_BATCH_HEADS, whole_batch_loss_of
from hf_gradutils.targets.counter import IGNORE_INDEX, LossUnit
from hf_gradutils.targets.means_of_boxes import MEANS_OF_BOXES, augments_positions, means_of_matches_of
from hf_gradutils.targets.several_means import SEVERAL_MEANS
from hf_gradutils.targets.whole_batch import WholeBatchHead

_DENOISING = (
    "it draws noisy copies of the boxes in every forward, as many as the fullest image of a micro-batch needs; with "
    "num_denoising=0 in the configuration it is exact"
)

_AUGMENTED = (
    "it draws one change of all positions for all rows of a micro-batch; without pos_embed_shift, pos_embed_jitter and "
    "pos_embed_rescale in the configuration it is exact"
)
_DROPPED = (
    "every video prompts the texts of all micro-batches, with dropout that ranks would draw differently; it is exact "
    "with prompt_attention_dropout=0 and prompt_projection_dropout=0"
)
_LENGTHS = (
    "mask_type='forecast' masks the ends of rows in several lengths, by their share in a micro-batch, and averages "
    "over all that is masked; with one length in num_forecast_mask_patches it is exact"
)

_REASONS = {
    "its autocorrelation picks the delays for all rows of a micro-batch together": "AutoformerForPrediction",
    "its matcher compares masks at as many random points as a micro-batch has queries": "RfDetrForInstanceSegmentation",
}
NO_UNIT = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Class name → reason why no accumulation gives its loss of the whole batch."""

_NAMES: dict[LossUnit, str] = {
    "attended_tokens": "ElectraForPreTraining FunnelForPreTraining",
    "boxes": """
        ConditionalDetrForObjectDetection ConditionalDetrForSegmentation DabDetrForObjectDetection
        DeformableDetrForObjectDetection LwDetrForObjectDetection RfDetrForObjectDetection
        RTDetrForObjectDetection RTDetrV2ForObjectDetection
        """,
    # Tokens as for others, but their decoder cannot start without any label, which the probe of the shift needs.
    "tokens": "MBartForConditionalGeneration PLBartForConditionalGeneration",
    # Labels of tokens, but a mean over questions; labels that -100 must not be among; and means over masked patches, of
    # which all rows have as many.
    "rows": """
        ParakeetForTDT TapasForQuestionAnswering PatchTSMixerForPretraining PatchTSTForPretraining ViTMAEForPreTraining
        """,
    "masked_patches": """
        DeiTForMaskedImageModeling FocalNetForMaskedImageModeling SwinForMaskedImageModeling
        Swinv2ForMaskedImageModeling ViTForMaskedImageModeling
        """,
}
UNITS: dict[str, LossUnit] = {name: unit for unit, names in _NAMES.items() for name in names.split()}
"""Class name → unit of its loss."""

SHARED = WHOLE_BATCH_HEADS | CONTRAST_AND_MEANS | SEVERAL_MEANS.keys() | MEANS_OF_BOXES.keys()
"""Names of classes that no unit makes exact, but shares do; rows count where shares are not wanted."""

_DRAWING = """
    EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation Mask2FormerForUniversalSegmentation
    OneFormerForUniversalSegmentation PatchTSMixerForPretraining PatchTSTForPretraining ViTMAEForPreTraining
    """
DRAWS_BY_ROW = frozenset(_DRAWING.split())
"""Names of classes that draw masks or points in every forward, as many for each row or object whatever is beside it.

What is drawn differs between splits of a batch, as dropout does; given what is drawn, micro-batches add up.
"""


@dataclass(frozen=True, slots=True)
class KnownHead:
    """The unit of a head, by its class."""

    loss_unit: LossUnit | None
    """None: it has none, see ``reason``."""
    ignore_index: int = IGNORE_INDEX
    reason: str = ""
    is_shared: bool = False
    """The loss of the head itself needs shares; another one of the user's own follows the general rule."""


def known_head(model: nn.Module) -> KnownHead | None:
    """Look up a model's class, without wrappers; None if the general rule holds."""
    config: Any = getattr(model, "config", None)
    for name in class_names(model):
        if reason := _why_without_unit(name, model):
            return KnownHead(None, reason=f"{name}: {reason}")
        if name in SHARED:
            return KnownHead("rows", is_shared=True)
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


def whole_batch_head(model: nn.Module) -> WholeBatchHead | None:
    """The loss of the whole batch of a model's class, without wrappers; None if it has another."""
    lookups = (whole_batch_loss_of, contrast_and_means_of, means_of_matches_of)
    return next(filter(None, (look_up(model) for look_up in lookups)), None)


def draws_by_row(model: nn.Module) -> bool:
    """Look up a model's class, without wrappers, in ``DRAWS_BY_ROW``."""
    return not DRAWS_BY_ROW.isdisjoint(class_names(model))


def _why_without_unit(name: str, model: nn.Module) -> str:
    """The reason why no accumulation gives the loss of a class, or of one with such a configuration; mostly none."""
    config: Any = getattr(model, "config", None)
    if (name in MEANS_OF_BOXES or UNITS.get(name) == "boxes") and getattr(config, "num_denoising", None):
        return _DENOISING
    if name in DRAWS_BY_ROW and augments_positions(config):
        return _AUGMENTED
    if name in UNITS and _masks_in_several_lengths(config):
        return _LENGTHS
    if name == "XCLIPModel" and whole_batch_loss_of(model) is None:
        return _DROPPED
    return NO_UNIT.get(name, "")


def _masks_in_several_lengths(config: Any) -> bool:
    lengths = getattr(config, "num_forecast_mask_patches", None)
    return getattr(config, "mask_type", None) == "forecast" and isinstance(lengths, list | tuple) and len(lengths) > 1
