"""Labels of any head, with ragged numbers of targets, by the name of its class."""

import re
from collections.abc import Callable

import torch
from torch import Generator, nn
from transformers import PretrainedConfig

from benchmarks.heads.configs import NUM_CLASSES
from benchmarks.heads.draws import LENGTH, NUM_CHOICES, classes, image_size, keep_some, noise, setting, words
from benchmarks.heads.inputs import MakeRow, Row

MakeLabels = Callable[[Generator, PretrainedConfig, int], Row]
"""(generator, configuration, number of classes) → labels."""


def labels_of(model: nn.Module, names: set[str]) -> list[MakeRow]:
    """The likeliest labels first; several only where the name of the head does not tell."""
    name, config = type(model).__name__, model.config
    num_classes = getattr(config, "num_labels", None) or NUM_CLASSES
    if re.search(r"^(Electra|Funnel)ForPreTraining$", name):
        return [lambda g: {"labels": classes(g, 2, LENGTH)}]
    if "start_positions" in names:
        return [_answers]
    if "return_loss" in names and not {"labels", "future_values", "target_values"} & names:
        return [lambda g: {"return_loss": True}]
    for pattern, labels in _LABELS.items():
        if re.search(pattern, name):
            return [lambda g, make=make: _named(make(g, config, num_classes), names) for make in labels]
    if "labels" not in names:
        return [lambda g: {}]
    return [
        lambda g, make=make: _named(make(g, config, num_classes), names) for make in (_word_labels, _row_class, _number)
    ]


def _named(labels: Row, names: set[str]) -> Row:
    """Only what the forward takes."""
    return {name: value for name, value in labels.items() if name in names}


def _answers(generator: Generator) -> Row:
    return {f"{end}_positions": classes(generator, LENGTH) for end in ("start", "end")}


def _word_labels(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """The first labels are always there: a head that shifts has no use for position 0, so that counting it shows."""
    return {"labels": keep_some(generator, words(generator, LENGTH))}


def _two_tasks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    sentence = {name: classes(generator, 2) for name in ("next_sentence_label", "sentence_order_label", "ans")}
    return _word_labels(generator, config, num_classes) | sentence


def _two_visual_tasks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    labels = keep_some(generator, words(generator, LENGTH + 4))
    return {"labels": labels, "sentence_image_labels": classes(generator, 2)}


def _attacked(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """Masked words, and another text to compare with."""
    labels = _word_labels(generator, config, num_classes)["labels"]
    return {"labels_input_ids": labels, "attack_input_ids": words(generator, LENGTH)}


def _spectrogram(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """Whole frames end early, not single numbers."""
    labels = noise(generator, 16, setting(config, "num_mel_bins", default=80))
    labels[4 + int(classes(generator, 12)) :] = -100.0
    return {"labels": labels}


def _row_class(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": classes(generator, num_classes)}


def _number(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": torch.randn((), generator=generator)}


def _numbers(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": torch.rand(num_classes, generator=generator)}


def _frames_of(num_frames: int) -> MakeLabels:
    return lambda g, c, n: {"labels": nn.functional.one_hot(classes(g, n, num_frames), n)}


def _transduced(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """The decoder of a transducer reads the labels behind a blank, which is what ends them too."""
    blank, end = (setting(config, name, default=0) for name in ("blank_token_id", "pad_token_id"))
    labels = keep_some(generator, words(generator, 6), rest=end if setting(config, "durations") else blank)
    return {"labels": labels, "decoder_input_ids": torch.cat([torch.tensor([blank]), labels])}


def _pixels(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    ignored = setting(config, "semantic_loss_ignore_index", "loss_ignore_index", default=255)
    labels = classes(generator, num_classes, *image_size(config))
    return {"labels": keep_some(generator, labels, rest=ignored, least=64)}


def _boxes(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    count = 1 + int(classes(generator, 4))
    boxes = 0.2 + 0.2 * torch.rand(count, 4, generator=generator)
    return {"labels": {"class_labels": classes(generator, num_classes, count), "boxes": boxes}}


def _boxes_with_masks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    labels = _boxes(generator, config, num_classes)["labels"]
    masks = classes(generator, 2, len(labels["boxes"]), *image_size(config))
    return {"labels": labels | {"masks": masks.float()}}


def _masks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    count = 1 + int(classes(generator, 3))
    return {
        "mask_labels": classes(generator, 2, count, *image_size(config)).float(),
        "class_labels": classes(generator, num_classes, count),
    }


def _future(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    length, channels = (setting(config, name, default=1) for name in ("prediction_length", "num_input_channels"))
    if (horizon := setting(config, "horizon_length")) is not None:
        return {"future_values": noise(generator, horizon)}
    if setting(config, "lags_sequence") is not None:
        return {"future_values": noise(generator, length), "future_time_features": noise(generator, length, 1)}
    return {"future_values": noise(generator, length, channels)}


_LABELS: dict[str, list[MakeLabels]] = {
    r"ForTokenClassification$": [lambda g, c, n: {"labels": keep_some(g, classes(g, n, LENGTH))}],
    r"ForAudioFrameClassification$": [_frames_of(20), _frames_of(24), _frames_of(48)],
    r"ForTimeSeriesClassification$|^PatchTSTForClassification$": [lambda g, c, n: {"target_values": classes(g, n)}],
    r"For(Sequence|Image|Images|Video|Audio|Entity).*Classification|ForXVector$|ForImageClassification": [
        _row_class,
        _numbers,
    ],
    r"ForMultipleChoice$": [lambda g, c, n: {"labels": classes(g, NUM_CHOICES)}],
    r"ForNextSentencePrediction$|Retrieval$": [lambda g, c, n: {"labels": classes(g, 2)}],
    r"ForTextToSpeech$|ForSpeechToSpeech$": [_spectrogram],
    r"^VisualBertForPreTraining$": [_two_visual_tasks],
    r"ForVisualQuestionAnswering$|^VisualBertForQuestionAnswering$|^ViltForQuestionAnswering$": [_numbers],
    r"^ViltForImagesAndText": [_row_class],
    r"ForCTC$": [lambda g, c, n: {"labels": keep_some(g, words(g, 6))}],
    r"ForRNNT$|ForTDT$": [_transduced],
    r"ForSemanticSegmentation$": [_pixels],
    r"ForDepthEstimation$": [lambda g, c, n: {"labels": 0.1 + torch.rand(*image_size(c), generator=g)}],
    r"ForObjectDetection$": [_boxes, _boxes_with_masks],
    r"(^RfDetr.*|For)(Segmentation|InstanceSegmentation)$": [_boxes_with_masks, _masks],
    r"ForUniversalSegmentation$": [_masks, _boxes_with_masks],
    r"ForMaskedImageModeling$|MAEForPreTraining$": [lambda g, c, n: {}],
    r"ForPrediction$": [_future],
    r"ForRegression$": [lambda g, c, n: {"target_values": noise(g, setting(c, "num_targets", default=1))}, _number],
    r"^RoCBertForPreTraining$": [_attacked],
    r"ForPreTraining$": [_two_tasks],
}
