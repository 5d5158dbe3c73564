"""The table of losses of the whole batch: each is the head's own loss, and two passes give its gradient.

Heads are tiny, in float64 and in evaluation mode: GroupViT draws numbers in training.
"""

import copy
import functools
import itertools

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from benchmarks.heads.classes import build
from benchmarks.heads.configs import tiny_config
from benchmarks.heads.inputs import LENGTH
from benchmarks.heads.rows import collate, find_rows
from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets.contrastive_heads import WHOLE_BATCH_HEADS, whole_batch_loss_of
from tests.harness.gradients import cast, loss_of_micro_batches, relative_error, whole_gradients
from tests.harness.trainer_cases import IS_OLD

SIZES = 4, 3, 2, 3
"""Rows of the micro-batches."""
TOLERANCE = 1e-9
HEADS = sorted(name for name in WHOLE_BATCH_HEADS if hasattr(transformers, name) or not IS_OLD)
MEAN_GRADIENTS = {"PeAudioModel", "PeVideoModel", "PeAudioVideoModel"}
"""Heads whose gradient is a mean over rows; their loss is not, as its constant part grows with the batch."""


# ---- Heads that benchmarks.heads cannot build or feed ----


def _tiny(name, **fixed):
    return tiny_config(getattr(transformers, name), **fixed)


def _bridge_tower():
    config = _tiny("BridgeTowerConfig", hidden_size=64, text_config=_tiny("BridgeTowerTextConfig", hidden_size=64))
    config.contrastive_hidden_size, config.logit_scale_init_value = 32, 2.0  # the class reads them, without defaults
    return config


def _clap():
    sizes = {"num_mel_bins": 16, "window_size": 4, "spec_size": 64, "patch_embeds_hidden_size": 32, "hidden_size": 64}
    stages = {"depths": [1, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2}
    audio = _tiny("ClapAudioConfig", **sizes, **stages)
    return _tiny("ClapConfig", audio_config=audio)


def _clvp():
    encoders = {f"{name}_config": _tiny("ClvpEncoderConfig", num_attention_heads=1) for name in ("text", "speech")}
    return _tiny("ClvpConfig", **encoders)


def _videos():
    return _tiny("PeVideoEncoderConfig", vision_config=_tiny("ViTConfig", num_labels=32))


def _sounds():
    codec = _tiny("DacConfig", encoder_hidden_size=8, downsampling_ratios=[4, 5])
    return _tiny("PeAudioEncoderConfig", dac_config=codec)


def _sounds_and_videos():
    encoder = _tiny("PeAudioVideoEncoderConfig", audio_config=_sounds(), video_config=_videos())
    return transformers.PeAudioVideoConfig(text_config=_tiny("ModernBertConfig"), audio_video_config=encoder)


IMAGE, VIDEO, SOUND = (3, 32, 32), (4, 3, 32, 32), (1, 200)
BY_HAND = {
    "AlignModel": (
        lambda: _tiny("AlignConfig", projection_dim=8, vision_config=_tiny("AlignVisionConfig", hidden_dim=8)),
        {"pixel_values": IMAGE},
    ),
    "BridgeTowerForContrastiveLearning": (_bridge_tower, {"pixel_values": IMAGE}),
    "ClapModel": (_clap, {"input_features": (1, 64, 16)}),
    "ClvpModelForConditionalGeneration": (_clvp, {"input_features": (32, 40)}),
    "PeAudioModel": (
        lambda: transformers.PeAudioConfig(text_config=_tiny("ModernBertConfig"), audio_config=_sounds()),
        {"input_values": SOUND},
    ),
    "PeVideoModel": (
        lambda: transformers.PeVideoConfig(text_config=_tiny("ModernBertConfig"), video_config=_videos()),
        {"pixel_values_videos": VIDEO},
    ),
    "PeAudioVideoModel": (_sounds_and_videos, {"pixel_values_videos": VIDEO, "input_values": SOUND}),
}
"""Class name → its configuration, and what rows have besides words."""


def _rows_with_words(parts):
    def make_row(generator):
        row = {"input_ids": torch.randint(64, 128, (LENGTH,), generator=generator)}
        row |= {name: torch.randn(shape, generator=generator) for name, shape in parts.items()}
        return row | {"attention_mask": torch.ones(LENGTH, dtype=torch.int64), "return_loss": True}

    return make_row


@functools.cache
def _built(name):
    head_class = getattr(transformers, name)
    if name in BY_HAND:
        config, parts = BY_HAND[name]
        return build(head_class, config()).double().eval(), _rows_with_words(parts)
    head = build(head_class, tiny_config(head_class.config_class))
    make_row, _ = find_rows(head)
    return head.double().eval(), make_row


def _head_and_batches(name):
    """The head and the micro-batches that ``SIZES`` cut a batch into; the batch is the last."""
    head, make_row = _built(name)
    head.zero_grad()
    generator = torch.Generator().manual_seed(5)
    rows = [make_row(generator) for _ in range(sum(SIZES))]
    for index, row in enumerate(rows):
        if "Depth" in name:  # images of other depths, and with more or less of them known
            row["labels"] = row["labels"] * (1 + index)
            row["labels"][: 2 * index] = 0
    ends = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]
    parts = [rows[start:end] for start, end in itertools.pairwise(ends)] + [rows]
    *batches, batch = [cast(collate(part), torch.float64) for part in parts]
    return head, batches, batch


