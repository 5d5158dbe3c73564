"""Training rows, held-out rows and their tokenizer."""

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from _shared.arguments import ChatArguments, DataArguments, RecipeArguments
from _shared.errors import UserError, one_line
from _shared.files import Source, Texts, load_texts_of, numbered
from _shared.lines import OPTIONAL, ROW, check_columns
from _shared.rows import chat_of, read, text_of, user_errors
from _shared.stdlib_docstrings import load_stdlib_chats, load_stdlib_docstrings

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)

FEW = 20

Parts = tuple[Texts, Texts]  # to train on, and held out


def load_texts(recipe: RecipeArguments) -> Parts:
    """Load the training and the held-out rows, untouched."""
    labels = ["label_column"] if recipe.task == "sequence-classification" else []
    return load_parts(recipe, load_stdlib_docstrings, recipe.text_arguments + labels)


def load_chats(data: ChatArguments) -> Parts:
    """Load rows with a column of chats."""
    return load_parts(data, load_stdlib_chats, data.text_arguments)


def load_parts(data: DataArguments, load_default: Callable[[str], tuple], wanted: list[str]) -> Parts:
    """Load both parts; ``wanted`` are the arguments that name the columns they must have."""
    if data.validation_file and data.eval_split:
        raise UserError("validation_file and eval_split both say what to evaluate on; give one")
    columns = {argument: getattr(data, argument) for argument in wanted}
    to_read = columns | ({OPTIONAL: OPTIONAL} if "messages_column" in wanted else {})
    options = {"wanted": to_read, "config_name": data.dataset_config_name, "cache_dir": data.cache_dir}
    if data.dataset_name is None:
        if data.validation_file:
            raise UserError("validation_file needs dataset_name, the rows to train on")
        source = Source(name="Python's docstrings")
        parts = [Texts(rows=numbered(rows), source=source) for rows in load_default(data.cache_dir)]
    else:
        train = load_texts_of(data.dataset_name, data.train_split, **options)
        if data.validation_file:
            held_out = load_texts_of(data.validation_file, "train", **options | {"config_name": None})
        elif data.eval_split:
            held_out = load_texts_of(data.dataset_name, data.eval_split, **options)
        else:
            train, held_out = hold_out(train, list(columns.values()))
        parts = [train, held_out]
    for part in parts:
        check_columns([name for name in part.rows.column_names if name != ROW], columns, part.source.name)
        if len(part.rows) == 0:
            raise UserError(f"{part.source.name} has no rows; it needs rows to train on and rows to hold out")
    limits = (data.max_examples, data.max_eval_examples)
    return tuple(
        Texts(rows=limit(part.rows, num_rows), source=part.source, part=name)
        for part, num_rows, name in zip(parts, limits, ("training", "held-out"), strict=True)
    )


def hold_out(train: Texts, columns: list[str]) -> Parts:
    """Hold out one row in twenty, always the same; where these are few, none without a value in ``columns``."""
    if len(train.rows) < 2:
        raise UserError(
            f"{train.source.name} has {['no rows', 'one row'][len(train.rows)]}; it needs rows to train on and rows to "
            "hold out, at least one each (validation_file names a file of held-out rows)"
        )
    rows, num_held_out = train.rows.shuffle(seed=0), -(-len(train.rows) // 20)
    if num_held_out < FEW:  # nothing would be left of one row that is empty
        with user_errors(train.source):
            values = list(rows.select_columns(columns))
        last = [i for i, row in enumerate(values) if any(value in (None, "", []) for value in row.values())]
        rows = rows.select([*(i for i in range(len(rows)) if i not in last), *last])
    kept, held_out = rows.skip(num_held_out), rows.take(num_held_out)
    return Texts(rows=kept, source=train.source), Texts(rows=held_out, source=train.source)


def limit(rows: datasets.Dataset, num_rows: int | None) -> datasets.Dataset:
    return rows if num_rows is None or num_rows >= len(rows) else rows.shuffle(seed=0).take(num_rows)


def load_tokenizer(recipe: RecipeArguments | ChatArguments, train: Texts) -> transformers.PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train a byte-level BPE tokenizer on the training texts and cache it."""
    folder = recipe.model_name_or_path
    if not folder:
        columns = [getattr(recipe, argument) for argument in recipe.text_arguments]
        texts = train.rows.select_columns([*columns, ROW])
        key = datasets.fingerprint.Hasher.hash((texts._fingerprint, recipe.vocab_size, CHAT_TEMPLATE))
        folder = Path(recipe.cache_dir) / "hf_gradutils_tokenizers" / key
        if not (folder / "tokenizer_config.json").exists():
            train_tokenizer(Texts(rows=texts, source=train.source), recipe).save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises Exception itself
        what = one_line(error) or type(error).__name__
        raise UserError(f"cannot load the tokenizer of {str(folder)!r}: {what}") from error
    if recipe.messages_column and not tokenizer.chat_template:
        raise UserError(f"messages_column needs a chat template, and the tokenizer of {str(folder)!r} has none")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {str(folder)!r} has neither a padding nor an end token")
    return tokenizer


def train_tokenizer(texts: Texts, recipe: RecipeArguments | ChatArguments) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    with user_errors(texts.source):
        bpe.train_from_iterator(
            read_texts(texts.rows, chats=bool(recipe.messages_column)),
            recipe.vocab_size,
            special_tokens=[*SPECIAL_TOKENS.values()],
            show_progress=False,
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=CHAT_TEMPLATE, **SPECIAL_TOKENS)


def read_texts(rows: datasets.Dataset, *, chats: bool) -> Iterator[str]:
    for row in rows:
        for column in row:
            if column != ROW and chats:
                yield from (turn["content"] for turn in read(row, column, chat_of))
            elif column != ROW:
                yield read(row, column, text_of)
