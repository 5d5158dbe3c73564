"""Rows become tokens and labels; dropped and truncated rows are counted, invalid values named."""

import copy

import datasets
import pytest
from tokenizers import processors

from _shared.classes import find_classes
from _shared.counts import row_lines
from _shared.data import hold_out, load_texts
from _shared.errors import UserError
from _shared.rows import BadValueError
from _shared.tokenization import encode_row, encode_text, tokenize
from tests.recipes.conftest import ANSWER, QUESTION, json_lines, prepared, texts_of

LAST_ANSWER = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LAST_ANSWER += "{% if add_generation_prompt %}assistant: {% endif %}"
CHAT = [QUESTION, ANSWER]
LONG = "one two three " * 30


@pytest.mark.parametrize("bad", ["", None, " \n"])
@pytest.mark.parametrize(
    ("own", "other"),
    [({}, {}), ({"prompt_column": "prompt"}, {"prompt": ""}), ({"prompt_column": "prompt"}, {"prompt": None})],
)
def test_empty_texts_are_dropped_and_named(bad, own, other, tokenizer, recipe):
    rows, counts = prepared(tokenizer, recipe(**own), [{"text": text, **other} for text in ("two", bad, "three")])
    assert len(rows) == 2
    assert counts.dropped == {"empty": [2]}
    assert rows.column_names == ["input_ids", "labels"]


def test_a_text_without_a_prompt_is_trained_and_a_seq2seq_row_without_one_is_not(tokenizer, recipe):
    rows = [{"text": "two", "prompt": prompt} for prompt in ("one", None, "")]
    _, counts = prepared(tokenizer, recipe(prompt_column="prompt"), rows)
    assert counts.dropped == {}
    _, counts = prepared(tokenizer, recipe(prompt_column="prompt", task="seq2seq"), rows)
    assert counts.dropped == {"without a prompt": [2, 3]}


