"""Tiny heads of which a micro-batch has a share: losses of the whole batch, and sums of several means."""

from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from hf_gradutils import WholeBatchLoss
from tests.harness import head_configs as cfg
from tests.harness import head_rows as data
from tests.harness.head_rows import LENGTH, VOCAB, Row, collate, count_rows
from tests.harness.heads import Head, _model, _seeded

_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.0,
}
_TEXT = _TOWER | {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "bos_token_id": data.BOS,
    "eos_token_id": data.EOS,
    "pad_token_id": data.PAD,
}
_IMAGE = _TOWER | {"image_size": data.IMAGE_SIZE, "patch_size": data.PATCH_SIZE}
PAIRS = {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 8}


def image_with_text(generator: Generator) -> Row:
    row = data.text(generator) | data.image(generator)
    row["input_ids"][-1] = data.EOS
    return row


def collate_pairs(rows: list[Row]) -> Row:
    """As transformers' example for CLIP does: without this word the forward has no loss."""
    paired: Any = collate(rows) | {"return_loss": True}
    return paired


def embed_pairs(model: nn.Module, batch: Row) -> tuple[Tensor, Tensor]:
    outputs = model(**batch)
    return outputs.text_embeds, outputs.image_embeds


def contrast(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss."""
    similar, own = one @ other.T * scale.exp(), torch.arange(len(one))
    return (cross_entropy(similar, own) + cross_entropy(similar.T, own)) / 2


LOSS_OF_PAIRS = WholeBatchLoss(embed_pairs, contrast, lambda model: (model.logit_scale,))


def text_with_words_and_order(generator: Generator) -> Row:
    """The sentences' order is not told of every fourth row."""
    row = data._text_with_words(generator)
    order = torch.randint(4, (), generator=generator)
    return row | {"next_sentence_label": torch.where(order < 3, order % 2, -100)}


def image_with_boxes(generator: Generator) -> Row:
    """None to five boxes."""
    number = int(torch.randint(6, (), generator=generator))
    low = 0.2 + 0.5 * torch.rand(number, 2, generator=generator)
    boxes = torch.cat((low, 0.05 + 0.2 * torch.rand(number, 2, generator=generator)), 1)
    classes = torch.randint(data.NUM_CLASSES, (number,), generator=generator)
    labels: Any = {"class_labels": classes, "boxes": boxes}
    return data.image(generator) | {"labels": labels}


def collate_boxes(rows: list[Row]) -> Row:
    labels: Any = [row["labels"] for row in rows]
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def _pairs(model_class: Any, *layers: str, **more: Any) -> Head:
    build = _model(model_class, PAIRS, **more)
    return Head(build, data.each(image_with_text), layers, count_rows, collate=collate_pairs)


SHARED_HEADS = {
    "clip pairs": _pairs(hf.CLIPModel, "CLIPEncoderLayer"),
    "siglip pairs": _pairs(hf.SiglipModel, "SiglipEncoderLayer"),
    "bert pretraining": Head(
        _seeded(lambda: hf.BertForPreTraining(hf.BertConfig(**cfg.BERT))),
        data.each(text_with_words_and_order),
        ("BertLayer",),
        count_rows,
    ),
}
