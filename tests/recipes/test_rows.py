"""The forms of a row's values: what is meant plainly is understood, everything else is named."""

import json
import math
import pickle

import pytest

from _shared.files import Source
from _shared.rows import BadValueError, chat_of, class_of, describe, text_of, tools_of, until_last_answer
from tests.recipes.conftest import ANSWER, QUESTION

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 1}}}
TURNS = [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("value", "text"), [("plain", "plain"), (" kept ", " kept "), (None, ""), ("", ""), (" \n\t", "")]
)
def test_a_text_is_kept_and_blanks_are_no_text(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "the number 3"),
        (0.5, "the number 0.5"),
        (True, "the bool True"),
        (["a", "b"], "a list of 2 texts"),
        ({"text": "a"}, "an object with the keys 'text'"),
        ([QUESTION], "a list of 1 objects"),
        (b"a", "a value of type bytes"),
    ],
)
def test_what_is_no_text_is_described(value, what):
    with pytest.raises(BadValueError) as error:
        text_of(value)
    assert error.value.what == what
    assert error.value.expected.startswith("text")


@pytest.mark.parametrize(
    "value",
    [
        TURNS,
        [{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": "four"}],
        [{"role": "Human", "content": QUESTION["content"]}, {"role": "bot", "content": "four"}],
        [{**QUESTION, "from": None, "value": None}, {**ANSWER, "tool_calls": None}],
        [
            {**QUESTION, "content": [{"type": "text", "text": "What follows "}, {"type": "text", "text": "three?"}]},
            ANSWER,
        ],
        [{**QUESTION, "content": ["What follows ", "three?"]}, ANSWER],
        [{**QUESTION, "content": [{"type": "text", "text": QUESTION["content"], "image_url": None}]}, ANSWER],
        json.dumps(TURNS),
        json.dumps([{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": "four"}]),
        {"role": ["user", "assistant"], "content": [QUESTION["content"], "four"]},
    ],
    ids=["plain", "from", "other names", "filled in", "parts", "texts", "part filled in", "JSON", "both", "columns"],
)
def test_a_chat_in_any_plain_form_is_the_same_chat(value):
    assert chat_of(value) == TURNS


@pytest.mark.parametrize("value", [None, [], "", "  ", "[]", "null"])
def test_no_chat_is_an_empty_one(value):
    assert chat_of(value) == []


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_other_roles_stay(role):
    assert chat_of([{"role": role, "content": "x"}])[0]["role"] == role
    assert chat_of([{"from": "observation", "value": "x"}])[0]["role"] == "tool"


def test_an_answer_without_content_may_be_a_call():
    filled = {**CALL, "index": None, "function": {**CALL["function"], "arguments": {"a": 3, "b": 1, "c": None}}}
    for calls in ([CALL], [filled], json.dumps([CALL])):
        chat = chat_of([QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}])
        assert chat[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert until_last_answer(chat) == chat
    assert chat_of([{"role": "tool", "content": "4", "tool_call_id": "1"}])[0]["tool_call_id"] == "1"


@pytest.mark.parametrize(
    ("chat", "num_turns"),
    [
        ([QUESTION], 0),
        ([QUESTION, ANSWER, QUESTION], 2),
        ([QUESTION, {"role": "assistant", "content": None}], 0),
        ([QUESTION, ANSWER, {"role": "assistant", "content": " "}], 2),
        ([QUESTION, {"role": "assistant", "content": "", "tool_calls": []}], 0),
    ],
)
def test_what_comes_after_the_last_answer_is_left_out(chat, num_turns):
    assert len(until_last_answer(chat_of(chat))) == num_turns


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1, 2, 3], "a list of 3 numbers"),
        (5, "the number 5"),
        ("not JSON", "the text 'not JSON'"),
        ('{"role": "user"}', "an object with the keys 'role'"),
        (["hello"], "a list of 1 texts"),
        ([QUESTION, None], "a list of 2 values"),
        ({"role": ["user"], "content": []}, "an object with the keys 'role', 'content'"),
        ([QUESTION, {"speaker": "a", "text": "b"}], "turn 2 is an object with the keys 'speaker', 'text'"),
        ([{"content": "b"}], "turn 1 is an object with the keys 'content'"),
        ([{"role": 1, "content": "b"}], "turn 1 is an object with the keys 'role', 'content'"),
        ([{"role": "user", "content": 4}], "turn 1 with the content the number 4"),
        ([{"role": "user", "content": {"a": 1}}], "turn 1 with the content an object with the keys 'a'"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "turn 1 with a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "turn 1 with a part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "turn 1 with the part an object"),
        ([{"role": "user", "content": [3]}], "turn 1 with the part the number 3"),
    ],
)
def test_what_is_no_chat_is_described(value, what):
    with pytest.raises(BadValueError) as error:
        chat_of(value)
    assert error.value.what.startswith(what)


@pytest.mark.parametrize(
    ("value", "names", "name"),
    [
        ("spam", None, "spam"),
        (" spam", None, "spam"),
        (3, None, "3"),
        (3.0, None, "3"),
        (True, None, "True"),
        (1, ["ham", "spam"], "spam"),
        (-1, ["ham", "spam"], ""),
        (None, None, ""),
        (None, ["ham"], ""),
        ("", None, ""),
        (math.nan, None, ""),
    ],
)
def test_a_class_is_a_name_an_integer_or_a_bool(value, names, name):
    assert class_of(value, names) == name


@pytest.mark.parametrize("value", [[1], ["a", "b"], [], {"a": 1}, 0.5, math.inf])
def test_what_is_no_class_is_described(value):
    with pytest.raises(BadValueError) as error:
        class_of(value)
    assert error.value.what == describe(value)


def test_tools_are_a_list_or_json_of_one():
    assert tools_of([CALL]) == tools_of(json.dumps([CALL])) == [CALL]
    assert tools_of(None) is tools_of([]) is tools_of("") is None
    for bad in ("{", '{"a": 1}', {"a": 1}):
        with pytest.raises(BadValueError):
            tools_of(bad)


def test_the_line_names_file_row_column_what_and_what_was_expected():
    error = pickle.loads(pickle.dumps(BadValueError("a list of 3 numbers", "text").at("body", 1717)))
    assert str(error.to_user_error(Source(name="my.jsonl"))) == (
        "my.jsonl, row 1,717, column 'body': a list of 3 numbers; expected text"
    )


def test_a_class_outside_of_the_names_is_named():
    with pytest.raises(BadValueError) as raised:
        class_of(5, ["no", "yes"])
    assert (raised.value.what, raised.value.expected) == ("the number 5", "a class from 0 to 1")


def test_a_null_that_the_user_wrote_stays():
    written = json.dumps([{"name": "f", "parameters": {"default": None}}])
    assert tools_of(written) == [{"name": "f", "parameters": {"default": None}}]
    assert tools_of([{"name": "f", "parameters": {"default": None}}]) == [{"name": "f", "parameters": {}}]
