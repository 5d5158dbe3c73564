"""Every kind of file loads; what cannot be read is one line with the file, the place in it and the reason."""

import bz2
import codecs
import gzip
import json
import lzma
import shutil

import datasets
import pytest

from _shared.arguments import RecipeArguments
from _shared.data import load_parts, load_texts
from _shared.errors import UserError
from _shared.files import load_texts_of
from _shared.lines import ROW
from tests.recipes.conftest import json_lines

ROWS = [{"text": f"number {i}", "n": i} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same six rows in every kind of file."""
    folder = tmp_path_factory.mktemp("files")
    rows = datasets.Dataset.from_list(ROWS)
    (folder / "rows.jsonl").write_text(LINES)
    (folder / "r[1]*? ü.jsonl").write_text(LINES)
    (folder / "ROWS.JSONL").write_text(LINES)
    (folder / "no_ending").write_text(LINES)
    (folder / "mark.jsonl").write_text(LINES, encoding="utf-8-sig")
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "rows.txt").write_text("".join(row["text"] + "\n" for row in ROWS))
    for ending, module in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        (folder / f"rows.jsonl.{ending}").write_bytes(module.compress(LINES.encode()))
    (folder / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    rows.to_csv(folder / "rows.csv", index=False)
    rows.to_csv(folder / "rows.tsv", index=False, sep="\t")
    (folder / "rows.csv.gz").write_bytes(gzip.compress((folder / "rows.csv").read_bytes()))
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=rows, test=rows.take(2)).save_to_disk(folder / "saved_splits")
    for kind in ("csv", "parquet", "jsonl"):
        (folder / f"of_{kind}").mkdir()
        for part in ("one", "two"):
            shutil.copy(folder / f"rows.{kind}", folder / f"of_{kind}" / f"{part}.{kind}")
    for name in ("splits", "kaggle"):
        (folder / name).mkdir()
        shutil.copy(folder / "rows.csv", folder / name / "train.csv")
    (folder / "splits" / "validation.csv").write_text("text,n\nheld out,1\nheld out,2\n")
    (folder / "kaggle" / "test.csv").write_text("id,body\n1,without an answer\n")
    return folder


def load(path, split="train", **wanted):
    wanted = wanted or {"text_column": "text"}
    return load_texts_of(str(path), split, wanted=wanted, config_name=None, cache_dir=str(path.parent / "cache"))


FILES = [
    "rows.jsonl",
    "r[1]*? ü.jsonl",
    "ROWS.JSONL",
    "no_ending",
    "mark.jsonl",
    "rows.json",
    "rows.txt",
    "rows.jsonl.gz",
]
FILES += ["rows.jsonl.bz2", "rows.jsonl.xz", "rows.json.gz", "rows.csv", "rows.tsv", "rows.csv.gz", "rows.parquet"]
FILES += ["saved", "saved_splits", "splits", "kaggle"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_or_folder_loads_with_its_rows_numbered(name, folder):
    rows = load(folder / name).rows
    assert rows["text"][:] == [row["text"] for row in ROWS]
    assert rows[ROW][:] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_folder_of_files_is_one_set_whose_rows_are_found_again(kind, folder):
    texts = load(folder / f"of_{kind}")
    assert len(texts.rows) == 12
    assert texts.source.place_of(3) == f"{folder}/of_{kind}/one.{kind}, row 3"
    assert texts.source.place_of(7) == f"{folder}/of_{kind}/two.{kind}, row 1"


@pytest.mark.parametrize("options", [{"type": "torch"}, {"type": "numpy"}, {"columns": ["n"]}])
def test_a_format_that_rows_were_saved_with_does_not_matter(options, tmp_path):
    datasets.Dataset.from_list(ROWS).with_format(**options).save_to_disk(tmp_path / "saved")
    rows = load(tmp_path / "saved", text_column="text", label_column="n")
    assert rows.rows[0] == {**ROWS[0], ROW: 1}


def test_saved_rows_of_which_there_are_none_are_said(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="saved has no rows; it needs rows to train on"):
        load(tmp_path / "saved")


def test_files_that_do_not_share_their_other_columns_are_one_set(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, own in (("a", {"n": [1]}), ("b", {"n": ["one"], "more": [2]})):
        datasets.Dataset.from_dict({"text": [name], **own}).to_parquet(folder / f"{name}.parquet")
    assert load(folder).rows["text"][:] == ["a", "b"]


def test_splits_of_folders_can_be_held_out(folder):
    assert load(folder / "splits", "validation").rows["text"][:] == ["held out", "held out"]
    assert len(load(folder / "saved_splits", "test").rows) == 2
    assert len(load(folder / "splits", "train[:50%]").rows) == 3


LATIN = "text,n\nplain,1\ncafé,2\n".encode("latin-1")
BAD = {
    "cut.jsonl": ((LINES + '{"text": "x",\n' + LINES).encode(), "line 7: not JSON: "),
    "list.jsonl": ((LINES + "[1, 2]\n").encode(), "line 7: list [1, 2]; expected an object"),
    "numbers.jsonl": (b"1\n2\n", "line 1: int 1; expected an object"),
    "array.json": (b'[{"text": "a"},\n {"text": }]', "line 2: Expecting value"),
    "html.jsonl": (b"<html>\n</html>", "line 1: not JSON: Expecting value, at character 1 of '<html>'"),
    "utf16.jsonl": (LINES.encode("utf-16"), "it is UTF-16; expected UTF-8"),
    "utf16.csv": ("text,n\na,1\n".encode("utf-16"), "it is UTF-16; expected UTF-8"),
    "big_endian.csv": (codecs.BOM_UTF16_BE + "text\na\n".encode("utf-16-be"), "it is UTF-16; expected UTF-8"),
    "latin.csv": (LATIN, "line 3: byte 0xe9 is not UTF-8"),
    "more.csv": (b"text,n\na,1\nb,2,3,4\n", "line 3 has 4 fields and the header has 2"),
    "header.csv": (b"text,n\n", "it has no rows"),
    "not.parquet": (b"PAR1 no parquet", "Parquet magic bytes not found in footer"),
    "empty.parquet": (b"", "is empty"),
    "empty.jsonl": (b"", "is empty; it needs rows"),
    "blank.jsonl": (b"\n\n", "it has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "it has no rows"),
    "not.zip": (b"PK\x05\x06", "not.zip"),
    "not.jsonl.gz": (LINES.encode(), "Not a gzipped file"),
    "half.jsonl.gz": (gzip.compress(LINES.encode())[:40], "Compressed file ended before the end-of-stream marker"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_place_and_reason(name, tmp_path, capfd):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / name)
    assert reason in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert "An error occurred" not in str(error.value)
    assert "Failed to" not in "".join(capfd.readouterr()), "the log of datasets"


def test_the_bad_file_of_a_folder_is_named(folder, tmp_path):
    shutil.copy(folder / "rows.jsonl", tmp_path / "good.jsonl")
    (tmp_path / "worse.jsonl").write_bytes(BAD["cut.jsonl"][0])
    with pytest.raises(UserError, match=r"worse.jsonl: line 7: not JSON"):
        load(tmp_path)


def test_files_that_do_not_fit_together_are_refused(folder, tmp_path):
    for name, text in (("a.csv", "text,n\na,1\n"), ("b.csv", "body,n\na,1\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"has no column 'text'; it has body, n .*b.csv"):
        load(tmp_path)
    shutil.copy(folder / "rows.jsonl", tmp_path / "c.jsonl")
    with pytest.raises(UserError, match=r"mixes csv and json files \(c.jsonl\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("gone.csv", "train", "there is no file or folder"),
        ("rows.csv", "test", "is one file, so its only split is 'train'; got 'test'"),
        ("splits", "test", "has no split 'test'; it has train, validation"),
        ("saved_splits", "dev", "has no split 'dev'; it has train, test"),
        ("saved", "test", "has no split 'test'; it has train"),
    ],
)
def test_what_is_not_there_is_said(name, split, message, folder):
    with pytest.raises(UserError, match=message):
        load(folder / name, split)


@pytest.mark.parametrize(
    ("rows", "own", "message"),
    [
        (ROWS[:1], {}, "has one row; it needs rows to train on and rows to hold out"),
        (ROWS, {"text_column": "txt"}, "has no column 'txt'; it has text, n .*did you mean 'text'. --text_column"),
        (ROWS, {"prompt_column": "q"}, "has no column 'q'; .*--prompt_column names the column"),
        (ROWS, {"messages_column": "chat"}, "has no column 'chat'; .*--messages_column names the column"),
        (ROWS, {"validation_file": "other.jsonl"}, "has no column 'text'; it has body .*other.jsonl"),
        (ROWS, {"validation_file": "empty.jsonl"}, "empty.jsonl is empty"),
        (ROWS, {"validation_file": "same.jsonl", "eval_split": "test"}, "give one"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_one_line(rows, own, message, tmp_path):
    json_lines(tmp_path / "other.jsonl", [{"body": "b"}])
    json_lines(tmp_path / "empty.jsonl", [])
    if "validation_file" in own:
        own = {**own, "validation_file": str(tmp_path / own["validation_file"])}
    data = json_lines(tmp_path / "my.jsonl", rows)
    with pytest.raises(UserError, match=message):
        load_texts(RecipeArguments(dataset_name=data, cache_dir=str(tmp_path / "cache"), **own))


def test_a_validation_file_is_held_out(tmp_path):
    data = json_lines(tmp_path / "my.jsonl", ROWS)
    (tmp_path / "held_out.csv").write_text("text,more\nheld out,1\n")
    own = {"validation_file": str(tmp_path / "held_out.csv"), "cache_dir": str(tmp_path / "cache")}
    train, held_out = load_texts(RecipeArguments(dataset_name=data, **own))
    assert (len(train.rows), held_out.rows["text"][:]) == (6, ["held out"])


def test_a_column_that_the_default_rows_lack_is_named(recipe, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    with pytest.raises(
        UserError, match=r"has no column 'docstring'; it has text, n \(Python's docstrings; .*--text_col"
    ):
        load_parts(recipe(dataset_name=None), lambda cache_dir: (rows, rows), ["text_column"])
