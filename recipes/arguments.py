"""What a recipe can be told: dataclasses, filled from a YAML file and the flags that override it."""

import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import yaml
from errors import UserError
from transformers import HfArgumentParser, TrainingArguments


@dataclass(kw_only=True)
class DataArguments:
    """Which rows to learn from and which to hold out."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A hub data set, a local folder or a JSON-lines file. Default: stdlib docstrings."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: hold out 5 % of the training split."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Chats, rendered by the tokenizer's chat template; replaces the texts."}
    )
    max_examples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Evaluate this many rows at most."})
    cache_dir: str = field(
        default=str(datasets.config.HF_DATASETS_CACHE),
        metadata={"help": "Where prepared data is kept."},
    )
    check_invariance: bool = field(
        default=False,
        metadata={"help": "Compare gradients with those of one process and one batch, instead of training."},
    )

    @property
    def text_columns(self) -> list[str]:
        """What the tokenizer reads."""
        return [self.messages_column] if self.messages_column else []


@dataclass(kw_only=True)
class ModelArguments:
    """A model's name, or the size of a small one made from a configuration (Llama, or T5 for seq2seq)."""

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
        check_at_least(self, 1, "vocab_size", "hidden_size", "num_layers", "num_heads")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size must be a multiple of 2 × num_heads = {2 * self.num_heads}, got {self.hidden_size}"
            )


@dataclass(kw_only=True)
class RecipeArguments(DataArguments, ModelArguments):
    """What to train on what."""

    task: Literal["causal-lm", "seq2seq", "sequence-classification"] = field(
        default="causal-lm", metadata={"help": "What the model learns to do."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Text to learn (seq2seq: to produce; classification: to read)."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Text before it, read but not learnt. seq2seq needs one."}
    )
    label_column: str = field(default="label", metadata={"help": "The class, for sequence-classification."})
    max_labels: int | None = field(
        default=None, metadata={"help": "Keep the rows of this many most frequent classes. Default: all."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens after which an example is cut."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "max_length")
        if self.dataset_name is None:  # the columns of the standard library's docstrings
            self.prompt_column, self.text_column, self.label_column = "prompt", "docstring", "package"
            self.messages_column = None
        if self.task == "seq2seq" and not (self.prompt_column or self.messages_column):
            raise UserError("seq2seq needs an input: give prompt_column (text → text_column) or messages_column")
        if self.task == "sequence-classification" and self.messages_column:
            raise UserError("sequence-classification reads text_column and label_column, not messages_column")

    @property
    def text_columns(self) -> list[str]:
        """What the tokenizer reads."""
        return super().text_columns or [column for column in (self.prompt_column, self.text_column) if column]


@dataclass(kw_only=True)
class ChatArguments(DataArguments, ModelArguments):
    """What to train on which chats; trl's ``SFTConfig`` says where they are cut."""

    messages_column: str = field(default="messages", metadata={"help": "Chats: lists of role and content."})


@dataclass(kw_only=True)
class LoopArguments:
    """How a recipe without a Trainer trains: the fields of transformers' ``TrainingArguments`` that it knows."""

    output_dir: str = field(metadata={"help": "Where checkpoints and the model are kept."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples of a micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Examples of a batch of the evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of an optimizer step."})
    num_train_epochs: int = field(default=3, metadata={"help": "Times that every example is seen."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; if above 0, num_train_epochs is not read."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "linear, cosine, constant, …"})
    warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps until the highest learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped; 0 for never."})
    seed: int = field(default=42, metadata={"help": "Of the new model and of the order of the examples."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between two lines of the log."})
    eval_strategy: Literal["no", "steps"] = field(default="no", metadata={"help": "Evaluate while training."})
    eval_steps: int = field(default=100, metadata={"help": "Optimizer steps between two evaluations."})
    save_strategy: Literal["no", "steps"] = field(default="steps", metadata={"help": "Keep checkpoints."})
    save_steps: int = field(default=100, metadata={"help": "Optimizer steps between two checkpoints."})
    save_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints to keep. Default: all."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": 'A checkpoint, or "last" for the newest one in output_dir.'}
    )
    report_to: str = field(default="none", metadata={"help": "Where the log goes besides: tensorboard, wandb, …"})
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "For models that leave parameters out of a step, under DDP."}
    )

    def __post_init__(self):
        check_at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
        check_at_least(self, 1, "gradient_accumulation_steps", "num_train_epochs", "logging_steps")
        check_at_least(self, 1, "eval_steps", "save_steps")

    def is_due(self, what: Literal["log", "evaluate", "save"], step: int) -> bool:
        """Whether something is to happen after this optimizer step."""
        every = {
            "log": self.logging_steps,
            "evaluate": self.eval_steps if self.eval_strategy == "steps" else 0,
            "save": self.save_steps if self.save_strategy == "steps" else 0,
        }[what]
        return every > 0 and step % every == 0


@dataclass(kw_only=True)
class PlainTorchArguments(LoopArguments):
    """What a launcher's configuration says elsewhere."""

    shard: bool = field(default=False, metadata={"help": "Shard the model with fully_shard instead of DDP."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16; weights and reductions are float32."})
    report_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata={"help": "Where the log goes besides."}
    )


def check_at_least(arguments: Any, least: float, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(arguments, name)}")


def parse_arguments(argv: list[str], *classes: type) -> tuple[Any, ...]:
    """One object of each class, the last of which says how to train; from ``[file.yaml] [--flag value …]``."""
    recipe = Path(sys.argv[0]).name
    parser = HfArgumentParser(classes, allow_abbrev=False, prog=recipe)
    parser.error = raise_user_error
    flags = []
    if issubclass(classes[-1], TrainingArguments) and not torch.accelerator.is_available():
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
        hint = f"did you mean {close[0]!r}?" if close else f"{recipe} --help lists what there is"
        raise UserError(f"unknown configuration key or flag {name!r}; {hint}")
    try:
        parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # transformers' own checks of its arguments
        raise UserError(f"the training arguments do not fit together: {error}") from error
    if (limit := parsed[-1].max_grad_norm) < 0:
        raise UserError(f"max_grad_norm must be >= 0, got {limit}; 0 turns clipping off, 1.0 is usual")
    return parsed


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