@pytest.mark.parametrize("prompt", ["one", ""])
def test_a_tokenizer_that_ends_every_text_ends_none_between_prompt_and_text(prompt, tokenizer, recipe):
    ending = copy.deepcopy(tokenizer)
    ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    ending.backend_tokenizer.post_processor = ends
    rows = [{"text": "two", "prompt": prompt}]
    kept = [prepared(t, recipe(prompt_column="prompt"), rows)[0][0] for t in (tokenizer, ending)]
    assert kept[0] == kept[1]
    assert kept[1]["input_ids"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_cut_rows_are_counted_and_those_without_a_target_dropped(task, tokenizer, recipe):
    rows = [{"prompt": "one", "text": LONG}, {"prompt": LONG, "text": "two"}, {"prompt": "one", "text": "two"}]
    _, counts = prepared(tokenizer, recipe(prompt_column="prompt", task=task), rows)
    lost = {"without a target left after 24 tokens": [2]} if task == "causal-lm" else {}
    assert counts.dropped == lost
    assert counts.num_truncated == (1 if lost else 2)
    assert max(counts.num_targets) <= 24


def test_a_first_batch_of_dropped_rows_fixes_no_type(tokenizer, recipe):
    rows = [{"text": None}] * 1100 + [{"text": "two"}]
    kept, counts = prepared(tokenizer, recipe(), rows)
    assert (len(kept), len(counts.dropped["empty"])) == (1, 1100)


@pytest.mark.parametrize("template", [None, LAST_ANSWER])
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_chats_in_any_form_give_the_same_tokens(template, task, tokenizer, recipe, monkeypatch):
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    forms = [CHAT, parts, [{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": "four"}]]
    rows = []
    for form in forms:
        kept, counts = prepared(tokenizer, recipe(messages_column="chat", task=task, max_length=90), [{"chat": form}])
        rows.append(kept[0])
        assert tokenizer.decode([label for label in kept[0]["labels"] if label >= 0]).startswith("four")
        assert counts.dropped == {}
    assert rows[0] == rows[1] == rows[2]


def test_chats_without_an_answer_are_dropped_by_reason(tokenizer, recipe):
    chats = [CHAT, None, [], [QUESTION], [QUESTION, {"role": "assistant", "content": None}], [ANSWER], CHAT]
    _, counts = prepared(tokenizer, recipe(messages_column="chat", max_length=90), [{"chat": chat} for chat in chats])
    assert counts.dropped == {"empty": [2, 3], "without an answer": [4, 5]}


def test_calls_are_targets(tokenizer, recipe):
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}]
    rows = [{"chat": [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": None}]
    kept, _ = prepared(tokenizer, recipe(messages_column="chat", max_length=200), rows)
    targets = tokenizer.decode([label for label in kept[0]["labels"] if label >= 0])
    assert '"name": "add"' in targets
    assert targets.endswith("<eos>")


def test_a_chat_that_the_template_refuses_is_named(tokenizer, recipe, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"row 1, column 'chat': the chat template refuses it .*roles must alternate"):
        prepared(tokenizer, recipe(messages_column="chat"), [{"chat": CHAT}] * 2)


CLASSES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])})


@pytest.mark.parametrize(
    ("labels", "features", "classes", "dropped"),
    [
        (["a", "a", "b"], None, ["a", "b"], {}),
        ([7, 7, 2], None, ["7", "2"], {}),
        ([True, True, False], None, ["True", "False"], {}),
        ([1.0, None, 0.0], None, ["0", "1"], {"without a class": [2]}),
        ([None, "a", "b", ""], None, ["a", "b"], {"without a class": [1, 4]}),
        ([1, 1, 0, -1], CLASSES, ["ham", "spam"], {"without a class": [4]}),
    ],
    ids=["names", "integers", "bools", "floats of a gap", "nulls", "ClassLabel"],
)
def test_classes_are_names_integers_or_bools(labels, features, classes, dropped, tokenizer, recipe):
    arguments = recipe(task="sequence-classification")
    texts = texts_of([{"text": "one", "label": label} for label in labels], features)
    assert find_classes(arguments, texts) == classes
    rows, counts = tokenize(texts, arguments, tokenizer, classes)
    assert counts.dropped == dropped
    assert set(rows["labels"][:]) == {0, 1}


def test_classes_held_out_go_by_name_in_whatever_order(tokenizer, recipe):
    arguments = recipe(task="sequence-classification")
    other = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])})
    train = texts_of([{"text": "one", "label": label} for label in (1, 1, 0)], CLASSES)
    classes = find_classes(arguments, train)
    held_out, _ = tokenize(texts_of([{"text": "one", "label": 0}], other), arguments, tokenizer, classes)
    assert (classes, held_out["labels"][:]) == (["ham", "spam"], [1])


def test_other_classes_are_dropped(tokenizer, recipe):
    rows = [{"text": "one", "label": label} for label in "aabbc"]
    _, counts = prepared(tokenizer, recipe(task="sequence-classification", max_labels=2), rows)
    assert counts.dropped == {"of a class outside the 2 trained": [5]}


@pytest.mark.parametrize(
    ("rows", "own", "message"),
    [
        ([{"text": 1}, {"text": 2}], {}, "row 1, column 'text': the number 1; expected text"),
        ([{"text": ["a"]}], {}, "row 1, column 'text': a list of 1 texts; expected text"),
        ([{"text": "a", "q": 1.5}], {"prompt_column": "q"}, "row 1, column 'q': the number 1.5; expected text"),
        ([{"chat": [1, 2]}], {"messages_column": "chat"}, "row 1, column 'chat': a list of 2 numbers; expected turns"),
        ([{"chat": "hi"}], {"messages_column": "chat"}, "row 1, column 'chat': the text 'hi'; expected turns"),
        ([{"label": [0]}], {}, "row 1, column 'label': a list of 1 numbers; expected one class"),
        ([{"label": [0, 1]}, {"label": [1]}], {}, "row 1, column 'label': a list of 2 numbers; expected one class"),
        ([{"label": 0.0}, {"label": 0.5}], {}, "row 2, column 'label': the number 0.5; expected one class"),
        ([{"label": "a"}] * 3, {}, "a classifier needs two classes or more, the 3 training rows have only 'a'"),
        ([{"label": None}] * 3, {}, "the 3 training rows have none"),
        ([{"text": ""}, {"text": None}], {}, r"none of the 2 training rows has a target left: 2 empty \(rows 1, 2\)"),
    ],
)
def test_what_cannot_be_meant_is_one_line(rows, own, message, tokenizer, recipe):
    if "label" in rows[0]:
        own, rows = {"task": "sequence-classification"}, [{"text": "one", **row} for row in rows]
    with pytest.raises(UserError, match=message) as error:
        prepared(tokenizer, recipe(**own), rows)
    assert "\n" not in str(error.value)


