"""The recipes' arguments: dataclasses filled from a YAML file and from flags that override it."""

import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from _shared.checks import check_at_least, check_training
from _shared.deepspeed import precision_flags
from _shared.errors import UserError


@dataclass(kw_only=True)
class DataArguments:
    """The rows to train on and to hold out."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A hub data set, a folder, or a file: JSON lines, JSON, CSV, TSV, parquet, text, or .gz of them. "
            "Default: stdlib docstrings."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: hold out 1 in 20 rows of the training split."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "A file of rows to evaluate on, in place of eval_split."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Chats, rendered by the tokenizer's chat template; replaces the texts."}
    )
    max_examples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Evaluate this many rows at most."})
    cache_dir: str = field(
        default=str(datasets.config.HF_DATASETS_CACHE),
        metadata={"help": "Folder of prepared data."},
    )
    check_invariance: bool = field(
        default=False,
        metadata={"help": "Compare gradients with those of one process and one batch, instead of training."},
    )

    def __post_init__(self):
        if self.dataset_name == "":
            raise UserError("dataset_name is empty; give a file, a folder or a hub name, or leave it out")
        for name in ("max_examples", "max_eval_examples"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)

    @property
    def text_arguments(self) -> list[str]:
        """The arguments that name the columns which the tokenizer reads."""
        return ["messages_column"] if self.messages_column else []


@dataclass(kw_only=True)
class ModelArguments:
    """The name of a model, or the size of a small new one (Llama, or T5 for seq2seq)."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A hub model or a local folder. Default: a small new model.", "aliases": "--model"},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Precision of a loaded model's weights."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of a new byte-level BPE tokenizer."})
    hidden_size: int = field(default=192, metadata={"help": "Width of a new model."})
    num_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of a new model."})

    def __post_init__(self):
        if (self.model_name_or_path or "").startswith("~"):
            self.model_name_or_path = str(Path(self.model_name_or_path).expanduser())
        check_at_least(self, 1, "vocab_size", "hidden_size", "num_layers", "num_heads")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size must be a multiple of 2 × num_heads = {2 * self.num_heads}, got {self.hidden_size}"
            )


@dataclass(kw_only=True)
class RecipeArguments(DataArguments, ModelArguments):
    """The task, the model and the data."""

    task: Literal["causal-lm", "seq2seq", "sequence-classification"] = field(
        default="causal-lm", metadata={"help": "The task to train."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Text to train on (seq2seq: the output; classification: the input)."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Text before it, without targets. Required for seq2seq."}
    )
    label_column: str = field(default="label", metadata={"help": "The class, for sequence-classification."})
    max_labels: int | None = field(
        default=None, metadata={"help": "Number of classes to keep, most frequent first. Default: all."}
    )
    max_length: int = field(default=512, metadata={"help": "Longest example, in tokens; longer ones are truncated."})

    def __post_init__(self):
        DataArguments.__post_init__(self)
        ModelArguments.__post_init__(self)
        check_at_least(self, 1, "max_length")
        if self.dataset_name is None:  # the columns of the standard library's docstrings
            self.prompt_column, self.text_column, self.label_column = "prompt", "docstring", "package"
            self.messages_column = None
        if self.task == "seq2seq" and not (self.prompt_column or self.messages_column):
            raise UserError("seq2seq needs an input: give prompt_column (text → text_column) or messages_column")
        if self.task == "sequence-classification" and self.messages_column:
            raise UserError("sequence-classification reads text_column and label_column, not messages_column")

    @property
    def text_arguments(self) -> list[str]:
        """The arguments that name the columns which the tokenizer reads."""
        return super().text_arguments or (["prompt_column"] if self.prompt_column else []) + ["text_column"]


@dataclass(kw_only=True)
class ChatArguments(DataArguments, ModelArguments):
    """The model and the chats; trl's ``SFTConfig`` sets their maximum length."""

    messages_column: str = field(default="messages", metadata={"help": "Chats: lists of turns."})

    def __post_init__(self):
        DataArguments.__post_init__(self)
        ModelArguments.__post_init__(self)


