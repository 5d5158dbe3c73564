"""The model: one that has a name, or a small new one."""

import os
from pathlib import Path

import transformers
from arguments import LoopArguments, ModelArguments
from errors import UserError, one_line
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from hf_gradutils import FirstRankPerNode

AUTO_MODELS = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def load_model(
    recipe: ModelArguments,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_length: int,
    task: str = "causal-lm",
    classes: dict[str, str] | None = None,
) -> transformers.PreTrainedModel:
    """Load the named model, or make a small one: T5 for seq2seq, else Llama."""
    auto = AUTO_MODELS[task]
    names = dict(enumerate(classes.values())) if classes else {}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if classes else {}
    if recipe.model_name_or_path:
        try:
            model = auto.from_pretrained(recipe.model_name_or_path, dtype=recipe.dtype, **labels)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {recipe.model_name_or_path!r}: {one_line(error)}") from error
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
        # Named as T5 names it: under transformers' common name the decoder would keep its default of 6 layers.
        size |= {"num_layers": size.pop("num_hidden_layers"), "num_decoder_layers": recipe.num_layers}
        size |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": tokenizer.pad_token_id}
        return auto.from_config(AutoConfig.for_model("t5", **size))
    size |= {"intermediate_size": 3 * recipe.hidden_size, "max_position_embeddings": max_length}
    size |= {"tie_word_embeddings": True, "bos_token_id": None, "use_cache": False}
    return auto.from_config(AutoConfig.for_model("llama", **size, **labels))


def split_over_ranks(
    model: transformers.PreTrainedModel, training: TrainingArguments | LoopArguments
) -> transformers.PreTrainedModel:
    """Where the launcher's ``parallelism_config`` asks for tensor parallelism, load the model anew, each rank its part.

    transformers splits a model only while it loads it, so it is written to the disk first.
    """
    sizes = [int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", 1)) for name in ("TP", "DP_SHARD", "DP_REPLICATE")]
    num_parts, num_shards, num_copies = sizes
    if num_parts == 1:
        return model
    if training.save_strategy != "no" and not getattr(training, "save_only_model", False):
        raise UserError(
            "transformers and accelerate cannot resume a model that is split by tensor parallelism: "
            "give --save_strategy no; the model is saved at the end all the same"
        )
    folder = Path(training.output_dir) / "whole"
    folder.mkdir(parents=True, exist_ok=True)
    with FirstRankPerNode(scope="auto", cache_dir=folder) as is_first:
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
