"""Tiny local models, tokenizers and 16 rows of data for the programs of other frameworks: nothing comes from a hub."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

NUM_ROWS = 16
"""Of every data set: one optimizer step takes all of them, in whatever order."""
BLOCK_SIZE = 32
"""Tokens of a block of the causal LM example, which cuts its text into blocks of equal length."""
SPECIAL = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
METRIC = '''"""A metric that measures nothing: the example scripts load one before they train."""
import datasets
import evaluate


class Nothing(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"nothing": 0.0}
'''


def write_materials(folder: Path) -> None:
    """Write models into ``models/``, data into ``data/`` and what the example scripts look for into ``work/``."""
    _write_models(folder / "models")
    _write_data(folder / "data", random.Random(5))
    for metric in ("accuracy", "rouge", "seqeval", "squad"):
        _write(folder / "work" / metric / f"{metric}.py", METRIC)
    (folder / "work" / "nltk_data" / "tokenizers" / "punkt").mkdir(parents=True)
    (folder / "work" / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)


# ---- Models: without dropout, whose masks depend on how a batch is split ----


def _write_models(folder: Path) -> None:
    torch.manual_seed(11)
    size = {"vocab_size": len(SPECIAL) + 256, "initializer_range": 0.3, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": SPECIAL.index("<|im_end|>")}
    qwen = Qwen3Config(**size, **heads, **ids, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    _save(Qwen3ForCausalLM(qwen), _tokenizer("<|im_end|>", None), folder / "qwen3")

    bert = BertConfig(**size, **heads, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    cls, sep = (SPECIAL.index(name) for name in ("[CLS]", "[SEP]"))
    pair = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    _save(BertForMaskedLM(bert), _tokenizer("[SEP]", pair), folder / "bert")

    t5 = T5Config(
        vocab_size=size["vocab_size"], d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, initializer_factor=0.5,
    )  # fmt: skip
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    _save(T5ForConditionalGeneration(t5), _tokenizer("</s>", end), folder / "t5")


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(eos: str, post_processor: Any) -> PreTrainedTokenizerFast:
    """One token a byte."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=256, pad_token="<pad>", eos_token=eos, unk_token="<unk>",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", additional_special_tokens=SPECIAL[-2:],
    )  # fmt: skip
    made.chat_template = CHAT_TEMPLATE
    return made


# ---- Data: rows of very different lengths ----


def _write_data(folder: Path, rng: random.Random) -> None:
    def words(least: int = 1, most: int = 12) -> str:
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(rng.randint(least, most)))

    def user() -> dict[str, str]:
        return {"role": "user", "content": words()}

    def assistant() -> dict[str, str]:
        return {"role": "assistant", "content": words()}

    rows = range(NUM_ROWS)
    _write_rows(folder / "labels" / "train.json", ({"text": words(), "label": i % 2} for i in rows))
    _write_rows(folder / "classes.json", ({"sentence": words(), "label": "ab"[i % 2]} for i in rows))
    _write_rows(folder / "summaries.json", ({"document": words(), "summary": words(1, 6)} for _ in rows))
    _write_rows(folder / "scores" / "train.json", (_pair(words, i) for i in rows))
    _write_rows(folder / "chats" / "train.jsonl", ({"messages": [user(), assistant()]} for _ in rows))
    pairs = ({"prompt": [user()], "chosen": [assistant()], "rejected": [assistant()]} for _ in rows)
    _write_rows(folder / "preferences" / "train.jsonl", pairs)
    _write(folder / "blocks.txt", "\n".join(_line(rng, 2 * BLOCK_SIZE) for _ in range(NUM_ROWS // 2)))

    def entities() -> dict[str, list[str]]:
        tokens = words().split()
        return {"tokens": tokens, "ner_tags": [rng.choice(("O", "B-X", "I-X")) for _ in tokens]}

    _write_rows(
        folder / "entities.json",
        ({"tokens": ["a", "b", "c"], "ner_tags": ["O", "B-X", "I-X"]}, *(entities() for _ in range(NUM_ROWS - 1))),
    )

    def question(number: int) -> dict[str, Any]:
        context = words(3)
        answer = context.split()[-1]
        answers = {"text": [answer], "answer_start": [context.rindex(answer)]}
        return {"id": str(number), "title": "", "context": context, "question": words(1, 4), "answers": answers}

    _write(folder / "questions.json", json.dumps({"data": [question(i) for i in rows]}))
    instructions = [{"instruction": words(), "input": "", "output": words()} for _ in rows]
    _write(folder / "llama_factory" / "tiny.json", json.dumps(instructions))
    _write(folder / "llama_factory" / "dataset_info.json", json.dumps({"tiny": {"file_name": "tiny.json"}}))
    plain = ({"system": "", "prompt": words(), "chosen": words(), "rejected": words()} for _ in rows)
    _write_rows(folder / "pairs.jsonl", plain)


def _pair(words: Any, number: int) -> dict[str, Any]:
    return {"sentence1": words(), "sentence2": words(), "score": number / NUM_ROWS}


def _line(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefgh ", k=length))


def _write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write(file, "\n".join(map(json.dumps, rows)))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
