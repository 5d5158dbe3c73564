"""Chats that are not understood, or that a template refuses, are named; tools are there only where a chat has some."""

import datasets
import pytest

from _shared.chats import prepare_chats
from _shared.errors import UserError
from _shared.lines import ROW
from tests.recipes.conftest import ANSWER, QUESTION, prepared, texts_of

CHAT = [QUESTION, ANSWER]
UNKNOWN = {
    "'role', 'text' and the roles 'user', 'assistant'": [{"role": "user", "text": "a"}, {"role": "ai", "text": "b"}],
    "'role', 'content' and the roles 'user', 'claude'": [
        {"from": "human", "value": "a"},
        {"from": "Claude", "value": "b"},
    ],
}


@pytest.mark.parametrize("seen", UNKNOWN)
def test_chats_that_are_not_understood_say_which_keys_and_roles_they_have(seen, tokenizer, recipe):
    rows = [{"chat": UNKNOWN[seen]}] * 2
    with pytest.raises(UserError, match=r"2 without an answer \(rows 1, 2\); turns have the keys " + seen):
        prepared(tokenizer, recipe(messages_column="chat"), rows)
    with pytest.raises(UserError, match=r"2 without an answer \(rows 1, 2\); turns have the keys " + seen):
        prepare_chats(texts_of(rows), "chat", tokenizer)


def test_chats_that_are_understood_get_no_such_hint(tokenizer, recipe):
    with pytest.raises(UserError, match=r"2 without a prompt \(rows 1, 2\); check the columns"):
        prepared(tokenizer, recipe(messages_column="chat", task="seq2seq"), [{"chat": [ANSWER]}] * 2)


def test_a_chat_that_the_template_refuses_is_named_for_trl_too(tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m.content if m.content != 'bad' else raise_exception('no') }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [{"chat": CHAT}, {"chat": [{**QUESTION, "content": "bad"}, ANSWER]}]
    with pytest.raises(UserError, match=r"my.jsonl, row 2, column 'chat': the chat template refuses it .*no\)"):
        prepare_chats(texts_of(rows), "chat", tokenizer)


@pytest.mark.parametrize("tools", [None, [], [{"name": "add"}]])
def test_chats_have_tools_only_where_there_are_some(tools, tokenizer):
    features = datasets.Features({"chat": datasets.Json(), "tools": datasets.Json()})
    chats, _ = prepare_chats(texts_of([{"chat": CHAT, "tools": tools}], features), "chat", tokenizer)
    assert chats[0] == {"messages": CHAT, ROW: 1} | ({"tools": tools} if tools else {})
