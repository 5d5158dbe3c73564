"""Tiny heads for the exactness matrix: how to build each, rows for it, and what its loss is a mean over."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.harness import head_configs as cfg
from tests.harness import head_rows as data
from tests.harness.head_rows import VOCAB, Row, collate


@dataclass(frozen=True)
class Head:
    """One head. Its loss is a mean over ``targets``, and each target's loss is that of its row alone."""

    build: Callable[[], nn.Module]
    """A model in float32 without dropout, the same every time. Seeds the global generator."""
    rows: Callable[[int, int], list[Row]]
    """(number of rows, seed) → rows. Where a row has several targets, their number is ragged, from 1 up."""
    layers: tuple[str, ...]
    """Class names of the repeated layers, for FSDP."""
    targets: Callable[[Row], int]
    """Batch → what its loss is a mean over, counted without the package."""
    stock_is_exact: bool = False
    """Whether ``transformers.Trainer`` accumulates exactly on one process, over micro-batches of equally many rows."""
    collate: Callable[[list[Row]], Row] = collate


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(11)
        return make()

    return build


def _model(model_class: Any, options: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    # Copied each time: models and configurations write into what they get.
    return _seeded(lambda: model_class(model_class.config_class(**copy.deepcopy(options | more))))


def without_batch_statistics(model: nn.Module) -> nn.Module:
    """Batch normalisation couples the rows in training mode, so that no accumulation is exact: keep it in eval."""

    def stay_in_eval(module: nn.Module, _: Any) -> None:
        module.eval()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(stay_in_eval)
    return model


class PlainLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.gelu(self.linear(hidden))


class PlainModel(nn.Module):
    """No configuration, no ``**kwargs``: what a user writes by hand."""

    def __init__(self, *, shifts: bool) -> None:
        super().__init__()
        self.shifts = shifts
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.Sequential(PlainLayer(), PlainLayer())
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.layers(self.embedding(input_ids)))
        predicting, labels = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        return {"loss": nn.functional.cross_entropy(predicting.flatten(0, 1), labels.flatten()), "logits": logits}


# ---- The registry ----


def _shifting(build: Callable[[], nn.Module], *layers: str, **more: Any) -> Head:
    return Head(build, data.shifting_rows, layers, data.count_shifted, **more)


def _aligned(build: Callable[[], nn.Module], *layers: str) -> Head:
    return Head(build, data.rows_with_words, layers, data.count_labels)


def _by_row(build: Callable[[], nn.Module], layer: str, rows: Callable[[int, int], list[Row]], **more: Any) -> Head:
    return Head(build, rows, (layer,), data.count_rows, **more)


