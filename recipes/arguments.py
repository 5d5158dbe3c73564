"""What the recipe can be told: dataclasses, filled from a YAML file and the flags that override it."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments


class UserError(Exception):
    """Something the user gave is wrong; shown as one line, without a traceback."""


@dataclass(kw_only=True)
class RecipeArguments:
    """What to train on what; everything else is in transformers' TrainingArguments."""

    task: Literal["causal-lm", "seq2seq", "sequence-classification"] = field(
        default="causal-lm", metadata={"help": "What the model learns to do."}
    )

    # The data
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A hub data set, a local folder or a JSON-lines file. Default: stdlib docstrings."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: hold out 5 % of the training split."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Text to learn (seq2seq: to produce; classification: to read)."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Text before it, read but not learnt. seq2seq needs one."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Chats, rendered by the tokenizer's chat template; replaces the texts."}
    )
    label_column: str = field(default="label", metadata={"help": "The class, for sequence-classification."})
    max_labels: int | None = field(
        default=None, metadata={"help": "Keep the rows of this many most frequent classes. Default: all."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens after which an example is cut."})
    max_examples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Evaluate this many rows at most."})
    cache_dir: str = field(
        default=str(datasets.config.HF_DATASETS_CACHE),
        metadata={"help": "Where prepared data is kept."},
    )

    # The model: a name, or the size of a small one made from a configuration (Llama, or T5 for seq2seq)
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A hub model or a local folder. Default: a small new model."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Precision of a loaded model's weights."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of a new byte-level BPE tokenizer."})
    hidden_size: int = field(default=192, metadata={"help": "Width of a new model."})
    num_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of a new model."})

    def __post_init__(self):
        for name in ("max_length", "vocab_size", "hidden_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size must be a multiple of 2 × num_heads = {2 * self.num_heads}, got {self.hidden_size}"
            )
        if self.dataset_name is None:  # the columns of the standard library's docstrings
            self.prompt_column, self.text_column, self.label_column = "prompt", "docstring", "package"
            self.messages_column = None
        if self.task == "seq2seq" and not (self.prompt_column or self.messages_column):
            raise UserError("seq2seq needs an input: give prompt_column (text → text_column) or messages_column")
        if self.task == "sequence-classification" and self.messages_column:
            raise UserError("sequence-classification reads text_column and label_column, not messages_column")


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, TrainingArguments]:
    parser = HfArgumentParser((RecipeArguments, TrainingArguments), allow_abbrev=False, prog="finetune.py")
    parser.error = raise_user_error
    flags = []
    if not torch.accelerator.is_available():
        # Without use_cpu, accelerate would train one separate copy per process instead of one model on all.
        flags += ["--use_cpu=true", "--dataloader_pin_memory=false"]
    if argv and argv[0].endswith((".yaml", ".yml")):
        flags += flags_of_yaml(argv[0])
        argv = argv[1:]
    flags += argv  # the last one wins

    known = {option.removeprefix("--") for option in parser._option_string_actions}
    for flag in parser.parse_known_args(flags)[1]:
        name = flag.removeprefix("--").split("=")[0]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "finetune.py --help lists what there is"
        raise UserError(f"unknown configuration key or flag {name!r}; {hint}")
    try:
        recipe, training = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # transformers' own checks of its arguments
        raise UserError(f"the training arguments do not fit together: {error}") from error
    if training.max_grad_norm < 0:
        raise UserError(f"max_grad_norm must be >= 0, got {training.max_grad_norm}; 0 turns clipping off, 1.0 is usual")
    return recipe, training


def flags_of_yaml(path: str) -> list[str]:
    """Write a YAML file as flags, so that argparse checks the types of both (YAML reads 1e-4 as a string)."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines, got {type(values).__name__}")
    flags = []
    for key, value in values.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return flags


def raise_user_error(message: str) -> None:
    raise UserError(message)
