"""Tiny heads for the exactness matrix: how to build each, rows for it, and what its loss is a mean over."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor, nn

Row = dict[str, Tensor]

LENGTH = 12
VOCAB = 48
NUM_CLASSES = 3
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = range(8)
IMAGE_SIZE, PATCH_SIZE = 16, 4
NUM_MELS = 8


def collate(rows: list[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


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


# ---- Rows ----


def _each(make_row: Callable[[Generator], Row]) -> Callable[[int, int], list[Row]]:
    def rows(num_samples: int, seed: int) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)
        return [make_row(generator) for _ in range(num_samples)]

    return rows


def _words(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)


def _classes(generator: Generator, *shape: int, num_classes: int = NUM_CLASSES) -> Tensor:
    return torch.randint(num_classes, shape, generator=generator)


def _keep_some(generator: Generator, values: Tensor, rest: Any = -100, least: int = 1) -> Tensor:
    """Overwrite the tail. The square makes few targets common and many rare, so that parts of a batch differ."""
    most = values.numel() - least + 1
    kept = least + int(most * torch.rand((), generator=generator).square())
    values.view(-1)[kept:] = rest
    return values


def _text(generator: Generator, *shape: int) -> Row:
    shape = (*shape, LENGTH)
    return {"input_ids": _words(generator, *shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}


def _text_with_words(generator: Generator, least: int = 1) -> Row:
    """The first label is always there: a head that shifts has no use for it, so that counting it shows."""
    return _text(generator) | {"labels": _keep_some(generator, _words(generator, LENGTH), least=least)}


def _plain_text(generator: Generator, least: int = 1) -> Row:
    row = _text_with_words(generator, least)
    return {name: row[name] for name in ("input_ids", "labels")}


def _illustrated_text(generator: Generator) -> Row:
    """An image of 4 to 24 patches; each 2 × 2 of them takes the place of one word."""
    row = _text_with_words(generator, least=2)
    height, width = (2 * int(torch.randint(1, most + 1, (), generator=generator)) for most in (3, 2))
    is_image = torch.zeros(LENGTH, dtype=torch.int64)
    is_image[1 : 1 + height * width // 4] = 1
    row["input_ids"][is_image == 1] = IMAGE
    row["input_ids"][0] = VISION_START
    return row | {
        "mm_token_type_ids": is_image,
        "pixel_values": torch.randn(height * width, 3 * 2 * 2, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def _collate_illustrated(rows: list[Row]) -> Row:
    """The patches of all images in one list, as the model's processor has them."""
    concatenated = ("pixel_values", "image_grid_thw")
    batch = collate([{name: value for name, value in row.items() if name not in concatenated} for row in rows])
    return batch | {name: torch.cat([row[name] for row in rows]) for name in concatenated}


def _text_with_classes(generator: Generator) -> Row:
    return _text(generator) | {"labels": _keep_some(generator, _classes(generator, LENGTH))}


def _text_with_answer(generator: Generator) -> Row:
    ends = {f"{end}_positions": _classes(generator, num_classes=LENGTH) for end in ("start", "end")}
    return _text(generator) | ends


def _text_with_flags(generator: Generator) -> Row:
    return _text(generator) | {"labels": _classes(generator, NUM_CLASSES, num_classes=2).float()}


def _replaced_words(generator: Generator) -> Row:
    row = _text(generator) | {"labels": _classes(generator, LENGTH, num_classes=2)}
    return row | {"attention_mask": _keep_some(generator, row["attention_mask"], rest=0)}


def _image(generator: Generator) -> Row:
    contrast = 0.2 + 2 * torch.rand((), generator=generator)
    return {"pixel_values": contrast * torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}