# ---- Losses of micro-batches ----


def _rows_of(head, batch, loss):
    with loss.watching(head):
        return loss.rows(head, batch, head(**batch))


def _of_micro_batches(head, batches):
    """Leave the gradient of the whole batch in ``head``; returns the loss."""
    loss_of = whole_batch_loss_of(head)
    loss = loss_of_micro_batches(loss_of, head, [_rows_of(head, batch, loss_of) for batch in batches])
    loss.backward()
    return loss.item()


def _mean_of_losses(head, batches):
    """Leave the gradient of the losses of micro-batches, weighted by rows, in ``head``; returns that mean."""
    losses = []
    for size, batch in zip(SIZES, batches, strict=True):
        losses.append(head(**batch).loss * size / sum(SIZES))
        losses[-1].backward()
    return torch.stack(losses).sum().item()


def _gradients(head):
    gradients = whole_gradients(head)
    head.zero_grad()
    return gradients


# ---- The table ----


@functools.cache
def _of_whole_batch(name):
    """The head's own loss of the whole batch, and its gradient."""
    head, _, batch = _head_and_batches(name)
    loss = head(**batch).loss
    loss.backward()
    return loss.item(), _gradients(head)


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_a_batchs_rows_is_the_heads_own(name):
    head, _, batch = _head_and_batches(name)
    want, gradients = _of_whole_batch(name)
    loss_of = whole_batch_loss_of(head)
    loss = loss_of.loss(_rows_of(head, batch, loss_of), loss_of.shared(head))
    loss.backward()
    assert loss.shape == ()
    assert abs(loss.item() - want) < TOLERANCE * want
    assert relative_error(_gradients(head), gradients) < TOLERANCE


@pytest.mark.parametrize("name", HEADS)
def test_two_passes_over_micro_batches_give_the_gradient_of_the_whole_batch(name):
    head, batches, _ = _head_and_batches(name)
    want, gradients = _of_whole_batch(name)
    loss = _of_micro_batches(head, batches)
    assert all(parameter.grad.any() for parameter in whole_batch_loss_of(head).shared(head))
    got = _gradients(head)
    assert abs(loss - want) < TOLERANCE * want
    # Siglip2 interpolates its positions in float32.
    tolerance = 1e-6 if name == "Siglip2Model" else TOLERANCE
    assert relative_error(got, gradients) < tolerance
    # Each parameter, but those whose gradient is rounding.
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        error = float((got.get(parameter, torch.zeros(())) - gradient).norm())
        assert error < tolerance * max(float(gradient.norm()), 1e-4 * largest), parameter

    mean = _mean_of_losses(head, batches)
    assert abs(mean - want) > 1e-3 * want
    is_off = relative_error(_gradients(head), gradients) > 1e-3
    assert is_off == (name not in MEAN_GRADIENTS)


def test_the_classes_of_the_table_are_still_there():
    for name in HEADS:
        assert issubclass(getattr(transformers, name), PreTrainedModel), name


def test_subclasses_and_what_fully_shard_makes_of_a_class_are_found_and_others_are_not():
    head = copy.copy(_built("CLIPModel")[0])
    want = whole_batch_loss_of(head)
    head.__class__ = type("FSDPMine", (type("Mine", (transformers.CLIPModel,), {}),), {})
    assert whole_batch_loss_of(head) is want
    assert whole_batch_loss_of(nn.Linear(2, 2)) is None


# ---- Cases within a head ----


def test_a_temperature_that_a_forward_is_given_is_that_of_its_videos():
    head, batches, batch = _head_and_batches("VideoPrismClipModel")
    without, _ = _of_whole_batch("VideoPrismClipModel")
    given = {"temperature": 0.05}
    want = head(**batch, **given).loss
    want.backward()
    gradients = _gradients(head)
    loss = _of_micro_batches(head, [part | given for part in batches])
    assert abs(loss - want.item()) < TOLERANCE * want.item()
    assert relative_error(_gradients(head), gradients) < TOLERANCE
    assert abs(loss - without) > 1e-4 * without


