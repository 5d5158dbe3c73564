"""The recipes without our Trainer, and with trl's: the same steps however the batch is cut up; tasks; bad input."""

import pytest

from tests.harness.ranks import RankFailure
from tests.harness.recipe_cases import SMALL, log_of, run_in_ranks, skip_without_trl, steps_of

pytestmark = pytest.mark.slow

TRAINING = [*SMALL, "--max_steps", "3", "--save_strategy", "no"]
CONFIGS = {"finetune_trl.py": "configs/chat.yaml"}


@pytest.mark.parametrize(
    ("recipe", "spread"),
    [
        ("finetune_no_trainer.py", []),
        ("finetune_utilities.py", []),
        ("finetune_utilities.py", ["--shard"]),
        ("finetune_trl.py", []),
    ],
    ids=["no Trainer", "utilities, DDP", "utilities, FSDP2", "trl"],
)
def test_two_ranks_take_the_steps_of_one(recipe, spread, home, tmp_path, capsys):
    skip_without_trl(recipe)
    config = CONFIGS.get(recipe, "configs/causal_lm.yaml")
    for num_ranks, batch_size, accumulation in ((1, 8, 2), (2, 2, 4)):
        cut = ["--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        cut += ["--per_device_eval_batch_size", 4 * batch_size, *(spread if num_ranks > 1 else [])]
        run_in_ranks(home, recipe, [config, *TRAINING, *cut, "--output_dir", tmp_path / str(num_ranks)], num_ranks)
    out = capsys.readouterr().out
    for line in ("to train on, ", "targets per row: ", "first row, ░ not trained on ░: ", "3 optimizer steps"):
        assert len([said for said in out.splitlines() if line in said]) == 2, "once a run, on rank 0"
    one, two = steps_of(tmp_path / "1"), steps_of(tmp_path / "2")
    assert [step["num_targets"] for step in one] == [step["num_targets"] for step in two]
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    assert one == [pytest.approx(step, rel=1e-2) for step in two]  # Adam turns rounding near 0 into steps
    assert one[2]["loss"] < one[0]["loss"] - 0.1
    evaluations = [log_of(tmp_path / num_ranks)[-1]["eval_loss"] for num_ranks in ("1", "2")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-3)


@pytest.mark.parametrize("recipe", ["finetune_no_trainer.py", "finetune_utilities.py"])
@pytest.mark.parametrize("task", ["seq2seq", "sequence_classification"])
def test_the_other_tasks_train_too(task, recipe, home, tmp_path):
    arguments = [f"configs/{task}.yaml", *TRAINING, "--eval_strategy", "steps", "--eval_steps", "1"]
    run_in_ranks(home, recipe, [*arguments, "--output_dir", tmp_path], 1)
    steps = steps_of(tmp_path)
    assert len(steps) == 3
    if task == "sequence_classification":
        assert [step["num_targets"] for step in steps] == [8, 8, 8], "rows"
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("recipe", "spread"),
    [
        ("finetune.py", []),
        ("finetune_no_trainer.py", []),
        ("finetune_utilities.py", []),
        ("finetune_utilities.py", ["--shard"]),
        ("finetune_trl.py", []),
    ],
    ids=["Trainer", "no Trainer", "utilities, DDP", "utilities, FSDP2", "trl"],
)
def test_each_checks_itself_and_trains_nothing(recipe, spread, home, tmp_path):
    skip_without_trl(recipe)
    config = CONFIGS.get(recipe, "configs/causal_lm.yaml")
    output = tmp_path / "output"
    arguments = [config, *TRAINING, *spread, "--check_invariance", "--output_dir", output]
    with pytest.raises(RankFailure) as ended:
        run_in_ranks(home, recipe, arguments, 2)
    report = ended.value.reports[0].output
    assert "this layout against one process" in report, str(ended.value)
    assert report.count(" ok\n") == 4, report
    assert "\npassed\n" in "\n".join(line.strip() for line in report.splitlines()) + "\n"
    assert "SystemExit: 0" in str(ended.value)
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("finetune_no_trainer.py --report_to tensorbored", "report_to must be none or one of aim, "),
        ("finetune_no_trainer.py --per_device_train_batch_size 500", "are too few for 1 × 500"),
        ("finetune_utilities.py --report_to comet", "argument --report_to/--report-to: invalid choice: 'comet'"),
        ("finetune_utilities.py --save_steps 0", "save_steps must be at least 1, got 0"),
        ("finetune_utilities.py --resume_from_checkpoint last", "no checkpoint to resume from in"),
        ("finetune_trl.py --messages_column chats", "the data set has no column 'chats'; it has messages"),
    ],
)
def test_bad_input_is_one_line(command, message, home, tmp_path):
    recipe, *bad = command.split()
    skip_without_trl(recipe)
    config = CONFIGS.get(recipe, "configs/causal_lm.yaml")
    with pytest.raises(RankFailure) as failure:
        run_in_ranks(home, recipe, [config, *TRAINING, "--output_dir", tmp_path, *bad], 1)
    lines = [line for line in failure.value.reports[0].output.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert lines[0].startswith("rank 0: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    "recipe", ["finetune.py", "finetune_no_trainer.py", "finetune_trl.py", "finetune_utilities.py"]
)
def test_help_lists_the_arguments(recipe, home):
    skip_without_trl(recipe)
    with pytest.raises(RankFailure, match="SystemExit: 0") as ended:
        run_in_ranks(home, recipe, ["--help"], 1)
    assert "--eval_split" in ended.value.reports[0].output