def _masked_image(generator: Generator) -> Row:
    masked = torch.ones((IMAGE_SIZE // PATCH_SIZE) ** 2, dtype=torch.bool)
    return _image(generator) | {"bool_masked_pos": _keep_some(generator, masked, rest=False)}


def _image_with_pixels(generator: Generator) -> Row:
    pixels = _classes(generator, IMAGE_SIZE, IMAGE_SIZE)
    return _image(generator) | {"labels": _keep_some(generator, pixels, rest=255)}


def _sound(generator: Generator) -> Row:
    return {"input_values": torch.randn(55, generator=generator)}  # 13 frames: six labels and blanks between them


def _spectrogram_with_words(generator: Generator) -> Row:
    labels = _keep_some(generator, _words(generator, LENGTH))
    return {"input_features": torch.randn(NUM_MELS, 2 * LENGTH, generator=generator), "labels": labels}


def _rows_with_class(make_row: Callable[[Generator], Row], num_classes: int = NUM_CLASSES) -> Any:
    return _each(lambda g: make_row(g) | {"labels": _classes(g, num_classes=num_classes)})


_rows_with_words = _each(_text_with_words)
_shifting_rows = _each(lambda g: _text_with_words(g, least=2))
_rows_with_number = _each(lambda g: _text(g) | {"labels": torch.randn((), generator=g)})
_rows_with_pixels = _each(_image_with_pixels)
_rows_of_speech = _each(lambda g: _sound(g) | {"labels": _keep_some(g, _words(g, 6))})


# ---- What a loss is a mean over ----


def _count_rows(batch: Row) -> int:
    return len(next(iter(batch.values())))


def _count_labels(batch: Row, ignored: int = -100) -> int:
    return int((batch["labels"] != ignored).sum())


def _count_shifted(batch: Row) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def _count_pixels(batch: Row) -> int:
    return _count_labels(batch, ignored=255)


# ---- Models ----

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_WIDE = {"initializer_range": 0.2}  # ten times the usual spread: the losses of different rows differ clearly
_SIZES = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
_SMALL = _IDS | _WIDE | _SIZES | {"vocab_size": VOCAB, "num_labels": NUM_CLASSES}


def _none_of(*dropouts: str) -> dict[str, float]:
    return dict.fromkeys(dropouts, 0.0)


_LLAMA = _SMALL | {"num_key_value_heads": 2}
# The default implementation of experts has no float64 kernel.
_EXPERTS = _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_QWEN3_MOE = _EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16}
_GPT2 = _SMALL | _none_of("resid_pdrop", "embd_pdrop", "attn_pdrop")
_BERT = _SMALL | _none_of("hidden_dropout_prob", "attention_probs_dropout_prob")
_VIT = _BERT | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "encoder_stride": PATCH_SIZE}
_T5 = _SMALL | {"num_decoder_layers": 2, "d_kv": 8, "d_ff": 32, "dropout_rate": 0.0, "decoder_start_token_id": BOS}
_BART = (
    _IDS
    | {"vocab_size": VOCAB, "d_model": 16, "init_std": 0.2, "dropout": 0.0, "decoder_start_token_id": BOS}
    | dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
)
_WHISPER = _BART | {"num_mel_bins": NUM_MELS, "max_source_positions": LENGTH, "begin_suppress_tokens": None}
_QWEN_VISION = (
    _WIDE
    | {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    | {"patch_size": 2, "temporal_patch_size": 1, "window_size": 8, "fullatt_block_indexes": [1]}
)
_QWEN_VL = {
    "text_config": _LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "vision_config": _QWEN_VISION,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_WAV2VEC2 = (
    _SMALL
    | {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "classifier_proj_size": 16}
    | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    | _none_of("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout", "layerdrop")
    | {"apply_spec_augment": False}  # masks at random
)
_SEGFORMER = (
    _BERT
    | {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
    }
    | {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
    | _none_of("classifier_dropout_prob", "drop_path_rate")
)
_BEIT = (
    _VIT
    | {"num_hidden_layers": 3, "out_indices": [0, 1, 2, 3]}  # it wants four feature maps
    | {"pool_scales": [1, 2], "auxiliary_channels": 16, "drop_path_rate": 0.0, "initializer_range": 0.1}
)


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
    return Head(build, _shifting_rows, layers, _count_shifted, **more)


def _aligned(build: Callable[[], nn.Module], *layers: str) -> Head:
    return Head(build, _rows_with_words, layers, _count_labels)


def _by_row(build: Callable[[], nn.Module], layer: str, rows: Callable[[int, int], list[Row]], **more: Any) -> Head:
    return Head(build, rows, (layer,), _count_rows, **more)


HEADS: dict[str, Head] = {
    # Causal: they shift, and stock Trainer knows of most.
    "llama causal": _shifting(_model(hf.LlamaForCausalLM, _LLAMA), "LlamaDecoderLayer", stock_is_exact=True),
    "qwen3 causal": _shifting(
        _model(hf.Qwen3ForCausalLM, _LLAMA, head_dim=8), "Qwen3DecoderLayer", stock_is_exact=True
    ),
    "gemma3 causal": _shifting(
        _model(hf.Gemma3ForCausalLM, _LLAMA, head_dim=8, query_pre_attn_scalar=8),
        "Gemma3DecoderLayer",
        stock_is_exact=True,
    ),
    "mixtral moe": _shifting(_model(hf.MixtralForCausalLM, _EXPERTS), "MixtralDecoderLayer", stock_is_exact=True),
    # Not additive: the auxiliary loss multiplies two means over the batch.
    "qwen3 moe aux": _shifting(
        _model(hf.Qwen3MoeForCausalLM, _QWEN3_MOE, output_router_logits=True, router_aux_loss_coef=0.5),
        "Qwen3MoeDecoderLayer",
    ),
    # Shifts, but stock Trainer counts the first label.
    "gpt2 causal": _shifting(_model(hf.GPT2LMHeadModel, _GPT2), "GPT2Block"),
    # Says that it takes no count.
    "qwen2.5-vl causal": _shifting(
        _model(hf.Qwen2_5_VLForConditionalGeneration, _QWEN_VL), "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"
    ),
    "qwen2.5-vl images": Head(
        _model(hf.Qwen2_5_VLForConditionalGeneration, _QWEN_VL),
        _each(_illustrated_text),
        ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
        _count_shifted,
        collate=_collate_illustrated,
    ),
    # Tokens, not shifted; the first passes for a head that shifts.
    "bart causal": _aligned(
        _model(hf.BartForCausalLM, _BART, is_decoder=True, is_encoder_decoder=False), "BartDecoderLayer"
    ),
    "bart seq2seq": _aligned(_model(hf.BartForConditionalGeneration, _BART), "BartEncoderLayer", "BartDecoderLayer"),
    "t5 seq2seq": _aligned(_model(hf.T5ForConditionalGeneration, _T5), "T5Block"),
    "whisper seq2seq": Head(
        _model(hf.WhisperForConditionalGeneration, _WHISPER),
        _each(_spectrogram_with_words),
        ("WhisperEncoderLayer", "WhisperDecoderLayer"),
        _count_labels,
    ),
    "bert masked": _aligned(_model(hf.BertForMaskedLM, _BERT), "BertLayer"),
    "bert tokens": Head(
        _model(hf.BertForTokenClassification, _BERT), _each(_text_with_classes), ("BertLayer",), _count_labels
    ),
    "electra discriminator": Head(
        _model(hf.ElectraForPreTraining, _BERT, embedding_size=16),
        _each(_replaced_words),
        ("ElectraLayer",),
        lambda batch: int(batch["attention_mask"].sum()),
    ),
    # Rows.
    "llama classes": _by_row(
        _model(hf.LlamaForSequenceClassification, _LLAMA), "LlamaDecoderLayer", _rows_with_class(_text)
    ),
    "llama regression": _by_row(
        _model(hf.LlamaForSequenceClassification, _LLAMA, num_labels=1), "LlamaDecoderLayer", _rows_with_number
    ),
    "bert classes": _by_row(_model(hf.BertForSequenceClassification, _BERT), "BertLayer", _rows_with_class(_text)),
    "bert regression": _by_row(
        _model(hf.BertForSequenceClassification, _BERT, num_labels=1), "BertLayer", _rows_with_number
    ),
    "bert multi-label": _by_row(_model(hf.BertForSequenceClassification, _BERT), "BertLayer", _each(_text_with_flags)),
    # Gets no count, so that its mean of means is right as long as micro-batches have equally many rows.
    "bert answers": _by_row(
        _model(hf.BertForQuestionAnswering, _BERT, num_labels=2),
        "BertLayer",
        _each(_text_with_answer),
        stock_is_exact=True,
    ),
    "bert choices": _by_row(
        _model(hf.BertForMultipleChoice, _BERT), "BertLayer", _rows_with_class(lambda g: _text(g, NUM_CLASSES))
    ),
    "bert next sentence": _by_row(
        _model(hf.BertForNextSentencePrediction, _BERT), "BertLayer", _rows_with_class(_text, num_classes=2)
    ),
    "vit images": _by_row(
        _model(hf.ViTForImageClassification, _VIT), "ViTLayer", _rows_with_class(_image), stock_is_exact=True
    ),
    "wav2vec2 audio classes": _by_row(
        _model(hf.Wav2Vec2ForSequenceClassification, _WAV2VEC2), "Wav2Vec2EncoderLayer", _rows_with_class(_sound)
    ),
    "wav2vec2 ctc mean": _by_row(
        _model(hf.Wav2Vec2ForCTC, _WAV2VEC2, ctc_loss_reduction="mean"), "Wav2Vec2EncoderLayer", _rows_of_speech
    ),
    # A sum: the losses of a batch's parts just add up, which is what stock Trainer does to most heads.
    "wav2vec2 ctc sum": _by_row(
        _model(hf.Wav2Vec2ForCTC, _WAV2VEC2, ctc_loss_reduction="sum"),
        "Wav2Vec2EncoderLayer",
        _rows_of_speech,
        stock_is_exact=True,
    ),
    # Pixels and patches.
    "segformer pixels": Head(
        _model(hf.SegformerForSemanticSegmentation, _SEGFORMER),
        _rows_with_pixels,
        ("SegformerLayer",),
        _count_pixels,
    ),
    # Its auxiliary head adds a second mean over the same pixels.
    "beit pixels": Head(
        _model(hf.BeitForSemanticSegmentation, _BEIT),
        _rows_with_pixels,
        ("BeitLayer",),
        _count_pixels,
    ),
    "vit masked patches": Head(
        _model(hf.ViTForMaskedImageModeling, _VIT),
        _each(_masked_image),
        ("ViTLayer",),
        lambda batch: int(batch["bool_masked_pos"].sum()),
    ),
    # By hand.
    "plain module": Head(_seeded(lambda: PlainModel(shifts=False)), _each(_plain_text), ("PlainLayer",), _count_labels),
    "plain shifting module": Head(
        _seeded(lambda: PlainModel(shifts=True)),
        _each(lambda g: _plain_text(g, least=2)),
        ("PlainLayer",),
        _count_shifted,
    ),
}
