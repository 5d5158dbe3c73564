"""Trainers and loops whose loss is made of shares: contrastive, of several means, with a router loss, of the user's."""

import torch
import transformers as hf
from torch import nn
from transformers import TrainingArguments

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin, GradUtilsTrainer
from tests.harness.head_rows import collate
from tests.harness.shared_heads import LOSS_OF_PAIRS, collate_pairs
from tests.harness.trainer_cases import ONE_STEP, reset_accelerate

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = _SIZES | {"vocab_size": 48, "max_position_embeddings": 8, "attention_dropout": 0.1}
_TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_VISION = _SIZES | {"image_size": 8, "patch_size": 4, "attention_dropout": 0.1}
LENGTH, NUM_ROWS = 8, 16


# ---- Models ----


def make_clip():
    config = hf.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8, logit_scale_init_value=1.0)
    return _made(hf.CLIPModel, config)


def make_siglip():
    model = _made(hf.SiglipModel, hf.SiglipConfig(text_config=_TEXT, vision_config=_VISION))
    nn.init.constant_(model.logit_bias, -1.0)
    return model


def make_bert():
    return _made(hf.BertForPreTraining, hf.BertConfig(**_SIZES, vocab_size=48, max_position_embeddings=LENGTH))


def make_experts():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "num_key_value_heads": 2}
    return _made(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**_SIZES, **experts, **options, vocab_size=48))


def _made(kind, config):
    torch.manual_seed(11)
    return kind(config)


# ---- Rows ----


def pairs(num_rows=NUM_ROWS):
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "input_ids": torch.cat([torch.randint(2, 48, (LENGTH - 1,), generator=generator), torch.ones(1).long()]),
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
        }
        for _ in range(num_rows)
    ]


def sentences(num_rows=NUM_ROWS):
    """As many masked words as the row's number, from one on; every third row says nothing of the next sentence."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(num_rows):
        words = torch.randint(2, 48, (LENGTH,), generator=generator)
        labels = words.where(torch.arange(LENGTH) <= index % 5, -100)
        following = torch.tensor(-100 if index % 3 == 2 else index % 2)
        rows.append({"input_ids": words, "labels": labels, "next_sentence_label": following})
    return rows


def texts(num_rows=NUM_ROWS):
    """Words of a narrow range each, which go to other experts."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(num_rows):
        first = 2 + 5 * (index % 8)
        words = torch.randint(first, first + 5, (LENGTH,), generator=generator)
        labels = words.where(torch.arange(LENGTH) > index % 4, -100)
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


# ---- Losses of the user's own ----


def terms_of(model, batch):
    """(loss, number of targets) of masked words and of next sentences."""
    outputs = model(input_ids=batch["input_ids"])
    found = []
    for logits, labels in (
        (outputs.prediction_logits, batch["labels"]),
        (outputs.seq_relationship_logits, batch["next_sentence_label"]),
    ):
        total = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        count = (labels != -100).sum()
        found.append((total / count.clamp(min=1), count))
    return found


class Terms:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return terms_of(model, inputs)


# ---- Trainers and loops ----

HEADS = {
    "clip": (make_clip, pairs, collate_pairs),
    "siglip": (make_siglip, pairs, collate_pairs),
    "bert": (make_bert, sentences, collate),
    "experts": (make_experts, texts, collate),
}


def make_trainer(head, kind=GradUtilsTrainer, accumulation=2, *, model=None, arguments=None, **options):
    reset_accelerate()
    make, make_rows, collate = HEADS[head]
    settings = ONE_STEP | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
        "learning_rate": 0.01,
        "remove_unused_columns": False,
    }
    return kind(
        model=make() if model is None else model,
        args=TrainingArguments(**settings | (arguments or {})),
        train_dataset=make_rows(),
        data_collator=collate,
        **options,
    )


EXACT = GradUtilsPlugin(aux="exact")
UserTerms = type("UserTerms", (Terms, GradUtilsTrainer), {})
RIGHT = {
    "clip": lambda **options: make_trainer("clip", **options),
    "siglip": lambda **options: make_trainer("siglip", **options),
    "bert": lambda **options: make_trainer("bert", **options),
    "experts": lambda **options: make_trainer("experts", grad_plugin=EXACT, **options),
    "terms": lambda **options: make_trainer("bert", UserTerms, **options),
    "whole batch": lambda **options: make_trainer("clip", whole_batch_loss=LOSS_OF_PAIRS, **options),
}
"""Name → a Trainer of ours that is exact."""


def make_loop(make_model, kind=GradUtilsAccelerator):
    """A prepared Accelerator and model."""
    reset_accelerate()
    accelerator = kind(cpu=True, gradient_accumulation_steps=2)
    made = make_model()
    model, _ = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    return accelerator, model


LOOPS = {"terms": (make_bert, sentences, terms_of), "whole batch": (make_clip, pairs, LOSS_OF_PAIRS)}
"""Name → model, rows and loss of a loop."""
