"""The recipe as a user launches it: default data, the user's own, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--hidden_size", "24", "--num_heads", "2", "--num_layers", "1", "--vocab_size", "600", "--max_length", "48"]
FEW = ["--max_examples", "64", "--max_eval_examples", "16", "--max_steps", "2", "--logging_steps", "1"]
FEW += ["--eval_strategy", "no", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared data is kept for the module, as it is for a user."""
    return tmp_path_factory.mktemp("hf_home")


def finetune(home, *arguments, ranks=1, timeout_s=150):
    if ranks > 1:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
    else:
        command = [sys.executable]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "HF_HUB_OFFLINE", "TMPDIR")}
    result = subprocess.run(
        [*command, "recipes/finetune.py", *map(str, arguments)],
        cwd=ROOT,
        env=kept | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A causal LM trained on two ranks; its folder and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "causal"
    arguments = ["configs/causal_lm.yaml", *SMALL, *FEW, "--max_steps", "6", "--output_dir", folder]
    code, out, err = finetune(home, *arguments, "--learning_rate", "1e-2", ranks=2)
    assert code == 0, err[-3000:]
    return folder, out


def test_two_ranks_train_on_docstrings_and_leave_everything_behind(trained):
    folder, out = trained
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert all(entry["num_targets"] > 0 for entry in state["log_history"] if "loss" in entry)
    assert (folder / "model.safetensors").stat().st_size > 10_000
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    for line in ("first loss", "last loss", "evaluation loss", "targets trained on", "targets per second"):
        assert out.count(f"  {line}") == 1, "once, on rank 0"
    assert out.count("  given  ") == 3


@pytest.mark.parametrize("task", ["seq2seq", "sequence_classification"])
def test_the_other_tasks_train_too(task, home, tmp_path):
    arguments = [f"configs/{task}.yaml", *SMALL, *FEW, "--output_dir", tmp_path]
    code, out, err = finetune(home, *arguments)
    assert code == 0, err[-3000:]
    assert "evaluation loss" in out
    assert ("evaluation accuracy" in out) == (task == "sequence_classification")


def test_a_model_and_data_of_ones_own_with_a_text_column(trained, home, tmp_path):
    rows = [{"text": f"number {i} is followed by number {i + 1}"} for i in range(40)]
    data = _json_lines(tmp_path / "data.jsonl", rows)
    own = ["--model_name_or_path", trained[0], "--dataset_name", data]
    code, out, err = finetune(home, "configs/causal_lm.yaml", *own, *FEW, "--output_dir", tmp_path / "run")
    assert code == 0, err[-3000:]
    assert "38 training and 2 held-out examples" in out


def test_chats_are_trained_on_what_the_assistant_says(trained, home, tmp_path):
    chat = [{"role": "user", "content": "What follows 3?"}, {"role": "assistant", "content": "4"}]
    data = _json_lines(tmp_path / "chat.jsonl", [{"messages": chat}] * 40)
    settings = json.loads((trained[0] / "tokenizer_config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    for path in trained[0].iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    own = ["--model_name_or_path", model, "--dataset_name", data, "--messages_column", "messages"]
    run = tmp_path / "run"
    code, _, err = finetune(home, "configs/causal_lm.yaml", *own, *FEW, "--output_dir", run)
    assert code == 0, err[-3000:]
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    # 8 × 4 chats a step; the answer is "4" and the end of its line, the question is no target
    assert 32 <= log[0]["num_targets"] <= 32 * 3


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
    ],
    ids=["negative clip", "unknown key", "empty data set", "all masked", "missing column"],
)
def test_bad_input_is_one_line_and_no_traceback(arguments, message, home, tmp_path):
    files = {
        "EMPTY": _json_lines(tmp_path / "empty.jsonl", []),
        "MASKED": _json_lines(tmp_path / "masked.jsonl", [{"prompt": "long " * 80, "text": "never reached"}] * 30),
    }
    arguments = [str(files.get(a, a)) for a in arguments]
    code, _, err = finetune(home, "configs/causal_lm.yaml", *SMALL, *FEW, *arguments, "--output_dir", tmp_path / "run")
    assert code == 1
    lines = [line for line in err.splitlines() if "rank 0: error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_an_unknown_key_in_the_configuration_is_named(home, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("task: causal-lm\nlerning_rate: 1.0e-3\n")
    code, _, err = finetune(home, config)
    assert code == 1
    assert "unknown configuration key or flag 'lerning_rate'; did you mean 'learning_rate'?" in err


def test_bad_input_ends_two_ranks_with_a_line_each(home, tmp_path):
    data = _json_lines(tmp_path / "masked.jsonl", [{"prompt": "long " * 80, "text": "never reached"}] * 30)
    own = ["--dataset_name", data, "--prompt_column", "prompt", "--output_dir", tmp_path / "run"]
    code, _, err = finetune(home, "configs/causal_lm.yaml", *SMALL, *FEW, *own, ranks=2)
    assert code != 0
    for rank in (0, 1):
        own_lines = [line for line in err.splitlines() if line.startswith(f"rank {rank}: error:")]
        assert len(own_lines) == 1, err[-3000:]
        assert "has a target left" in own_lines[0]
