"""Heads that add a contrast, or a score of sums, to sums of their own: two passes against one batch, mostly in float64.

They are in training mode, and draw the same numbers for every row.
"""

import functools
import itertools
import warnings

import pytest
import torch
import transformers
from torch import nn

from benchmarks.heads.classes import build
from benchmarks.heads.configs import tiny_config
from benchmarks.heads.inputs import LENGTH
from benchmarks.heads.measure import DrawsAlike
from benchmarks.heads.rows import collate, find_rows
from hf_gradutils.errors import TargetCountError
from hf_gradutils.targets.contrast_and_means import CONTRAST_AND_MEANS, contrast_and_means_of
from hf_gradutils.upstream.accelerate import without_accelerate_state
from tests.harness.gradients import cast, loss_of_micro_batches, relative_error, whole_gradients

SIZES = 4, 3, 2, 3
"""Rows of the micro-batches."""
EXACT, OFF = 3e-6, 1e-2
"""All of them compute parts of their loss in float32."""
SINGLE = ("OneFormerForUniversalSegmentation",)
"""Heads that fail in float64."""
HEADS = sorted(CONTRAST_AND_MEANS)
SPEECH = [name for name in HEADS if name.startswith("Wav2Vec2")]


@pytest.fixture(autouse=True)
def _drawing_alike():
    with DrawsAlike():
        yield


def _built(name):
    head_class = getattr(transformers, name)
    config = tiny_config(head_class.config_class, **({"num_labels": 3} if "Segmentation" in name else {}))
    if name.startswith("OneFormer"):
        config.is_training, config.text_encoder_n_ctx, config.text_encoder_context_length = True, 0, LENGTH
        config.text_encoder_width = 64  # one attention head for each 64
    if name in SPEECH:
        config.diversity_loss_weight = 10.0  # or the sum of the micro-batches' losses would hardly be off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads this tiny
        head = build(head_class, config)
    if name.startswith("OneFormer"):
        return head, _images_and_texts(head)
    return head, find_rows(head)[0]


def _images_and_texts(head):
    """Texts of as many tokens as the text encoder reads, one for each query."""
    head.config.is_training = head.model.is_training = False
    make_row, _ = find_rows(head)
    head.config.is_training = head.model.is_training = True
    num_words, shape = head.config.text_encoder_vocab_size, (head.config.num_queries, LENGTH)

    def make(generator):
        texts = torch.randint(1, num_words, shape, generator=generator)
        return make_row(generator) | {"text_inputs": texts}

    return make


@functools.cache
def _case(name):
    """(head, whole batch, micro-batches)."""
    head, make_row = _built(name)
    dtype = torch.float32 if name in SINGLE else torch.float64
    head.to(dtype)
    generator = torch.Generator().manual_seed(5)
    rows = [cast(make_row(generator), dtype) for _ in range(sum(SIZES))]
    ends = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]
    return head, collate(rows), [collate(rows[start:end]) for start, end in itertools.pairwise(ends)]


def _seen(head, batch):
    """(rows, the head's own loss) of a batch."""
    loss_of = contrast_and_means_of(head)
    with loss_of.watching(head):
        outputs = head(**batch)
        return loss_of.rows(head, batch, outputs), outputs["loss"].sum()


def _gradients(head, loss):
    head.zero_grad()
    loss.backward()
    return whole_gradients(head)


@pytest.mark.parametrize("name", HEADS)
def test_two_passes_over_micro_batches_give_the_loss_and_the_gradient_of_the_whole_batch(name):
    head, whole, parts = _case(name)
    loss_of = contrast_and_means_of(head)
    with without_accelerate_state():
        loss = head(**whole)["loss"].sum()
    want = _gradients(head, loss)

    rows = [_seen(head, part)[0] for part in parts]
    together = loss_of_micro_batches(loss_of, head, rows)
    assert together.shape == ()
    torch.testing.assert_close(together.double(), loss.detach().double(), rtol=EXACT, atol=0)
    assert relative_error(_gradients(head, together), want) < (10 * EXACT if name in SINGLE else EXACT)

    sizes = [size / sum(SIZES) for size in SIZES]
    weights = [1] * len(SIZES) if name in SPEECH else sizes  # a sum
    mean = sum(weight * _seen(head, part)[1] for weight, part in zip(weights, parts, strict=True))
    assert relative_error(_gradients(head, mean), want) > OFF


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_a_batchs_rows_is_the_heads_own_in_evaluation_mode(name):
    head, whole, _ = _case(name)
    loss_of = contrast_and_means_of(head)
    head.eval()
    try:
        with torch.no_grad():
            rows, loss = _seen(head, whole)
            together = loss_of.loss(rows, loss_of.shared(head))
    finally:
        head.train()
    torch.testing.assert_close(together.double(), loss.double(), rtol=EXACT, atol=0)


def test_texts_without_attacks_are_a_mean_over_words():
    head, whole, _ = _case("RoCBertForPreTraining")
    batch = {name: value for name, value in whole.items() if name != "attack_input_ids"}
    rows, loss = _seen(head, batch)
    assert [part.shape for part in rows] == [(1,), (1,)]
    torch.testing.assert_close(contrast_and_means_of(head).loss(rows, ()).double(), loss, rtol=EXACT, atol=0)


def test_a_oneformer_that_is_not_in_training_has_no_contrast():
    head, *_ = _case("OneFormerForUniversalSegmentation")
    head.config.is_training = False
    try:
        assert contrast_and_means_of(head) is None
    finally:
        head.config.is_training = True


MISSING = {
    "Wav2Vec2ForPreTraining": "sampled_negative_indices",
    "RoCBertForPreTraining": "labels_input_ids",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_batch_that_makes_no_loss_is_an_error(name):
    head, whole, _ = _case(name)
    loss_of = contrast_and_means_of(head)
    batch = {key: value for key, value in whole.items() if key != MISSING[name]}
    with loss_of.watching(head):
        outputs = head(**batch)
        with pytest.raises(TargetCountError, match=f"returned no loss.*{MISSING[name]}"):
            loss_of.rows(head, batch, outputs)


@pytest.mark.parametrize("name", HEADS)
def test_a_forward_is_watched_within_the_context_only(name):
    head, whole, _ = _case(name)
    hooks = [len(module._forward_hooks) for module in head.modules()]
    with torch.no_grad():
        _seen(head, whole)
    assert [len(module._forward_hooks) for module in head.modules()] == hooks


def test_subclasses_are_found_and_other_heads_are_not():
    head, *_ = _case("Wav2Vec2ForPreTraining")
    before = type(head)
    head.__class__ = type("FSDPMine", (type("Mine", (before,), {}),), {})
    try:
        assert contrast_and_means_of(head) is not None
    finally:
        head.__class__ = before
    assert contrast_and_means_of(nn.Linear(2, 2)) is None


def test_batches_whose_rows_name_frames_of_the_batch_are_not_cut():
    cut = {name: contrast_and_means_of(_case(name)[0]).can_be_cut for name in HEADS}
    assert {name for name, can_be_cut in cut.items() if not can_be_cut} == set(SPEECH)