@dataclass(kw_only=True)
class LoopArguments:
    """Training without a Trainer: the fields of transformers' ``TrainingArguments`` that these recipes support."""

    output_dir: str = field(metadata={"help": "Folder of checkpoints and of the model."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples per micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Examples per evaluation batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training examples."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; above 0, it overrides num_train_epochs."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "linear, cosine, constant, …"})
    warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps until the peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Largest gradient norm; 0 turns clipping off."})
    seed: int = field(default=42, metadata={"help": "Seed of the new model and of the order of examples."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between two lines of the log."})
    eval_strategy: Literal["no", "steps"] = field(default="no", metadata={"help": "Evaluate while training."})
    eval_steps: int = field(default=100, metadata={"help": "Optimizer steps between two evaluations."})
    save_strategy: Literal["no", "steps"] = field(default="steps", metadata={"help": "Keep checkpoints."})
    save_steps: int = field(default=100, metadata={"help": "Optimizer steps between two checkpoints."})
    save_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints to keep. Default: all."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": 'A checkpoint, or "last" for the newest one in output_dir.'}
    )
    report_to: str = field(default="none", metadata={"help": "Trackers that also get the log: tensorboard, wandb, …"})
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "DDP: for models that do not use every parameter in every step."}
    )

    def __post_init__(self):
        check_at_least(self, 1, "num_train_epochs", "logging_steps", "eval_steps", "save_steps")

    def is_due(self, what: Literal["log", "evaluate", "save"], step: int) -> bool:
        """Return True if logging, evaluating or saving is due after this optimizer step."""
        every = {
            "log": self.logging_steps,
            "evaluate": self.eval_steps if self.eval_strategy == "steps" else 0,
            "save": self.save_steps if self.save_strategy == "steps" else 0,
        }[what]
        return every > 0 and step % every == 0


@dataclass(kw_only=True)
class PlainTorchArguments(LoopArguments):
    """Adds layout and precision, which the other recipes read from the launcher's configuration."""

    shard: bool = field(default=False, metadata={"help": "Shard the model with fully_shard instead of DDP."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16; weights and reductions are float32."})
    report_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata={"help": "Tracker that also gets the log."}
    )


def parse_arguments(argv: list[str], *classes: type) -> tuple[Any, ...]:
    """Parse ``[file.yaml] [--flag value …]`` into one object per class; the last class holds the training arguments."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without ░ or ü prints ? for them
        sys.stdout.reconfigure(errors="replace")
    recipe = Path(sys.argv[0]).name
    defaults = {
        "output_dir": f"outputs/{Path(recipe).stem}",
        "logging_steps": 10,
        "ddp_find_unused_parameters": "false",
    }
    parser = HfArgumentParser(classes, allow_abbrev=False, prog=recipe)
    parser.error = raise_user_error
    flags = [f"--{name}={value}" for name, value in defaults.items()]  # the file's and the user's come after
    if issubclass(classes[-1], TrainingArguments) and not torch.accelerator.is_available():
        # Without use_cpu, accelerate would train a separate copy of the model in each process.
        flags += ["--use_cpu=true", "--dataloader_pin_memory=false"]
    if argv and argv[0].endswith((".yaml", ".yml")):
        flags += flags_of_yaml(argv[0])
        argv = argv[1:]
    flags += argv  # the last value wins
    if issubclass(classes[-1], TrainingArguments):
        flags += precision_flags()

    names = {option.removeprefix("--") for option in parser._option_string_actions}
    for flag in parser.parse_known_args(flags)[1]:
        name = flag.removeprefix("--").split("=")[0]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{recipe} --help lists them all"
        raise UserError(f"unknown configuration key or flag {name!r}; {hint}")
    try:
        parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # transformers' own checks of its arguments
        raise UserError(f"the training arguments do not fit together: {error}") from error
    check_training(parsed[-1])
    return parsed


def flags_of_yaml(path: str) -> list[str]:
    """Turn a YAML file into flags, so that argparse checks the types of both (YAML reads 1e-4 as a string)."""
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
