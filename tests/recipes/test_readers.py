"""Files of rows: one type per column however late it changes, quotes and separators, and invalid values."""

import json

import pytest

from _shared.data import load_texts
from _shared.errors import UserError
from _shared.files import load_texts_of
from _shared.lines import ROW
from _shared.rows import class_of
from tests.recipes.conftest import json_lines

FILLER = "x" * 1_000_000
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def load(path, split="train", **wanted):
    wanted = wanted or {"text_column": "text"}
    return load_texts_of(str(path), split, wanted=wanted, config_name=None, cache_dir=str(path.parent / "cache")).rows


def write(path, content, encoding="utf-8"):
    path.write_text(content, encoding=encoding, newline="")
    return path


@pytest.mark.parametrize("late", [5, True, [1], {"a": 1}, "5", "[1]", '"pos"', "null", None])
def test_a_type_that_changes_after_megabytes_stays_what_it_is(late, tmp_path):
    rows = [{"text": FILLER, "note": None}] * 12 + [{"text": late, "note": late, "new": 1}]  # datasets reads 10 MB each
    json_lines(tmp_path / "my.jsonl", rows)
    assert load(tmp_path / "my.jsonl")["text"][:] == [row["text"] for row in rows]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_classes_of_two_files_are_names_and_not_json(names, tmp_path):
    for name, labels in zip(names, (["pos", "neg"], [0, 1]), strict=True):
        json_lines(tmp_path / f"{name}.jsonl", [{"text": "one", "label": label} for label in labels])
    rows = load(tmp_path, text_column="text", label_column="label")
    assert sorted(map(class_of, rows["label"][:])) == ["0", "1", "neg", "pos"]


def test_keys_that_come_late_or_in_one_file_only_do_not_matter(tmp_path):
    calls = [{"id": 1, "function": {"name": "add", "arguments": {"a": 1}}}]
    late = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "three"}], "tool_calls": calls}]
    json_lines(tmp_path / "a.jsonl", [{"messages": CHAT, "id": None}] * 3)
    json_lines(tmp_path / "b.jsonl", [{"messages": late, "tools": [{"name": "add"}], "id": {"more": 1}}])
    rows = load(tmp_path, messages_column="messages", tools="tools")
    assert rows[3] == {"messages": late, "tools": [{"name": "add"}], ROW: 4}
    assert rows[0] == {"messages": CHAT, "tools": None, ROW: 1}


def test_cells_are_what_is_written_and_other_columns_do_not_matter(tmp_path):
    cells = ["00", "01", *["1"] * 12_000, "1.0", "x", "NA", "None", "null", "nan", "N/A", ""]
    notes = ["", "5", *["7"] * 12_000, "2.5", "unknown", *[""] * 6]
    lines = [f"a text,{cell},{note}\r\n" for cell, note in zip(cells, notes, strict=True)]
    rows = load(write(tmp_path / "my.csv", "text,label,note\r\n" + "".join(lines)), label_column="label")
    assert rows["label"][:] == [*cells[:-1], None]
    assert rows.column_names == ["label", ROW]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolon.csv", "text;label\none, two;0\nthree;1\n"),
        ("tab.csv", "text\tlabel\none, two\t0\nthree\t1\n"),
        ("comma.tsv", 'text,label\n"one, two",0\nthree,1\n'),
        ("quoted.tsv", 'text\tlabel\n"one, two"\t0\n"three"\t1\n'),
        ("short.csv", 'n,text,label\n1,"one, two"\n2,three,1\n'),
        ("trailing.csv", 'text,label\n"one, two",0,\nthree,1,\n'),
        ("mac.csv", 'text,label\r"one, two",0\rthree,1\r'),
        ("mark.csv", '\ufefftext,label\n"one, two",0\n\nthree,1\n'),
        ("columns.json", '{"text": ["one, two", "three"], "label": [0, 1]}'),
        ("one_object.json", '{\n"text": ["one, two", "three"]\n}'),
    ],
)
def test_what_is_meant_plainly_is_read(name, content, tmp_path):
    assert load(write(tmp_path / name, content))["text"][:] == ["one, two", "three"]


@pytest.mark.parametrize(
    "texts",
    [
        ['"one" he said', 'a 5" pipe'],
        ['"never closed', "two", "three"],
        ['"opened', 'and closed"', "three"],
        ['"whole"', '"never closed'],
    ],
)
def test_quotes_in_a_tsv_swallow_no_rows(texts, tmp_path):
    content = "text\tlabel\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(texts))
    assert load(write(tmp_path / "my.tsv", content))["text"][:] == texts


