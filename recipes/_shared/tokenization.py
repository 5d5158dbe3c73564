"""Rows to ``input_ids`` and ``labels``, one function per kind of task; collation and target counts."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from _shared.arguments import RecipeArguments
from _shared.errors import UserError

MASKED = -100  # the label of a position that is not a target


def find_classes(recipe: RecipeArguments, train: datasets.Dataset) -> dict[str, str]:
    """Map the label column's values, written as strings, to the names of the classes, most frequent first."""
    if recipe.task != "sequence-classification":
        return {}
    kind = train.features[recipe.label_column]
    if getattr(kind, "dtype", "").startswith("float"):
        raise UserError(f"label_column must hold strings, integers or classes, got {kind.dtype}")
    counts = Counter(str(label) for label in train[recipe.label_column] if label is not None)
    values = [value for value, _ in counts.most_common(recipe.max_labels)]
    return {value: kind.names[int(value)] if isinstance(kind, datasets.ClassLabel) else value for value in values}


def tokenize(
    rows: datasets.Dataset,
    recipe: RecipeArguments,
    tokenizer: transformers.PreTrainedTokenizerBase,
    classes: dict[str, str],
) -> datasets.Dataset:
    """Turn rows into ``input_ids`` and ``labels``, and drop rows without a target."""
    if recipe.task == "sequence-classification":
        encode, columns = encode_class, {"text": recipe.text_column, "label": recipe.label_column}
        columns["classes"] = list(classes)
    elif recipe.messages_column:
        encode, columns = encode_chat, {"messages": recipe.messages_column}
    else:
        encode, columns = encode_text, {"text": recipe.text_column, "prompt": recipe.prompt_column}
    if recipe.task == "seq2seq":
        encode = {encode_chat: encode_chat_pair, encode_text: encode_text_pair}[encode]
    # The first truncation changes the tokenizer, and with it the key under which datasets caches its work.
    tokenizer("warm up", truncation=True, max_length=recipe.max_length)
    options = {"tokenizer": tokenizer, "max_length": recipe.max_length, **columns}
    # datasets hashes only the name of a module's function; hashing this file makes an edit invalidate the cache.
    this_file = Path(__file__).read_bytes()
    key = datasets.fingerprint.Hasher.hash((rows._fingerprint, this_file, encode.__name__, options))
    encoded = rows.map(encode, fn_kwargs=options, remove_columns=rows.column_names, new_fingerprint=key)
    return encoded.filter(has_target, input_columns="labels")


def check_targets(recipe: RecipeArguments, **parts: tuple[datasets.Dataset, datasets.Dataset]) -> None:
    """Raise UserError if a part, given as its texts and the rows made of them, has no row left."""
    for name, (texts, rows) in parts.items():
        if len(rows) == 0:
            raise UserError(
                f"none of the {len(texts)} {name.replace('_', '-')} examples has a target left: texts are empty, "
                f"prompts fill max_length ({recipe.max_length}), or no class is in max_labels; check the columns, "
                "raise max_length"
            )


def has_target(labels) -> bool:
    return labels != MASKED if isinstance(labels, int) else any(label != MASKED for label in labels)


def encode_text(row, tokenizer, max_length, text, prompt):
    """Causal LM: the tokens of the text are targets, those of the prompt are not."""
    before = token_ids(tokenizer, row[prompt], max_length) if prompt else []
    after = token_ids(tokenizer, row[text], max_length, add_special_tokens=not prompt)
    after = ended(after, tokenizer, max_length) if row[text] else []
    return causal_example(before + after, [False] * len(before) + [True] * len(after), max_length)


def encode_text_pair(row, tokenizer, max_length, text, prompt):
    """Seq2seq: the encoder reads the prompt, the decoder writes the text."""
    target = tokenizer(text_target=row[text] or "", truncation=True, max_length=max_length).input_ids
    return {
        "input_ids": ended(token_ids(tokenizer, row[prompt], max_length), tokenizer, max_length),
        "labels": ended(target, tokenizer, max_length) if row[text] else [],
    }


def encode_chat(row, tokenizer, max_length, messages):
    """Causal LM on a chat: the tokens that the template marks as the assistant's are targets.

    If the template has no ``{% generation %}``, the last assistant turn is the target.
    """
    chat = until_last_answer(row[messages])
    if not chat:
        return {"input_ids": [], "labels": []}
    if re.search(r"\{%-?\s*generation", tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        return causal_example(encoded["input_ids"], encoded["assistant_masks"], max_length)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(prompt):  # a template may write a turn differently when it is the last one
        prompt = whole[: next(i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b)]
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(whole[len(prompt) :], add_special_tokens=False).input_ids
    return causal_example(before + after, [False] * len(before) + [True] * len(after), max_length)


def encode_chat_pair(row, tokenizer, max_length, messages):
    """Seq2seq on a chat: the last assistant turn is written from everything before it."""
    chat = until_last_answer(row[messages])
    if not chat:
        return {"input_ids": [], "labels": []}
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    pair = {"prompt": prompt, "text": chat[-1]["content"]}
    return encode_text_pair(pair, tokenizer, max_length, text="text", prompt="prompt")


def encode_class(row, tokenizer, max_length, text, label, classes):
    """Classification: a text and the index of its class; MASKED for a class outside ``classes``."""
    has_class = row[text] and str(row[label]) in classes
    ids = token_ids(tokenizer, row[text], max_length)
    return {"input_ids": ids, "labels": classes.index(str(row[label])) if has_class else MASKED}


def token_ids(tokenizer, text, max_length, **options):
    return tokenizer(text or "", truncation=True, max_length=max_length, **options).input_ids


def ended(ids, tokenizer, max_length):
    """Append the end token, unless the tokenizer did or the text was truncated."""
    return ids if ids[-1:] == [tokenizer.eos_token_id] or len(ids) >= max_length else [*ids, tokenizer.eos_token_id]


def causal_example(ids, is_target, max_length):
    """Mask and truncate; the first token is never a target, because nothing before it predicts it."""
    is_target = [False, *is_target[1:]]
    labels = [token if target else MASKED for token, target in zip(ids, is_target, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def until_last_answer(messages):
    """Drop the turns after the last assistant turn, and the keys that datasets filled with None."""
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages or []]
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    return chat


def make_collator(recipe: RecipeArguments, tokenizer: transformers.PreTrainedTokenizerBase, model: Any) -> Any:
    """Return the collator of transformers that pads this task's rows."""
    if recipe.task == "sequence-classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=MASKED)


def count_targets(batch: dict[str, torch.Tensor], task: str) -> torch.Tensor:
    """Count the labels that the micro-batch's loss is a mean over; a causal head never predicts the first position."""
    labels = batch["labels"]
    return (labels[:, 1:] if task == "causal-lm" else labels).ne(MASKED).sum()


def pad_to_multiple(rows: datasets.Dataset, multiple: int) -> datasets.Dataset:
    """Add rows without targets, so that all ranks get equally many batches and every row counts once."""
    if not (num_missing := -len(rows) % multiple):
        return rows
    row = rows[0]
    row["labels"] = MASKED if isinstance(row["labels"], int) else [MASKED] * len(row["labels"])
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_list([row] * num_missing, rows.features)])
