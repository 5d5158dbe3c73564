"""The overview printed before training, and the time to go."""

import doctest

import pytest
from transformers import TrainingArguments

import _shared.classes
import _shared.counts
import _shared.overview
import _shared.rows
from _shared.arguments import LoopArguments, RecipeArguments, parse_arguments
from _shared.counts import Counts, row_lines
from _shared.errors import UserError
from _shared.files import Source
from _shared.overview import Pace, class_line, print_overview, sample_line


@pytest.mark.parametrize("module", [_shared.classes, _shared.counts, _shared.overview, _shared.rows])
def test_the_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


def counts(name="my.csv", **own):
    return Counts(**{"source": Source(name=name), "num_read": 2, "dropped": {}, "num_truncated": 0} | own)


def test_both_parts_are_told_together_and_dropped_rows_by_reason():
    train = counts(num_read=4_750, dropped={"empty": [9, 2], "bad": [7]}, num_targets=[1] * 4_747, max_length=9)
    held_out = counts(num_read=250, dropped={"empty": [4, 8]}, num_targets=[3] * 248, max_length=9, num_truncated=2)
    assert row_lines(train, held_out) == [
        "my.csv: dropped 5 of 5,000 rows: 4 empty (rows 2, 4, 8, …), 1 bad (row 7); 4,747 to train on, 248 held out",
        "targets per row: 1 to 3, median 1; 2 rows truncated to 9 tokens",
    ]


def test_nothing_dropped_and_another_file_held_out():
    train = counts(num_targets=[1, 1], max_length=9)
    held_out = counts("b.csv", num_read=3, dropped={"empty": [3]}, num_targets=[1, 1], max_length=9)
    assert row_lines(train, held_out) == [
        "my.csv: 2 rows read, none dropped; b.csv: dropped 1 of 3 rows: 1 empty (row 3); 2 to train on, 2 held out",
        "targets per row: 1; no row truncated",
    ]


def test_packed_chats_and_single_rows_are_said():
    train = counts(num_targets=[9] * 3, max_length=9, num_packed=40, num_truncated=2, knows_cut=False)
    held_out = counts(num_read=1, num_targets=[9], max_length=9, num_packed=2, num_truncated=1, knows_cut=False)
    assert row_lines(train, held_out) == [
        "my.csv: 3 rows read, none dropped; 40 packed into 3 rows to train on, 2 packed into 1 row held out",
        "targets per row: 9; packed rows have 9 tokens at most, and chats may be cut there",
    ]
    one = counts(num_targets=[1], max_length=1, num_truncated=1)
    assert row_lines(one, one)[1].endswith("; 2 rows truncated to 1 token")


def test_long_names_of_classes_are_cut():
    assert class_line([0, 1], ["x" * 99, "ham"]) == f"2 classes: '{'x' * 29}…' 1, 'ham' 1"


@pytest.mark.parametrize(
    ("text", "labels_of", "task", "classes", "line"),
    [
        ("one two", lambda ids: [-100] * 3 + ids[3:], "causal-lm", None, "░one░ two"),
        ("one two", lambda ids: ids, "causal-lm", None, "one two"),
        ("one\ntwo", lambda ids: ids[:3] + [-100] * (len(ids) - 3), "causal-lm", None, "one░⏎two░"),
        ("one two", lambda ids: ids, "seq2seq", None, "░one two░ → one two"),
        ("one two", lambda ids: 1, "sequence-classification", ["ham", "spam"], "one two → class 'spam'"),
    ],
)
def test_a_sample_shows_what_is_masked(text, labels_of, task, classes, line, tokenizer, monkeypatch):
    ids = [ord(character) for character in text]
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **options: "".join(map(chr, ids)))
    shown = sample_line({"input_ids": ids, "labels": labels_of(ids)}, tokenizer, task, classes)
    assert shown.partition(": ")[2] == line


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_prints(rank, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    row = {"input_ids": [5, 6], "labels": [5, 6]}
    both = (counts(num_targets=[1], max_length=9), counts(num_targets=[1], max_length=9))
    print_overview([row], both, tokenizer)
    assert capsys.readouterr().out.count("\n") == (3 if rank == "0" else 0)


def test_the_time_to_go_is_told_once_after_ten_steps(monkeypatch):
    lines, now = [], iter([100.0, 118.0])  # after the first step and after the tenth
    monkeypatch.setattr("_shared.overview.time.monotonic", lambda: next(now))
    pace = Pace(445, 100, lines.append)
    for step in range(101, 130):
        pace.after_step(step)
    assert lines == ["345 optimizer steps, from step 100 on", "after 10 steps: 2 s a step, about 11 min to go"]


def test_a_newcomer_needs_no_configuration(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/finetune.py"])
    command = ["--model", "some/folder", "--dataset_name", "my.csv", "--text_column", "body"]
    recipe, training = parse_arguments(command, RecipeArguments, LoopArguments)
    assert (recipe.model_name_or_path, recipe.text_column) == ("some/folder", "body")
    assert (training.output_dir, training.report_to, training.logging_steps) == ("outputs/finetune", "none", 10)
    _, training = parse_arguments([*command, "--output_dir", "mine"], RecipeArguments, LoopArguments)
    assert training.output_dir == "mine"


@pytest.mark.parametrize("training", [LoopArguments, TrainingArguments])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "aim"], r"report_to must be none or one of|needs a package: pip install aim"),
        (["--report_to", "mlflow"], r"report_to='mlflow' needs a package: pip install mlflow"),
        (["--report_to", "nothing"], r"report_to must be none or one of .*mlflow.* got 'nothing'"),
        (["--output_dir", "FILE"], r"output_dir is '.*/file', and '.*/file' is a file"),
        (["--output_dir", "FILE/below"], r"output_dir is '.*/file/below', and '.*/file' is a file"),
        (["--lr_scheduler_type", "liner"], r"liner"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps must be at least 1, got -1"),
        (["--max_grad_norm", "-1"], "max_grad_norm must be >= 0"),
        (["--max_examples", "0"], "max_examples must be at least 1, got 0"),
        (["--max_eval_examples", "-3"], "max_eval_examples must be at least 1, got -3"),
        (["--dataset_name", ""], "dataset_name is empty"),
    ],
)
def test_what_would_stop_the_run_later_stops_it_before_rows_are_prepared(
    training, flags, message, monkeypatch, tmp_path
):
    monkeypatch.setattr("sys.argv", ["recipes/finetune.py"])
    (tmp_path / "file").write_text("")
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    with pytest.raises(UserError, match=message) as error:
        parse_arguments(flags, RecipeArguments, training)
    assert "\n" not in str(error.value)


def test_a_model_in_the_home_folder_and_an_output_that_cannot_show_every_character(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["recipes/finetune.py"])
    monkeypatch.setenv("HOME", str(tmp_path))
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr("sys.stdout", out)
        recipe, _ = parse_arguments(["--model", "~/mine"], RecipeArguments, LoopArguments)
        print("░one░")
    assert (tmp_path / "out").read_text() == "?one?\n"
    assert recipe.model_name_or_path == str(tmp_path / "mine")
