"""Inputs of any head: text, images, sounds and series, in the shapes that models take."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig

from benchmarks.heads.configs import IMAGE_SIZE
from benchmarks.heads.draws import LENGTH, NUM_CHOICES, classes, image_size, keep_some, noise, setting, words

Row = dict[str, Any]
MakeRow = Callable[[Generator], Row]

_IMAGES = ("pixel_values", "pixel_values_videos", "flattened_patches")
_SOUNDS = ("input_values", "input_features")


def inputs_of(model: nn.Module, names: set[str], required: set[str]) -> Iterator[MakeRow]:
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
        if name in names and (name in required or name not in _IF_REQUIRED):
            row[name] = extra(generator, model.config)
    needs_mask = "attention_mask" in names and not with_text and _NEEDS_MASK.search(type(model).__name__)
    if needs_mask and "input_features" in row:
        row["attention_mask"] = torch.ones(max(row["input_features"].shape[0], 1), dtype=torch.int64)
    return {name: value for name, value in row.items() if value is not None}


def _text(generator: Generator, model: nn.Module, names: set[str]) -> Row:
    name = type(model).__name__
    shape = (NUM_CHOICES, LENGTH) if name.endswith("ForMultipleChoice") else (LENGTH,)
    row = {"input_ids": words(generator, *shape)}
    eos = setting(model.config, "eos_token_id", default=2)
    if model.config.is_encoder_decoder and name.endswith("Classification"):
        row["input_ids"][..., -1] = eos if isinstance(eos, int) else eos[0]  # they classify by this one
    if "attention_mask" in names:
        mask = torch.ones(shape, dtype=torch.int64)
        # Heads over what the mask keeps are the only ones whose mask is ragged: what is padded is no target elsewhere.
        is_discriminator = re.search(r"^(Electra|Funnel)ForPreTraining$", name)
        row["attention_mask"] = keep_some(generator, mask, rest=0) if is_discriminator else mask
    if "bbox" in names:
        corner = classes(generator, 10, *shape, 2)
        row["bbox"] = torch.cat([corner, corner + 1 + classes(generator, 10, *shape, 2)], dim=-1)
        if setting(model.config, "dim_bbox") is not None:
            row["bbox"] = row["bbox"] / 20
    return row


def _image_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = setting(config, "num_frames", "frames_per_clip", default=4)
    shapes = [(channels, *image_size(config)), (frames, channels, *image_size(config))]
    if _takes_patches(config):
        shapes = [(16, channels * setting(config, "patch_size") ** 2)]
    shapes += [(channels, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE), (1, channels, *image_size(config)), (channels, 224, 224)]
    return [lambda g, shape=shape: (0.2 + 2 * torch.rand((), generator=g)) * noise(g, *shape) for shape in shapes]


def _takes_patches(config: PretrainedConfig) -> bool:
    """A list of flat patches instead of an image."""
    return config.model_type.startswith("siglip2")


def _sound_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    """Waves of 20 frames, or spectrograms in both orders."""
    mels = setting(config, "num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", default=80)
    longest = setting(config, "max_source_positions", default=24)
    frames = setting(config, "max_length", "spec_size", default=64)
    shapes = [(6500,), (48, mels), (mels, 48), (mels, 2 * longest), (2 * longest, mels), (frames, mels)]
    shapes += [(1, 6400), (1, 24000), (16000,)]
    return [lambda g, shape=shape: noise(g, *shape) for shape in shapes]


def _spectrogram_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    makers = _sound_makers(config)
    width = setting(config, "feature_projection_input_dim", default=None)
    extra = [lambda g: noise(g, 48, width)] if width else []
    return extra + makers[1:] + makers[:1]


def _series_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    length = setting(config, "context_length", "seq_len", default=32)
    channels = setting(config, "num_input_channels", "input_size", default=1)
    lags = setting(config, "lags_sequence", default=[0])
    shapes = [(length, channels), (length + max(lags),), (length,)]
    return [lambda g, shape=shape: noise(g, *shape) for shape in shapes]


def _patch_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    patch = setting(config, "patch_size", default=8)
    width = 2 + 3 * patch * patch  # row and column first

    def make(generator: Generator) -> Tensor:
        patches = noise(generator, LENGTH, width)
        patches[:, 0], patches[:, 1] = torch.arange(LENGTH) // 4 + 1, torch.arange(LENGTH) % 4 + 1
        return patches

    return [make]


def _perceived_makers(config: PretrainedConfig) -> list[Callable[[Generator], Tensor]]:
    return [lambda g: words(g, LENGTH), *_image_makers(config)]


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
    height, width = image_size(config)
    patch = setting(config, "patch_size", default=8)
    rows, columns = (patch, patch) if isinstance(patch, int) else patch[-2:]
    num_patches = (height // rows) * (width // columns)
    if setting(config, "tubelet_size") is not None:
        num_patches *= setting(config, "num_frames", "frames_per_clip") // setting(config, "tubelet_size")
        # Video models gather the masked patches of all rows: every row has to have as many.
        return torch.arange(num_patches) < num_patches // 2
    return keep_some(generator, torch.ones(num_patches, dtype=torch.bool), rest=False)


# Not every head over sound takes a mask for it, but these fail without.
_NEEDS_MASK = re.compile(r"^(Parakeet|Lasr|Nemotron)")
_IF_REQUIRED = {"task_inputs", "qformer_input_ids"}
"""The other extras are given wherever a forward takes them."""
_EXTRAS: dict[str, Callable[[Generator, PretrainedConfig], Any]] = {
    "bool_masked_pos": _patch_mask,
    "visual_embeds": lambda g, c: noise(g, 4, setting(c, "visual_embedding_dim", default=32)),
    "pixel_attention_mask": lambda g, c: torch.ones(16, dtype=torch.int64) if _takes_patches(c) else None,
    "spatial_shapes": lambda g, c: torch.tensor([4, 4]) if _takes_patches(c) else None,
    "visual_attention_mask": lambda g, c: torch.ones(4, dtype=torch.int64),
    "task_inputs": lambda g, c: words(g, setting(c, "task_seq_len", default=77)),
    "qformer_input_ids": lambda g, c: words(g, LENGTH),
    "speaker_embeddings": lambda g, c: noise(g, setting(c, "speaker_embedding_dim", default=512)),
    "mask_time_indices": lambda g, c: keep_some(g, torch.ones(20, dtype=torch.bool), rest=False),
    "sampled_negative_indices": lambda g, c: classes(g, 20, 20, setting(c, "num_negatives", default=100)),
    "visual_feats": lambda g, c: noise(g, 4, setting(c, "visual_feat_dim", default=32)),
    "past_time_features": lambda g, c: noise(g, 14, 1),
    "past_observed_mask": lambda g, c: torch.ones(14) if setting(c, "lags_sequence") else None,
    "visual_pos": lambda g, c: torch.rand(4, setting(c, "visual_pos_dim", default=4), generator=g),
}
