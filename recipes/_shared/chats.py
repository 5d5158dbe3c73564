"""Chats up to their last answer, as trl and the chat templates take them."""

from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from _shared.counts import EMPTY, UNANSWERED, Counts, plural, reasons, without_targets
from _shared.errors import UserError, one_line
from _shared.files import Texts, cache_key
from _shared.lines import ROW
from _shared.rows import BadValueError, Chat, chat_of, read, tools_of, until_last_answer, user_errors

NUM_SEEN = 1000


def answered_chat(row: dict[str, Any], column: str) -> tuple[Chat, str]:
    """Return a row's turns up to the last answer, or none and why the row is dropped."""
    chat = read(row, column, chat_of)
    return until_last_answer(chat), UNANSWERED if chat else EMPTY


def seen_in(texts: Texts, column: str) -> str:
    """Say which keys and roles the chats have, where none of them has an answer."""
    keys: dict[str, None] = {}
    roles: dict[str, None] = {}
    for row in texts.rows.take(min(NUM_SEEN, len(texts.rows))):
        for turn in chat_of(row[column]):
            keys |= dict.fromkeys(key for key, value in turn.items() if value)
            roles[turn["role"]] = None
    names = " and ".join(
        f"the {what} {', '.join(map(repr, list(seen)[:10]))}" for what, seen in (("keys", keys), ("roles", roles))
    )
    return f"; turns have {names}, an answer has content (or value) and the role 'assistant'" if keys else ""


def render(row, column, chat, tokenizer, **options):
    """Apply the chat template; what it refuses is raised with its row."""
    tools = read(row, "tools", tools_of) if row.get("tools") else None
    try:
        return tokenizer.apply_chat_template(chat, tools=tools, **options)
    except Exception as error:  # templates raise whatever their authors wrote
        what = f"the chat template refuses it ({type(error).__name__}: {one_line(error)})"
        raise BadValueError(what, "a chat as the model's template takes it", column, row[ROW]) from error


def prepare_chats(texts: Texts, column: str, tokenizer: Tokenizer) -> tuple[datasets.Dataset, dict[str, list[int]]]:
    """Bring chats to their form in the column ``messages``, for trl; without those that have no answer.

    Returns:
        The rows, and the numbers of those that were dropped, by reason.
    """
    features = None
    if hasattr(datasets, "Json"):  # a column of records would fill in every key that some turn has, with None
        features = {name: datasets.List(datasets.Json()) for name in ("messages", "tools")}
        features = datasets.Features(features | {ROW: datasets.Value("int64"), "dropped": datasets.Value("string")})
    has_tools = "tools" in texts.rows.column_names
    with user_errors(texts.source):
        chats = texts.rows.map(
            prepare_chat,
            fn_kwargs={"column": column, "has_tools": has_tools, "tokenizer": tokenizer},
            remove_columns=[name for name in texts.rows.column_names if name != ROW],
            features=features,
            new_fingerprint=cache_key(texts.rows, "prepare_chat", column, tokenizer.chat_template),
        )
    dropped: dict[str, list[int]] = {}
    kept = []
    for i, (reason, row) in enumerate(zip(chats["dropped"][:], chats[ROW][:], strict=True)):
        if reason:
            dropped.setdefault(reason, []).append(row)
        else:
            kept.append(i)
    if not kept:
        raise UserError(
            f"{texts.source.name}: none of the {plural(len(chats), f'{texts.part} chat')} has an answer: "
            f"{reasons(dropped)}{seen_in(texts, column)}"
        )
    has_tools = any(tools for tools in chats["tools"])  # templates may take an empty list for tools
    return chats.select(kept).select_columns(["messages", ROW] + ["tools"] * has_tools), dropped


def prepare_chat(row, column, has_tools, tokenizer):
    chat, reason = answered_chat(row, column)
    if chat:
        render(row, column, chat, tokenizer, tokenize=False)  # what the template refuses is found with its row
    tools = read(row, "tools", tools_of) if has_tools else None
    return {"messages": chat, "tools": tools, "dropped": "" if chat else reason}


def count_chats(
    texts: Texts,
    chats: datasets.Dataset,
    dropped: dict[str, list[int]],
    prepared: datasets.Dataset,
    max_length: int | None,
) -> Counts:
    """Count the rows that trl made of chats, and those it dropped because no target is left of them."""
    if ROW in prepared.column_names:  # not if trl packs several chats into a row
        left = set(prepared[ROW][:])
        if cut := [row for row in chats[ROW][:] if row not in left]:
            dropped = dropped | {without_targets(max_length): cut}
    num_targets, num_full = [], 0
    for batch in prepared.select_columns("labels").with_format("numpy").iter(1000):
        for labels in batch["labels"]:
            num_targets.append(int((labels[1:] != -100).sum()))  # nothing predicts the first token
            num_full += len(labels) == max_length  # trl keeps no note of what it has cut
    return Counts(
        source=texts.source,
        num_read=len(texts.rows),
        dropped=dropped,
        num_truncated=num_full,
        num_targets=num_targets,
        max_length=max_length,
        knows_cut=False,
        num_packed=None if ROW in prepared.column_names else len(chats),
    )
