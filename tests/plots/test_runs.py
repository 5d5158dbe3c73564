"""Runs are read from where Trainers leave them, under names that differ."""

import json
import math

import pytest
import torch
from transformers import TrainingArguments

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.plots import Run, read_run, read_runs

LOG = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}]


def write_state(folder, log=LOG, **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, **state}))
    return folder


def names(*arguments):
    return [run.name for run in read_runs(arguments)]


def test_folders_of_one_name_are_named_by_what_tells_them_apart(tmp_path):
    stock, ours = write_state(tmp_path / "stock" / "out"), write_state(tmp_path / "ours" / "out")
    other = write_state(tmp_path / "other")
    assert names(stock) == ["out"]
    assert names(stock, ours, other) == ["stock/out", "ours/out", "other"]
    assert names(stock, stock / "trainer_state.json") == [str(stock)[1:], f"{str(stock)[1:]} (2)"]


def test_a_checkpoint_is_named_like_its_run_unless_both_are_given(tmp_path):
    run = write_state(tmp_path / "out")
    first, second = write_state(run / "checkpoint-1"), write_state(run / "checkpoint-2")
    assert names(first) == ["out"]
    assert names(first, second) == ["out/checkpoint-1", "out/checkpoint-2"]
    (run / "trainer_state.json").unlink()
    write_state(run / "checkpoint-best")
    assert read_run(run).folder == run


def test_a_label_names_a_run_and_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    a, b = write_state(tmp_path / "lr=1e-4"), write_state(tmp_path / "b")
    assert names(a, f"stock={b}") == ["lr=1e-4", "stock"]
    assert names(f"ours={a}", f"ours={b}") == ["ours", "ours (2)"]
    with pytest.raises(InvalidArgumentError, match="nowhere' does not exist"):
        read_runs([f"stock={tmp_path / 'nowhere'}"])


def test_the_clip_of_a_saved_state_is_that_of_its_newest_checkpoint(tmp_path):
    run = write_state(tmp_path / "out")
    assert read_run(run).max_grad_norm is None
    for step, limit in ((9, 0.5), (10, 0.25)):
        arguments = TrainingArguments(str(run), max_grad_norm=limit, use_cpu=True)
        torch.save(arguments, write_state(run / f"checkpoint-{step}") / "training_args.bin")
    assert read_run(run).max_grad_norm == 0.25


def test_targets_per_step_are_those_since_the_entry_before_also_in_a_log_that_begins_late(tmp_path):
    log = [{"step": step, "loss": 1.0, "num_targets": 50 * (2 if step == 120 else 1)} for step in (105, 110, 120)]
    assert read_run(write_state(tmp_path / "a", log, logging_steps=5)).targets_per_step()[1] == [10, 10, 10]
    unknown = read_run(write_state(tmp_path / "b", log))
    assert unknown.targets_per_step()[1] == [50 / 105, 10, 10]
    assert read_run(write_state(tmp_path / "c", LOG, logging_steps=5)).targets_per_step() == ([], [])


def test_numbers_that_are_missing_are_nan_and_only_our_trainers_count_targets(tmp_path):
    log = [{"step": 1, "loss": None}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0, "num_targets": 4}]
    run = read_run(write_state(tmp_path, log))
    steps, values = run.series("loss")
    assert steps == [1, 2, 3]
    assert [math.isnan(value) for value in values] == [True, True, False]
    assert run.counts_targets
    assert not Run(name="stock", log=LOG, max_grad_norm=None).counts_targets