def test_the_row_is_the_one_in_the_file_however_rows_were_shuffled_and_mixed(tokenizer, recipe, tmp_path):
    rows = [{"text": f"number {i}"} for i in range(50)]
    rows[30] = {"text": [1]}
    data = json_lines(tmp_path / "my.jsonl", rows)
    arguments = recipe(dataset_name=data, max_examples=47)
    train, _ = load_texts(arguments)
    with pytest.raises(UserError, match=r"my.jsonl, row 31, column 'text': a list of 1 numbers; expected text"):
        tokenize(train, arguments, tokenizer, [])


def test_bytes_that_are_no_text_are_found(tokenizer, recipe, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(('{"text": "plain"}\n' * 3 + '{"text": "é"}\n').encode("latin-1"))
    arguments = recipe(dataset_name=str(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match=r"latin.jsonl: line 4: byte 0xe9 is not UTF-8"):
        load_texts(arguments)


def test_counts_come_from_the_cache_too(tokenizer, recipe, tmp_path, monkeypatch):
    data = json_lines(tmp_path / "my.jsonl", [{"text": text} for text in ("", LONG, "two", "three")] * 20)
    arguments = recipe(dataset_name=data)
    parts = [tokenize(part, arguments, tokenizer, []) for part in load_texts(arguments)]

    def refuse(*args, **kwargs):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr("_shared.tokenization.encode_text", refuse)
    refuse.__name__ = "encode_text"
    again = [tokenize(part, arguments, tokenizer, []) for part in load_texts(arguments)]
    assert [counts for _, counts in parts] == [counts for _, counts in again]
    assert sum(counts.num_truncated for _, counts in again) == 20


def test_workers_say_the_same(tokenizer, recipe):
    texts = texts_of([{"text": "one"}, {"text": 2}] * 2, datasets.Features({"text": datasets.Json()}))
    options = {"tokenizer": tokenizer, "max_length": 9, "text": "text", "prompt": None}
    with pytest.raises(BadValueError) as error:
        texts.rows.map(encode_row, fn_kwargs={"encode": encode_text, "options": options}, num_proc=2)
    assert (error.value.row, error.value.what) == (2, "the number 2")


@pytest.mark.parametrize("num_rows", [2, 3, 21, 40])
@pytest.mark.parametrize("empty", [0, 1, -1])
def test_a_few_rows_held_out_are_not_the_empty_ones(num_rows, empty, tokenizer, recipe):
    rows = [{"text": "one"}] * num_rows
    rows[empty] = {"text": None}
    _, held_out = hold_out(texts_of(rows), ["text"])
    assert None not in held_out.rows["text"][:]
    assert len(held_out.rows) == -(-num_rows // 20)


def test_the_lines_tell_what_became_of_the_rows(tokenizer, recipe):
    rows = [{"text": text} for text in ("", "one", LONG, None, *["two"] * 36)]
    parts = [tokenize(part, recipe(), tokenizer, []) for part in hold_out(texts_of(rows), ["text"])]
    lines = row_lines(*(counts for _, counts in parts))
    assert lines[0] == "my.jsonl: dropped 2 of 40 rows: 2 empty (rows 1, 4); 36 to train on, 2 held out"
    assert lines[1].startswith("targets per row: ")
    assert lines[1].endswith("; 1 row truncated to 24 tokens")
