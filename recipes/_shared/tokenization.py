"""Rows to ``input_ids`` and ``labels``, one function per kind of task; collation and target counts."""

import re
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Features, List, Value
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from _shared.arguments import RecipeArguments
from _shared.chats import answered_chat, render, seen_in
from _shared.classes import names_of
from _shared.counts import EMPTY, Counts, count_rows, without_targets
from _shared.files import Texts, cache_key
from _shared.lines import ROW
from _shared.rows import class_of, read, text_of, user_errors

MASKED = -100  # the label of a position that is not a target
ENCODED = Features(
    {
        ROW: Value("int64"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int64")),
        "dropped": Value("string"),  # why, or empty: a column, so that it is in the cache too
        "truncated": Value("bool"),
        "num_targets": Value("int64"),
    }
)

Tokenizer = transformers.PreTrainedTokenizerBase


def tokenize(
    texts: Texts, recipe: RecipeArguments, tokenizer: Tokenizer, classes: list[str]
) -> tuple[datasets.Dataset, Counts]:
    """Turn rows into ``input_ids`` and ``labels``; rows without a target are dropped, and counted by reason."""
    if recipe.task == "sequence-classification":
        encode, columns = encode_class, {"text": recipe.text_column, "label": recipe.label_column}
        columns |= {"classes": classes, "names": names_of(texts.rows, recipe.label_column)}
    elif recipe.messages_column:
        encode, columns = encode_chat, {"messages": recipe.messages_column}
    else:
        encode, columns = encode_text, {"text": recipe.text_column, "prompt": recipe.prompt_column}
    if recipe.task == "seq2seq":
        encode = {encode_chat: encode_chat_pair, encode_text: encode_text_pair}[encode]
    # The first truncation changes the tokenizer, and with it the key under which datasets caches its work.
    tokenizer("warm up", truncation=True, max_length=recipe.max_length)
    options = {"tokenizer": tokenizer, "max_length": recipe.max_length, **columns}
    with user_errors(texts.source):
        encoded = texts.rows.map(
            encode_row,
            fn_kwargs={"encode": encode, "options": options},
            remove_columns=[column for column in texts.rows.column_names if column != ROW],
            features=Features(ENCODED | {"labels": Value("int64")}) if encode is encode_class else ENCODED,
            new_fingerprint=cache_key(texts.rows, encode.__name__, options),
        )
    counts = count_rows(encoded, texts, recipe.max_length, lambda: seen_in(texts, recipe.messages_column))
    kept = encoded.select(np.flatnonzero([not reason for reason in encoded["dropped"][:]]))
    return kept.select_columns(["input_ids", "labels"]), counts


def encode_row(row, encode, options):
    """Return what ``encode`` makes of a row, why it is dropped if it is, and its number of targets."""
    example = {"dropped": "", "truncated": False, "input_ids": [], **encode(row, **options)}
    if example["dropped"]:
        example["labels"] = MASKED if encode is encode_class else []
    labels = example["labels"]
    example["num_targets"] = sum(label != MASKED for label in (labels if isinstance(labels, list) else [labels]))
    if not example["dropped"] and not example["num_targets"]:
        example["dropped"] = without_targets(options["max_length"] if example["truncated"] else None)
    return example


def encode_text(row, tokenizer, max_length, text, prompt):
    """Causal LM: the tokens of the text are targets, those of the prompt are not."""
    target, given = read(row, text, text_of), read(row, prompt, text_of) if prompt else ""
    if not target:
        return {"dropped": EMPTY}
    before, cut_before = token_ids(tokenizer, given, max_length) if prompt else ([], False)
    end = [tokenizer.eos_token_id]
    if before[-1:] == end and tokenizer("a").input_ids[-1:] == end:  # it ends every text, and here the text goes on
        before = before[:-1]
    after, cut_after = token_ids(tokenizer, target, max_length, add_special_tokens=not prompt)
    after = ended(after, tokenizer, max_length)
    example = causal_example(before + after, [False] * len(before) + [True] * len(after), max_length)
    return example | {"truncated": example["truncated"] or cut_before or cut_after}


def encode_text_pair(row, tokenizer, max_length, text, prompt):
    """Seq2seq: the encoder reads the prompt, the decoder writes the text."""
    return text_pair(read(row, prompt, text_of), read(row, text, text_of), tokenizer, max_length)


def text_pair(given, target, tokenizer, max_length):
    if not given or not target:
        return {"dropped": "without a prompt" if target else EMPTY}
    ids, cut_ids = token_ids(tokenizer, given, max_length)
    labels, cut_labels = token_ids(tokenizer, target, max_length, is_target=True)
    ids, labels = (ended(tokens, tokenizer, max_length) for tokens in (ids, labels))
    return {"input_ids": ids, "labels": labels, "truncated": cut_ids or cut_labels}


def encode_chat(row, tokenizer, max_length, messages):
    """Causal LM on a chat: the tokens that the template marks as the assistant's are targets.

    If the template has no ``{% generation %}``, the last assistant turn is the target.
    """
    chat, reason = answered_chat(row, messages)
    if not chat:
        return {"dropped": reason}
    if re.search(r"\{%-?\s*generation", tokenizer.get_chat_template()):
        encoded = render(row, messages, chat, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        return causal_example(encoded["input_ids"], encoded["assistant_masks"], max_length)
    whole = render(row, messages, chat, tokenizer, tokenize=False)
    prompt = render_prompt(row, messages, chat, tokenizer)
    if not whole.startswith(prompt):  # a template may write a turn differently when it is the last one
        prompt = whole[: next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(whole))]
    before = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    after = tokenizer(whole[len(prompt) :], add_special_tokens=False, verbose=False).input_ids
    return causal_example(before + after, [False] * len(before) + [True] * len(after), max_length)


def encode_chat_pair(row, tokenizer, max_length, messages):
    """Seq2seq on a chat: the last assistant turn is written from everything before it."""
    chat, reason = answered_chat(row, messages)
    if not chat:
        return {"dropped": reason}
    prompt = render_prompt(row, messages, chat, tokenizer)
    return text_pair(prompt, chat[-1]["content"].strip() and chat[-1]["content"], tokenizer, max_length)


def encode_class(row, tokenizer, max_length, text, label, classes, names):
    """Classification: a text and the index of its class."""
    value, name = read(row, text, text_of), read(row, label, lambda value: class_of(value, names))
    if not value or not name:
        return {"dropped": EMPTY if not value else "without a class"}
    if name not in classes:
        return {"dropped": f"of a class outside the {len(classes):,} trained"}
    ids, is_cut = token_ids(tokenizer, value, max_length)
    return {"input_ids": ids, "labels": classes.index(name), "truncated": is_cut}


def render_prompt(row, column, chat, tokenizer):
    """Render the turns before the last; templates do not take a chat without any."""
    return render(row, column, chat[:-1], tokenizer, tokenize=False, add_generation_prompt=True) if chat[1:] else ""


def token_ids(tokenizer, text, max_length, *, is_target=False, **options):
    """Return the tokens, at most ``max_length``, and whether there were more."""
    texts = {"text_target" if is_target else "text": text}
    ids = tokenizer(**texts, truncation=True, max_length=max_length, **options).input_ids
    is_cut = len(ids) >= max_length and len(tokenizer(**texts, verbose=False, **options).input_ids) > max_length
    return ids, is_cut


def ended(ids, tokenizer, max_length):
    """Append the end token, unless the tokenizer did, has none or the text was truncated."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] or len(ids) >= max_length else [*ids, end]


def causal_example(ids, is_target, max_length):
    """Mask and truncate; the first token is never a target, because nothing before it predicts it."""
    labels = [token if target and i else MASKED for i, (token, target) in enumerate(zip(ids, is_target, strict=True))]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length], "truncated": len(ids) > max_length}


def make_collator(recipe: RecipeArguments, tokenizer: Tokenizer, model: Any) -> Any:
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