def test_sounds_and_videos_without_texts_have_one_similarity():
    head, batches, batch = _head_and_batches("PeAudioVideoModel")
    with_texts, _ = _of_whole_batch("PeAudioVideoModel")
    *batches, batch = [{n: v for n, v in part.items() if n != "input_ids"} for part in [*batches, batch]]
    want = head(**batch).loss
    want.backward()
    gradients = _gradients(head)
    loss = _of_micro_batches(head, batches)
    assert abs(loss - want.item()) < TOLERANCE * want.item() < TOLERANCE * with_texts
    assert relative_error(_gradients(head), gradients) < TOLERANCE


def test_a_segmenting_groupvit_has_the_same_loss():
    head, _, batch = _head_and_batches("GroupViTModel")
    loss_of = whole_batch_loss_of(head)
    outputs = head(**batch, output_segmentation=True)
    assert outputs.segmentation_logits is not None
    loss = loss_of.loss(loss_of.rows(head, batch, outputs), loss_of.shared(head))
    assert abs(loss.item() - _of_whole_batch("GroupViTModel")[0]) < TOLERANCE


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "XCLIPModel"])
def test_a_frozen_temperature_gets_no_gradient(name):
    head, batches, _ = _head_and_batches(name)
    want, gradients = _of_whole_batch(name)
    head.logit_scale.requires_grad_(False)
    try:
        assert abs(_of_micro_batches(head, batches) - want) < TOLERANCE * want
        assert head.logit_scale.grad is None
    finally:
        head.logit_scale.requires_grad_(True)
    assert relative_error(_gradients(head), {n: g for n, g in gradients.items() if n != "logit_scale"}) < TOLERANCE


def test_a_prompt_with_dropout_has_no_loss_of_the_whole_batch():
    head = _built("XCLIPModel")[0]
    assert whole_batch_loss_of(head) is not None
    for name in ("prompt_attention_dropout", "prompt_projection_dropout"):
        setattr(head.config, name, 0.1)
        assert whole_batch_loss_of(head) is None
        setattr(head.config, name, 0.0)


def test_prompts_are_watched_within_the_context_only():
    head, batches, _ = _head_and_batches("XCLIPModel")
    loss_of = whole_batch_loss_of(head)
    num_hooks = len(head.prompts_generator._forward_pre_hooks)
    with pytest.raises(AttributeError), loss_of.watching(head):
        head()
    _rows_of(head, batches[0], loss_of)
    assert len(head.prompts_generator._forward_pre_hooks) == num_hooks
    with pytest.raises(TargetCountError, match="was not watched"):
        loss_of.rows(head, batches[0], head(**batches[0]))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "XCLIPModel", "VideoPrismClipModel", "PeVideoModel"])
def test_rows_in_half_precision_are_compared_in_float32(name):
    head, _, batch = _head_and_batches(name)
    loss_of = whole_batch_loss_of(head)
    with torch.no_grad():
        rows, shared = _rows_of(head, batch, loss_of), loss_of.shared(head)
        loss = loss_of.loss(tuple(part.bfloat16() for part in rows), tuple(part.bfloat16() for part in shared))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - _of_whole_batch(name)[0]) < 0.02 * loss.item()


# ---- Rows that are no pairs ----


@pytest.mark.parametrize("name", ["CLIPModel", "OwlViTModel", "SiglipModel", "XCLIPModel", "PeVideoModel"])
def test_two_texts_for_an_image_are_an_error(name):
    head, _, batch = _head_and_batches(name)
    loss_of = whole_batch_loss_of(head)
    batch = {name: _twice(value) if name in ("input_ids", "attention_mask") else value for name, value in batch.items()}
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        head(**batch)  # the head's own loss
    with pytest.raises(TargetCountError, match="compares pairs, but"):
        _rows_of(head, batch | {"return_loss": False}, loss_of)


def _twice(value):
    return value.repeat_interleave(2, dim=0)


@pytest.mark.parametrize("name", ["CLIPModel", "PeVideoModel", "GLPNForDepthEstimation"])
def test_outputs_as_a_tuple_are_an_error(name):
    head, batches, _ = _head_and_batches(name)
    with pytest.raises(TargetCountError, match="return_dict=True"):
        _rows_of(head, batches[0] | {"return_dict": False}, whole_batch_loss_of(head))