GOOD = "a text,0\n" * 3
BAD = {
    "comma.csv": ("text,label\n" + GOOD + "a text, more,1\n", "line 5 has 3 fields and the header has 2; a text with"),
    "every.csv": ("text,label\n" + "a, b,0\n" * 3, "line 2 has 3 fields and the header has 2"),
    "open.csv": ("text,label\n" + GOOD + '"never closed,1\n' + GOOD, "line 5: its quotes do not match"),
    "inner.csv": ("text,label\n" + GOOD + '"one" and two,1\n', "line 5: its quotes do not match"),
    "numbers.csv": ("text,label\n,0\n3,0\n4.5,1\n", "row 2, column 'text': the number 3; expected text"),
    "twice.csv": ("text,text\na,b\n", "two columns have the name 'text'; rename one"),
    "blank.csv": ("\n\n", "blank.csv: it has no rows"),
    "null.jsonl": ("null\n" * 3, "line 1: null; expected an object"),
    "null_row.json": ('[{"text": "a"}, null]', "row 2: null; expected an object"),
    "surrogate.jsonl": ('{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: half of a pair of surrogates"),
    "deep.jsonl": ('{"text": ' + "[" * 100_000 + "\n", "line 1: maximum recursion depth"),
    "book.xlsx": ("PK\x03\x04\x14\n", "book.xlsx: line 1: not JSON"),
    "nothing": ("some notes\n", "files that are read end in .jsonl, .json, .ndjson, .csv, .tsv, .parquet"),
    "many.csv": (
        ",".join(f"c{i}" for i in range(99)) + "\n1,2\n",
        "it has c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, … (",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_named(name, tmp_path, capfd):
    content, message = BAD[name]
    with pytest.raises(UserError) as error:
        load(write(tmp_path / name, content))
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_fractions_are_no_classes_in_csv_either(tmp_path):
    write(tmp_path / "my.csv", "text,label\na,0\nb,0.5\nc,1\n")
    with pytest.raises(UserError, match=r"my.csv, row 2, column 'label': the number 0.5; expected one class"):
        load(tmp_path / "my.csv", label_column="label")


@pytest.mark.parametrize(
    ("names", "train", "other"),
    [
        (["Train.CSV", "Test.CSV"], ["Train.CSV"], ("test", ["Test.CSV"])),
        (["data.csv", "my_test.csv"], ["data.csv"], ("test", ["my_test.csv"])),
        (["train.csv", "dev.csv", "sample_submission.csv"], ["train.csv"], ("validation", ["dev.csv"])),
        (
            ["train/0.csv", "train/1.csv", "valid/0.csv"],
            ["train/0.csv", "train/1.csv"],
            ("validation", ["valid/0.csv"]),
        ),
        (["latest.csv", ".hidden.csv", "README.md", "notes.txt"], ["latest.csv"], None),
    ],
)
def test_the_files_of_a_split_are_found_by_their_names(names, train, other, tmp_path):
    folder = tmp_path / "data"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, f"text\n{name}\n")
    assert load(folder)["text"][:] == train
    if other:
        assert load(folder, other[0])["text"][:] == other[1]


@pytest.mark.parametrize("name", ["README.md", "a.pdf", ""])
def test_a_folder_without_data_says_what_is_read(name, tmp_path):
    if name:
        write(tmp_path / name, "---\nlicense: mit\n---\n")
    with pytest.raises(UserError, match=r"has no file that is read; those end in .jsonl, .json"):
        load(tmp_path)


def test_a_part_of_a_split_keeps_the_numbers_of_its_rows(tmp_path):
    json_lines(tmp_path / "my.jsonl", [{"text": str(i)} for i in range(1, 12)])
    for split, numbers in {"train[50%:]": range(7, 12), "train[:2]": [1, 2], "train[-1:]": [11]}.items():
        rows = load(tmp_path / "my.jsonl", split)
        assert rows[ROW][:] == list(map(int, rows["text"][:])) == list(numbers)


def test_an_edit_of_the_file_is_read_again(tmp_path, recipe):
    for texts in (["one", "two"], ["one", "six"]):
        (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train, held_out = load_texts(recipe(dataset_name=str(tmp_path / "my.jsonl")))
        assert {*train.rows["text"][:], *held_out.rows["text"][:]} == {*texts}
