"""The model: a named one, or a small new one."""

import os
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from _shared.arguments import LoopArguments, ModelArguments
from _shared.errors import UserError, one_line, plain_errors
from hf_gradutils import FirstRankPerNode

AUTO_MODELS = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


POSITIONS = ("wpe", "embed_positions", "position_embeddings")
"""Names of tables of positions in transformers."""


def load_model(
    recipe: ModelArguments,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    task: str = "causal-lm",
    classes: list[str] | None = None,
) -> transformers.PreTrainedModel:
    """Load the named model, or create a small one: T5 for seq2seq, otherwise Llama."""
    auto = AUTO_MODELS[task]
    names = dict(enumerate(classes or []))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if classes else {}
    if recipe.model_name_or_path:
        try:
            model = auto.from_pretrained(recipe.model_name_or_path, dtype=recipe.dtype, **labels)
        except Exception as error:  # each format of weights has its own
            what = one_line(error) or type(error).__name__
            raise UserError(f"cannot load {recipe.model_name_or_path!r}: {what}") from error
        limit = num_positions(model)
        if limit and max_length and max_length > limit:
            raise UserError(
                f"max_length is {max_length:,}, and {recipe.model_name_or_path!r} has {limit:,} positions; "
                f"pass --max_length {limit}"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_attention_heads": recipe.num_heads,
        "num_hidden_layers": recipe.num_layers,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if task == "seq2seq":
        size |= {"d_kv": recipe.hidden_size // recipe.num_heads, "d_ff": 2 * recipe.hidden_size, "dropout_rate": 0.0}
        # T5's own names: with the common name num_hidden_layers the decoder would keep its default of 6 layers.
        size |= {"num_layers": size.pop("num_hidden_layers"), "num_decoder_layers": recipe.num_layers}
        size |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": tokenizer.pad_token_id}
        return auto.from_config(AutoConfig.for_model("t5", **size))
    size |= {"intermediate_size": 3 * recipe.hidden_size, "max_position_embeddings": max_length or 2048}
    size |= {"tie_word_embeddings": True, "bos_token_id": None, "use_cache": False}
    return auto.from_config(AutoConfig.for_model("llama", **size, **labels))


def num_positions(model: transformers.PreTrainedModel) -> int | None:
    """Return how many tokens the smallest table of positions has room for; None without one, as with rotations."""
    sizes = []
    for name, module in model.named_modules():
        if name.endswith(POSITIONS) and isinstance(module, torch.nn.Embedding):
            padding = module.padding_idx
            num_reserved = getattr(module, "offset", 0 if padding is None else padding + 1)  # RoBERTa, BART
            sizes.append(module.num_embeddings - num_reserved)
    return min(sizes, default=None)


def split_over_ranks(
    model: transformers.PreTrainedModel, training: TrainingArguments | LoopArguments
) -> transformers.PreTrainedModel:
    """Split the model if the launcher's ``parallelism_config`` asks for tensor parallelism.

    transformers splits a model only while loading it, so the model is saved and loaded again.
    """
    sizes = [int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", 1)) for name in ("TP", "DP_SHARD", "DP_REPLICATE")]
    num_parts, num_shards, num_copies = sizes
    if num_parts == 1:
        return model
    if training.save_strategy != "no" and not getattr(training, "save_only_model", False):
        raise UserError(
            "transformers and accelerate cannot resume a model that is split by tensor parallelism: "
            "pass --save_strategy no; the final model is saved in any case"
        )
    folder = Path(training.output_dir) / "whole"
    folder.mkdir(parents=True, exist_ok=True)
    with plain_errors(), FirstRankPerNode(scope="auto", cache_dir=folder) as is_first:
        if is_first:
            model.save_pretrained(folder)
    layout = DistributedConfig(
        tp_size=num_parts,
        tp_plan="auto",
        fsdp_size=num_shards,
        dp_replicate_size=num_copies,
        fsdp_mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",  # reduces in float32
    )
    return type(model).from_pretrained(folder, distributed_config=layout)
