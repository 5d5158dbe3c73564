"""finetune.py as a user launches it: default data, the user's own, and bad input."""

import json

import pytest

from tests.harness.ranks import RankFailure
from tests.harness.recipe_cases import TWO_RANKS, launch, log_of, run_in_ranks, steps_of

pytestmark = pytest.mark.slow

SMALL = ["--hidden_size", "24", "--num_heads", "2", "--num_layers", "1", "--vocab_size", "600", "--max_length", "48"]
FEW = ["--max_examples", "64", "--max_eval_examples", "16", "--max_steps", "2", "--logging_steps", "1"]
FEW += ["--eval_strategy", "no", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A causal LM trained on two ranks; its folder and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "causal"
    arguments = ["configs/causal_lm.yaml", *SMALL, *FEW, "--max_steps", "6", "--learning_rate", "1e-2"]
    run = launch(home, *TWO_RANKS, "recipes/finetune.py", *arguments, "--output_dir", folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, run.stdout


def test_two_ranks_train_on_docstrings_and_leave_everything_behind(trained):
    folder, out = trained
    steps = steps_of(folder)
    assert len(steps) == 6
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(step["num_targets"] > 0 for step in steps)
    assert (folder / "model.safetensors").stat().st_size > 10_000
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    for line in ("first loss", "last loss", "evaluation loss", "targets trained on", "targets per second"):
        assert out.count(f"  {line}") == 1, "once, on rank 0"
    assert out.count("  given  ") == 3


@pytest.mark.parametrize("task", ["seq2seq", "sequence_classification"])
def test_the_other_tasks_train_too(task, home, tmp_path):
    run_in_ranks(home, "finetune.py", [f"configs/{task}.yaml", *SMALL, *FEW, "--output_dir", tmp_path], 1)
    evaluation = next(entry for entry in log_of(tmp_path) if "eval_loss" in entry)
    assert ("eval_accuracy" in evaluation) == (task == "sequence_classification")


def test_a_model_and_data_of_ones_own_with_a_text_column(trained, home, tmp_path, capsys):
    rows = [{"text": f"number {i} is followed by number {i + 1}"} for i in range(40)]
    own = ["--model_name_or_path", trained[0], "--dataset_name", _json_lines(tmp_path / "data.jsonl", rows)]
    arguments = ["configs/causal_lm.yaml", *own, *FEW, "--output_dir", tmp_path / "run"]
    run_in_ranks(home, "finetune.py", arguments, 1)
    assert "38 training and 2 held-out examples" in capsys.readouterr().out


def test_chats_are_trained_on_what_the_assistant_says(trained, home, tmp_path):
    chat = [{"role": "user", "content": "What follows 3?"}, {"role": "assistant", "content": "4"}]
    data = _json_lines(tmp_path / "chat.jsonl", [{"messages": chat}] * 40)
    model = tmp_path / "model"
    model.mkdir()
    for path in trained[0].iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    (model / "chat_template.jinja").write_text(  # without {% generation %}: the last answer is what is learnt
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name, answer in (("model", {2, 3}), ("", {2})):  # "4" and the end of its line, or "4" and <eos>
        own = ["--dataset_name", data, "--messages_column", "messages"]
        own += ["--model_name_or_path", model] if name else SMALL
        run = tmp_path / f"run-{name}"
        run_in_ranks(home, "finetune.py", ["configs/causal_lm.yaml", *own, *FEW, "--output_dir", run], 1)
        # 8 × 4 chats a step; the question is no target
        assert steps_of(run)[0]["num_targets"] / 32 in answer


def _json_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_grad_norm", "-1"], "max_grad_norm must be >= 0, got -1.0"),
        (
            ["--learning_rates", "1"],
            "unknown configuration key or flag 'learning_rates'; did you mean 'learning_rate'?",
        ),
        (["--dataset_name", "EMPTY"], "needs rows to train on"),
        (["--dataset_name", "MASKED", "--prompt_column", "prompt"], "has a target left"),
        (["--dataset_name", "MASKED", "--text_column", "words"], "has no column 'words'"),
        (["--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
    ],
    ids=["negative clip", "unknown key", "empty data set", "all masked", "missing column", "no checkpoint"],
)
def test_bad_input_is_one_line_and_no_traceback(arguments, message, home, tmp_path):
    files = {
        "EMPTY": _json_lines(tmp_path / "empty.jsonl", []),
        "MASKED": _json_lines(tmp_path / "masked.jsonl", [{"prompt": "long " * 80, "text": "never reached"}] * 30),
    }
    arguments = [str(files.get(a, a)) for a in arguments]
    command = ["configs/causal_lm.yaml", *SMALL, *FEW, *arguments, "--output_dir", tmp_path / "run"]
    with pytest.raises(RankFailure) as failure:
        run_in_ranks(home, "finetune.py", command, 1)
    output = failure.value.reports[0].output
    lines = [line for line in output.splitlines() if "rank 0: error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in output


def test_an_unknown_key_in_the_configuration_is_named(home, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("task: causal-lm\nlerning_rate: 1.0e-3\n")
    run = launch(home, "recipes/finetune.py", config)
    assert run.returncode == 1
    assert "unknown configuration key or flag 'lerning_rate'; did you mean 'learning_rate'?" in run.stderr
    assert "Traceback" not in run.stderr


def test_bad_input_ends_two_ranks_with_a_line_each(home, tmp_path):
    data = _json_lines(tmp_path / "masked.jsonl", [{"prompt": "long " * 80, "text": "never reached"}] * 30)
    own = ["--dataset_name", data, "--prompt_column", "prompt", "--output_dir", tmp_path / "run"]
    run = launch(home, *TWO_RANKS, "recipes/finetune.py", "configs/causal_lm.yaml", *SMALL, *FEW, *own)
    assert run.returncode != 0
    for rank in (0, 1):
        own_lines = [line for line in run.stderr.splitlines() if line.startswith(f"rank {rank}: error:")]
        assert len(own_lines) == 1, run.stderr[-3000:]
        assert "has a target left" in own_lines[0]