HEADS: dict[str, Head] = {
    # Causal: they shift, and stock Trainer knows of most.
    "llama causal": _shifting(_model(hf.LlamaForCausalLM, cfg.LLAMA), "LlamaDecoderLayer", stock_is_exact=True),
    "qwen3 causal": _shifting(
        _model(hf.Qwen3ForCausalLM, cfg.LLAMA, head_dim=8), "Qwen3DecoderLayer", stock_is_exact=True
    ),
    "gemma3 causal": _shifting(
        _model(hf.Gemma3ForCausalLM, cfg.LLAMA, head_dim=8, query_pre_attn_scalar=8),
        "Gemma3DecoderLayer",
        stock_is_exact=True,
    ),
    "mixtral moe": _shifting(_model(hf.MixtralForCausalLM, cfg.EXPERTS), "MixtralDecoderLayer", stock_is_exact=True),
    # Not additive: the auxiliary loss multiplies two means over the batch.
    "qwen3 moe aux": _shifting(
        _model(hf.Qwen3MoeForCausalLM, cfg.QWEN3_MOE, output_router_logits=True, router_aux_loss_coef=0.5),
        "Qwen3MoeDecoderLayer",
    ),
    # Shifts, but stock Trainer counts the first label.
    "gpt2 causal": _shifting(_model(hf.GPT2LMHeadModel, cfg.GPT2), "GPT2Block"),
    # Says that it takes no count.
    "qwen2.5-vl causal": _shifting(
        _model(hf.Qwen2_5_VLForConditionalGeneration, cfg.QWEN_VL), "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"
    ),
    "qwen2.5-vl images": Head(
        _model(hf.Qwen2_5_VLForConditionalGeneration, cfg.QWEN_VL),
        data.each(data.illustrated_text),
        ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
        data.count_shifted,
        collate=data.collate_illustrated,
    ),
    # Tokens, not shifted; the first passes for a head that shifts.
    "bart causal": _aligned(
        _model(hf.BartForCausalLM, cfg.BART, is_decoder=True, is_encoder_decoder=False), "BartDecoderLayer"
    ),
    "bart seq2seq": _aligned(_model(hf.BartForConditionalGeneration, cfg.BART), "BartEncoderLayer", "BartDecoderLayer"),
    "t5 seq2seq": _aligned(_model(hf.T5ForConditionalGeneration, cfg.T5), "T5Block"),
    "whisper seq2seq": Head(
        _model(hf.WhisperForConditionalGeneration, cfg.WHISPER),
        data.each(data.spectrogram_with_words),
        ("WhisperEncoderLayer", "WhisperDecoderLayer"),
        data.count_labels,
    ),
    "bert masked": _aligned(_model(hf.BertForMaskedLM, cfg.BERT), "BertLayer"),
    "bert tokens": Head(
        _model(hf.BertForTokenClassification, cfg.BERT),
        data.each(data.text_with_classes),
        ("BertLayer",),
        data.count_labels,
    ),
    "electra discriminator": Head(
        _model(hf.ElectraForPreTraining, cfg.BERT, embedding_size=16),
        data.each(data.replaced_words),
        ("ElectraLayer",),
        lambda batch: int(batch["attention_mask"].sum()),
    ),
    # Rows.
    "llama classes": _by_row(
        _model(hf.LlamaForSequenceClassification, cfg.LLAMA), "LlamaDecoderLayer", data.rows_with_class(data.text)
    ),
    "llama regression": _by_row(
        _model(hf.LlamaForSequenceClassification, cfg.LLAMA, num_labels=1), "LlamaDecoderLayer", data.rows_with_number
    ),
    "bert classes": _by_row(
        _model(hf.BertForSequenceClassification, cfg.BERT), "BertLayer", data.rows_with_class(data.text)
    ),
    "bert regression": _by_row(
        _model(hf.BertForSequenceClassification, cfg.BERT, num_labels=1), "BertLayer", data.rows_with_number
    ),
    "bert multi-label": _by_row(
        _model(hf.BertForSequenceClassification, cfg.BERT), "BertLayer", data.each(data.text_with_flags)
    ),
    # Gets no count, so that its mean of means is right as long as micro-batches have equally many rows.
    "bert answers": _by_row(
        _model(hf.BertForQuestionAnswering, cfg.BERT, num_labels=2),
        "BertLayer",
        data.each(data.text_with_answer),
        stock_is_exact=True,
    ),
    "bert choices": _by_row(
        _model(hf.BertForMultipleChoice, cfg.BERT),
        "BertLayer",
        data.rows_with_class(lambda g: data.text(g, data.NUM_CLASSES)),
    ),
    "bert next sentence": _by_row(
        _model(hf.BertForNextSentencePrediction, cfg.BERT), "BertLayer", data.rows_with_class(data.text, num_classes=2)
    ),
    "vit images": _by_row(
        _model(hf.ViTForImageClassification, cfg.VIT), "ViTLayer", data.rows_with_class(data.image), stock_is_exact=True
    ),
    "wav2vec2 audio classes": _by_row(
        _model(hf.Wav2Vec2ForSequenceClassification, cfg.WAV2VEC2),
        "Wav2Vec2EncoderLayer",
        data.rows_with_class(data.sound),
    ),
    "wav2vec2 ctc mean": _by_row(
        _model(hf.Wav2Vec2ForCTC, cfg.WAV2VEC2, ctc_loss_reduction="mean"), "Wav2Vec2EncoderLayer", data.rows_of_speech
    ),
    # A sum: the losses of a batch's parts just add up, which is what stock Trainer does to most heads.
    "wav2vec2 ctc sum": _by_row(
        _model(hf.Wav2Vec2ForCTC, cfg.WAV2VEC2, ctc_loss_reduction="sum"),
        "Wav2Vec2EncoderLayer",
        data.rows_of_speech,
        stock_is_exact=True,
    ),
    # Pixels and patches.
    "segformer pixels": Head(
        _model(hf.SegformerForSemanticSegmentation, cfg.SEGFORMER),
        data.rows_with_pixels,
        ("SegformerLayer",),
        data.count_pixels,
    ),
    # Its auxiliary head adds a second mean over the same pixels.
    "beit pixels": Head(
        _model(hf.BeitForSemanticSegmentation, cfg.BEIT), data.rows_with_pixels, ("BeitLayer",), data.count_pixels
    ),
    "vit masked patches": Head(
        _model(hf.ViTForMaskedImageModeling, cfg.VIT),
        data.each(data.masked_image),
        ("ViTLayer",),
        lambda batch: int(batch["bool_masked_pos"].sum()),
    ),
    # By hand.
    "plain module": Head(
        _seeded(lambda: PlainModel(shifts=False)), data.each(data.plain_text), ("PlainLayer",), data.count_labels
    ),
    "plain shifting module": Head(
        _seeded(lambda: PlainModel(shifts=True)),
        data.each(lambda g: data.plain_text(g, least=2)),
        ("PlainLayer",),
        data.count_shifted,
    ),
}
