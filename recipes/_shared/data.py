"""Training rows, held-out rows and their tokenizer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from _shared.arguments import ChatArguments, DataArguments, RecipeArguments
from _shared.errors import UserError, one_line
from _shared.stdlib_docstrings import load_stdlib_chats, load_stdlib_docstrings

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)

Split = tuple[datasets.Dataset, datasets.Dataset]


def load_texts(recipe: RecipeArguments) -> Split:
    """Load the training and the held-out rows, untouched."""
    labels = [recipe.label_column] if recipe.task == "sequence-classification" else []
    return load_rows(recipe, load_stdlib_docstrings, recipe.text_columns + labels)


def load_chats(data: DataArguments) -> Split:
    """Load rows with a column of chats: lists of messages with ``role`` and ``content``."""
    return load_rows(data, load_stdlib_chats, data.text_columns)


def load_rows(data: DataArguments, load_default: Callable[[str], Split], wanted: list[str]) -> Split:
    if data.dataset_name is None:
        train, held_out = load_default(data.cache_dir)
    else:
        path, options = data.dataset_name, {"name": data.dataset_config_name, "cache_dir": data.cache_dir}
        if Path(path).is_file():
            if not Path(path).stat().st_size:
                raise UserError(f"the data set {path!r} needs rows to train on and rows to hold out, got an empty file")
            path, options["data_files"] = "json", path
        try:
            train = datasets.load_dataset(path, split=data.train_split, **options)
            if data.eval_split:
                held_out = datasets.load_dataset(path, split=data.eval_split, **options)
            else:
                shuffled, num_held_out = train.shuffle(seed=0), -(-len(train) // 20)
                held_out, train = shuffled.take(num_held_out), shuffled.skip(num_held_out)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            raise UserError(f"cannot load the data set {data.dataset_name!r}: {one_line(error)}") from error
    if len(train) == 0 or len(held_out) == 0:
        raise UserError(
            f"the data set {data.dataset_name or 'of docstrings'!r} needs rows to train on and rows to hold out, "
            f"got {len(train)} and {len(held_out)}; check the file and its splits"
        )
    for column in wanted:
        if column not in train.column_names:
            raise UserError(f"the data set has no column {column!r}; it has {', '.join(train.column_names)}")
    return limit(train, data.max_examples), limit(held_out, data.max_eval_examples)


def limit(rows: datasets.Dataset, num_rows: int | None) -> datasets.Dataset:
    return rows if num_rows is None or num_rows >= len(rows) else rows.shuffle(seed=0).take(num_rows)


def load_tokenizer(
    recipe: RecipeArguments | ChatArguments, train: datasets.Dataset
) -> transformers.PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train a byte-level BPE tokenizer on the training texts and cache it."""
    folder = recipe.model_name_or_path
    if not folder:
        texts = train.select_columns(recipe.text_columns)
        key = datasets.fingerprint.Hasher.hash((texts._fingerprint, recipe.vocab_size, CHAT_TEMPLATE))
        folder = Path(recipe.cache_dir) / "hf_gradutils_tokenizers" / key
        if not (folder / "tokenizer_config.json").exists():
            train_tokenizer(texts, recipe.vocab_size).save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {str(folder)!r}: {one_line(error)}") from error
    if recipe.messages_column and not tokenizer.chat_template:
        raise UserError(f"messages_column needs a chat template, and the tokenizer of {str(folder)!r} has none")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def train_tokenizer(rows: datasets.Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = (text for row in rows for value in row.values() for text in texts_of(value))
    bpe.train_from_iterator(texts, vocab_size, special_tokens=[*SPECIAL_TOKENS.values()], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=CHAT_TEMPLATE, **SPECIAL_TOKENS)


def texts_of(value: Any) -> Iterator[str]:
    """Yield the texts in a column's value: a text, a chat or None."""
    if isinstance(value, list):
        yield from (message["content"] or "" for message in value)
    else:
        yield value or ""
