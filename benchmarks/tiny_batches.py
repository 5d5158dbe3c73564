"""Random rows with ragged targets for a tiny model of any head, found by trying what its forward takes."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig

from benchmarks.tiny_models import IMAGE_SIZE, NUM_CLASSES, VOCAB

Row = dict[str, Any]
MakeRow = Callable[[Generator], Row]

LENGTH = 12
FIRST_WORD = 64
NUM_CHOICES = 3
ROWS_TO_TRY = 3


def collate(rows: list[Row]) -> dict[str, Any]:
    """Rows → batch: tensors stacked, but lists of what detectors want per image, and flags once."""
    return {name: _join(name, [row[name] for row in rows]) for name in rows[0]}


def _join(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], Tensor) and name not in ("mask_labels", "class_labels"):
        return torch.stack(values)
    return values[0] if isinstance(values[0], bool) else values


def setting(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of the names that the configuration, or one within it, has."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for name in names:
        try:
            value = getattr(config, name, None)
        except AttributeError:
            continue  # differs between layers
        if value is not None:
            return value
    for part in inner:
        value = setting(part, *names)
        if value is not None:
            return value
    return default


class NoBatchError(ValueError):
    """No batch made the head return a loss."""


class NoLossError(NoBatchError):
    """The head runs, but returns none."""


_SAYS_SO = re.compile(r"KeyError\('loss'\)|is not trainable|does not support training")


def find_rows(model: nn.Module) -> tuple[MakeRow, str]:
    """What makes rows that the model returns a loss for, and the names of what is in them.

    Raises:
        NoBatchError: with the error that the likeliest batch ended in.
    """
    failures: list[NoBatchError] = []
    for make_row in _candidates(model):
        generator = torch.Generator().manual_seed(1)
        try:
            batch = collate([make_row(generator) for _ in range(ROWS_TO_TRY)])
            with torch.no_grad():
                outputs = model(**batch)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise NoLossError(f"no loss, got {type(loss).__name__}")
            if not loss.isfinite().all():
                raise NoBatchError("the loss is not finite")
        except MemoryError:
            raise
        except Exception as error:
            has_no_loss = isinstance(error, NoLossError | NotImplementedError) or _SAYS_SO.search(repr(error))
            failures.append((NoLossError if has_no_loss else NoBatchError)(f"{type(error).__name__}: {error}"))
            continue
        return make_row, ", ".join(batch)
    raise max(
        failures, key=lambda failure: isinstance(failure, NoLossError), default=NoBatchError("its inputs are unknown")
    )


# ---- Candidates: inputs x labels ----


def _candidates(model: nn.Module) -> Iterator[MakeRow]:
    parameters = inspect.signature(type(model).forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    for labels in _labels_of(model, set(parameters)):
        for inputs in _inputs_of(model, set(parameters), required - {"self"}):
            yield lambda g, inputs=inputs, labels=labels: _both(g, inputs, labels)


def _both(generator: Generator, inputs: MakeRow, labels: MakeRow) -> Row:
    row = inputs(generator)
    return row | labels(generator) if "labels" not in row else row


def _words(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)


def _classes(generator: Generator, num_classes: int, *shape: int) -> Tensor:
    return torch.randint(num_classes, shape, generator=generator)


def _keep_some(generator: Generator, values: Tensor, rest: Any = -100, least: int = 2) -> Tensor:
    """Overwrite the tail. The square makes few targets common and many rare, so that parts of a batch differ."""
    kept = least + int((values.numel() - least + 1) * torch.rand((), generator=generator).square())
    values.view(-1)[kept:] = rest
    return values


# ---- Inputs ----

_IMAGES = ("pixel_values", "pixel_values_videos", "flattened_patches")
_SOUNDS = ("input_values", "input_features")


def _inputs_of(model: nn.Module, names: set[str], required: set[str]) -> Iterator[MakeRow]:
    """Text alone, other inputs alone, both; images and sounds in the shapes that models are known to take."""
    has_text = "input_ids" in names
    others = [name for name in (*_IMAGES, *_SOUNDS, "past_values", "inputs") if name in names]
    kinds: list[tuple[bool, list[str]]] = []
    if has_text and not required & set(others):
        kinds.append((True, []))
    kinds += [(False, [name]) for name in others]
    if has_text:
        kinds += [(True, [name]) for name in others]
    if len(others) > 1:
        kinds.append((has_text, others))
    for with_text, chosen in kinds:
        variants: list[list[Callable[[Generator], Tensor]]] = [_VARIANTS[name](model.config) for name in chosen]
        for index in range(max((len(makers) for makers in variants), default=1)):
            makers = {name: makers[min(index, len(makers) - 1)] for name, makers in zip(chosen, variants, strict=True)}
            yield lambda g, with_text=with_text, makers=makers: _inputs(g, model, names, required, with_text, makers)


def _inputs(
    generator: Generator,
    model: nn.Module,
    names: set[str],
    required: set[str],
    with_text: bool,
    makers: dict[str, Callable[[Generator], Tensor]],
) -> Row:
    row: Row = {}
    if with_text:
        row |= _text(generator, model, names)
    for name, make in makers.items():
        row[name] = make(generator)
    for name, extra in _EXTRAS.items():
        if name in names and (name in required or name in _ALWAYS):
            row[name] = extra(generator, model.config)
    if (
        "attention_mask" in names
        and "input_features" in row
        and not with_text
        and _NEEDS_MASK.search(type(model).__name__)
    ):
        row["attention_mask"] = torch.ones(max(row["input_features"].shape[0], 1), dtype=torch.int64)
    return {name: value for name, value in row.items() if value is not None}


def _text(generator: Generator, model: nn.Module, names: set[str]) -> Row:
    name = type(model).__name__
    shape = (NUM_CHOICES, LENGTH) if name.endswith("ForMultipleChoice") else (LENGTH,)
    row = {"input_ids": _words(generator, *shape)}
    eos = setting(model.config, "eos_token_id", default=2)
    if model.config.is_encoder_decoder and name.endswith("Classification"):
        row["input_ids"][..., -1] = eos if isinstance(eos, int) else eos[0]  # they classify by this one
    if "attention_mask" in names:
        mask = torch.ones(shape, dtype=torch.int64)
        # Heads over what the mask keeps are the only ones whose mask is ragged: what is padded is no target elsewhere.
        is_discriminator = re.search(r"^(Electra|Funnel)ForPreTraining$", name)
        row["attention_mask"] = _keep_some(generator, mask, rest=0) if is_discriminator else mask
    if "bbox" in names:
        corner = _classes(generator, 10, *shape, 2)
        row["bbox"] = torch.cat([corner, corner + 1 + _classes(generator, 10, *shape, 2)], dim=-1)
        if setting(model.config, "dim_bbox") is not None:
            row["bbox"] = row["bbox"] / 20
    return row


def _size(config: PretrainedConfig) -> tuple[int, int]:
    size = setting(config, "image_size", "img_size", "crop_size", "input_size", default=IMAGE_SIZE)
    if isinstance(size, dict):
        size = [size.get("height", IMAGE_SIZE), size.get("width", IMAGE_SIZE)]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _image_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = setting(config, "num_frames", "frames_per_clip", default=4)
    shapes = [(channels, *_size(config)), (frames, channels, *_size(config))]
    if _takes_patches(config):
        shapes = [(16, channels * setting(config, "patch_size") ** 2)]
    shapes += [(channels, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE), (1, channels, *_size(config)), (channels, 224, 224)]
    return [lambda g, shape=shape: (0.2 + 2 * torch.rand((), generator=g)) * _noise(g, *shape) for shape in shapes]


def _takes_patches(config: PretrainedConfig) -> bool:
    """A list of flat patches instead of an image."""
    return config.model_type.startswith("siglip2")


def _noise(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _sound_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    """Waves of 20 frames, or spectrograms in both orders."""
    mels = setting(config, "num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", default=80)
    longest = setting(config, "max_source_positions", default=24)
    frames = setting(config, "max_length", "spec_size", default=64)
    shapes = [(6500,), (48, mels), (mels, 48), (mels, 2 * longest), (2 * longest, mels), (frames, mels)]
    shapes += [(1, 6400), (1, 24000), (16000,)]
    return [lambda g, shape=shape: _noise(g, *shape) for shape in shapes]


def _spectrogram_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    makers = _sound_makers(config)
    width = setting(config, "feature_projection_input_dim", default=None)
    extra = [lambda g: _noise(g, 48, width)] if width else []
    return extra + makers[1:] + makers[:1]


def _series_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    length = setting(config, "context_length", "seq_len", default=32)
    channels = setting(config, "num_input_channels", "input_size", default=1)
    lags = setting(config, "lags_sequence", default=[0])
    shapes = [(length, channels), (length + max(lags),), (length,)]
    return [lambda g, shape=shape: _noise(g, *shape) for shape in shapes]


def _patch_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    patch = setting(config, "patch_size", default=8)
    width = 2 + 3 * patch * patch  # row and column first

    def make(generator: Generator) -> Tensor:
        patches = _noise(generator, LENGTH, width)
        patches[:, 0], patches[:, 1] = torch.arange(LENGTH) // 4 + 1, torch.arange(LENGTH) % 4 + 1
        return patches

    return [make]


def _perceived_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    return [lambda g: _words(g, LENGTH), *_image_makers(config)]


_VARIANTS: dict[str, Callable[[PretrainedConfig], list[Callable[[Generator], Tensor]]]] = {
    "pixel_values": _image_makers,
    "pixel_values_videos": lambda config: _image_makers(config)[1:] + _image_makers(config)[:1],
    "flattened_patches": _patch_makers,
    "input_values": _sound_makers,
    "input_features": _spectrogram_makers,
    "past_values": _series_makers,
    "inputs": _perceived_makers,
}


def _patch_mask(generator: Generator, config: PretrainedConfig) -> Tensor:
    height, width = _size(config)
    patch = setting(config, "patch_size", default=8)
    rows, columns = (patch, patch) if isinstance(patch, int) else patch[-2:]
    num_patches = (height // rows) * (width // columns)
    if setting(config, "tubelet_size") is not None:
        num_patches *= setting(config, "num_frames", "frames_per_clip") // setting(config, "tubelet_size")
        # Video models gather the masked patches of all rows: every row has to have as many.
        return torch.arange(num_patches) < num_patches // 2
    return _keep_some(generator, torch.ones(num_patches, dtype=torch.bool), rest=False)


# Not every head over sound takes a mask for it, but these fail without.
_NEEDS_MASK = re.compile(r"^(Parakeet|Lasr|Nemotron)")
_ALWAYS = {
    "pixel_attention_mask",
    "spatial_shapes",
    "visual_attention_mask",
    "mask_time_indices",
    "sampled_negative_indices",
    "speaker_embeddings",
    "bool_masked_pos",
    "visual_embeds",
    "visual_feats",
    "visual_pos",
    "past_observed_mask",
    "past_time_features",
}
_EXTRAS: dict[str, Callable[[Generator, PretrainedConfig], Any]] = {
    "bool_masked_pos": _patch_mask,
    "visual_embeds": lambda g, c: _noise(g, 4, setting(c, "visual_embedding_dim", default=32)),
    "pixel_attention_mask": lambda g, c: torch.ones(16, dtype=torch.int64) if _takes_patches(c) else None,
    "spatial_shapes": lambda g, c: torch.tensor([4, 4]) if _takes_patches(c) else None,
    "visual_attention_mask": lambda g, c: torch.ones(4, dtype=torch.int64),
    "task_inputs": lambda g, c: _words(g, setting(c, "task_seq_len", default=77)),
    "qformer_input_ids": lambda g, c: _words(g, LENGTH),
    "speaker_embeddings": lambda g, c: _noise(g, setting(c, "speaker_embedding_dim", default=512)),
    "mask_time_indices": lambda g, c: _keep_some(g, torch.ones(20, dtype=torch.bool), rest=False),
    "sampled_negative_indices": lambda g, c: _classes(g, 20, 20, setting(c, "num_negatives", default=100)),
    "visual_feats": lambda g, c: _noise(g, 4, setting(c, "visual_feat_dim", default=32)),
    "past_time_features": lambda g, c: _noise(g, 14, 1),
    "past_observed_mask": lambda g, c: torch.ones(14) if setting(c, "lags_sequence") else None,
    "visual_pos": lambda g, c: torch.rand(4, setting(c, "visual_pos_dim", default=4), generator=g),
}

# ---- Labels ----


def _labels_of(model: nn.Module, names: set[str]) -> list[MakeRow]:
    """The likeliest labels first; several only where the name of the head does not tell."""
    name, config = type(model).__name__, model.config
    num_classes = getattr(config, "num_labels", None) or NUM_CLASSES
    if re.search(r"^(Electra|Funnel)ForPreTraining$", name):
        return [lambda g: {"labels": _classes(g, 2, LENGTH)}]
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
    return {f"{end}_positions": _classes(generator, LENGTH) for end in ("start", "end")}


def _word_labels(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """The first labels are always there: a head that shifts has no use for position 0, so that counting it shows."""
    return {"labels": _keep_some(generator, _words(generator, LENGTH))}


def _two_tasks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    sentence = {name: _classes(generator, 2) for name in ("next_sentence_label", "sentence_order_label", "ans")}
    return _word_labels(generator, config, num_classes) | sentence


def _two_visual_tasks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    labels = _keep_some(generator, _words(generator, LENGTH + 4))
    return {"labels": labels, "sentence_image_labels": _classes(generator, 2)}


def _spectrogram(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """Whole frames end early, not single numbers."""
    labels = _noise(generator, 16, setting(config, "num_mel_bins", default=80))
    labels[4 + int(_classes(generator, 12)) :] = -100.0
    return {"labels": labels}


def _token_classes(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": _keep_some(generator, _classes(generator, num_classes, LENGTH))}


def _row_class(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": _classes(generator, num_classes)}


def _choice(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": _classes(generator, NUM_CHOICES)}


def _one_of_two(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": _classes(generator, 2)}


def _number(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": torch.randn((), generator=generator)}


def _numbers(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": torch.rand(num_classes, generator=generator)}


def _frames_of(num_frames: int) -> Callable[[Generator, PretrainedConfig, int], Row]:
    def frames(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
        return {"labels": nn.functional.one_hot(_classes(generator, num_classes, num_frames), num_classes)}

    return frames


def _few_words(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": _keep_some(generator, _words(generator, 6))}


def _transduced(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    """The decoder of a transducer reads the labels behind a blank, which is what ends them too."""
    blank, end = (setting(config, name, default=0) for name in ("blank_token_id", "pad_token_id"))
    labels = _keep_some(generator, _words(generator, 6), rest=end if setting(config, "durations") else blank)
    return {"labels": labels, "decoder_input_ids": torch.cat([torch.tensor([blank]), labels])}


def _pixels(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    ignored = setting(config, "semantic_loss_ignore_index", "loss_ignore_index", default=255)
    labels = _classes(generator, num_classes, *_size(config))
    return {"labels": _keep_some(generator, labels, rest=ignored, least=64)}


def _depths(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"labels": 0.1 + torch.rand(*_size(config), generator=generator)}


def _boxes(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    count = 1 + int(_classes(generator, 4))
    boxes = 0.2 + 0.2 * torch.rand(count, 4, generator=generator)
    return {"labels": {"class_labels": _classes(generator, num_classes, count), "boxes": boxes}}


def _boxes_with_masks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    labels = _boxes(generator, config, num_classes)["labels"]
    masks = _classes(generator, 2, len(labels["boxes"]), *_size(config))
    return {"labels": labels | {"masks": masks.float()}}


def _masks(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    count = 1 + int(_classes(generator, 3))
    return {
        "mask_labels": _classes(generator, 2, count, *_size(config)).float(),
        "class_labels": _classes(generator, num_classes, count),
    }


def _nothing(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {}


def _future(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    length, channels = (setting(config, name, default=1) for name in ("prediction_length", "num_input_channels"))
    if (horizon := setting(config, "horizon_length")) is not None:
        return {"future_values": _noise(generator, horizon)}
    if setting(config, "lags_sequence") is not None:
        return {"future_values": _noise(generator, length), "future_time_features": _noise(generator, length, 1)}
    return {"future_values": _noise(generator, length, channels)}


def _target_class(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"target_values": _classes(generator, num_classes)}


def _target(generator: Generator, config: PretrainedConfig, num_classes: int) -> Row:
    return {"target_values": _noise(generator, setting(config, "num_targets", default=1))}


_LABELS: dict[str, list[Callable[[Generator, PretrainedConfig, int], Row]]] = {
    r"ForTokenClassification$": [_token_classes],
    r"ForAudioFrameClassification$": [_frames_of(20), _frames_of(24), _frames_of(48)],
    r"ForTimeSeriesClassification$|^PatchTSTForClassification$": [_target_class],
    r"For(Sequence|Image|Images|Video|Audio|Entity).*Classification|ForXVector$|ForImageClassification": [
        _row_class,
        _numbers,
    ],
    r"ForMultipleChoice$": [_choice],
    r"ForNextSentencePrediction$|Retrieval$": [_one_of_two],
    r"ForTextToSpeech$|ForSpeechToSpeech$": [_spectrogram],
    r"^VisualBertForPreTraining$": [_two_visual_tasks],
    r"ForVisualQuestionAnswering$|^VisualBertForQuestionAnswering$|^ViltForQuestionAnswering$": [_numbers],
    r"^ViltForImagesAndText": [_row_class],
    r"ForCTC$": [_few_words],
    r"ForRNNT$|ForTDT$": [_transduced],
    r"ForSemanticSegmentation$": [_pixels],
    r"ForDepthEstimation$": [_depths],
    r"ForObjectDetection$": [_boxes, _boxes_with_masks],
    r"(^RfDetr.*|For)(Segmentation|InstanceSegmentation)$": [_boxes_with_masks, _masks],
    r"ForUniversalSegmentation$": [_masks, _boxes_with_masks],
    r"ForMaskedImageModeling$|MAEForPreTraining$": [_nothing],
    r"ForPrediction$": [_future],
    r"ForRegression$": [_target, _number],
    r"ForPreTraining$": [_two_tasks],
}
