"""finetune.py as a user launches it: default data, the user's own, and bad input."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.ranks import RankFailure
from tests.harness.recipe_cases import TWO_RANKS, launch, log_of, run_in_ranks, skip_without_trl, steps_of

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


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("launcher", "recipe", "text", "reason"),
    [
        (TWO_RANKS, "finetune.py", {"a": 1}, "an object with the keys 'a'; expected text"),
        (TORCHRUN, "finetune_utilities.py", 4, "the number 4; expected text"),
    ],
    ids=["accelerate", "torchrun"],
)
def test_bad_input_is_a_line_on_each_rank_and_rank_0_the_root_cause(launcher, recipe, text, reason, home, tmp_path):
    good = [{"text": "good"}] * 16
    data = _json_lines(tmp_path / "my.jsonl", [*good, {"text": text}, *good])
    own = ["--dataset_name", data, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    run = launch(home, *launcher, f"recipes/{recipe}", "configs/causal_lm.yaml", *SMALL, *own)
    assert run.returncode != 0
    first, waiting = (
        [line for line in run.stderr.splitlines() if line.startswith(f"rank {rank}: error:")] for rank in (0, 1)
    )
    assert len(first) == len(waiting) == 1, run.stderr[-3000:]
    line = f"my.jsonl, row 17, column 'text': {reason}"
    assert line in first[0]
    assert waiting[0] == first[0].replace("rank 0: error: ", "rank 1: error: rank 0 could not prepare the data: ")
    root_cause = run.stderr.partition("Root Cause")[2]
    assert "(local_rank: 0)" in root_cause
    assert f"traceback : {first[0]}" in root_cause


def test_on_two_nodes_too_the_reason_is_on_rank_0_and_one_line_on_the_others(home, tmp_path):
    data = _json_lines(tmp_path / "my.jsonl", [{"text": "good"}] * 16)
    own = ["--dataset_name", data, "--text_column", "body", "--output_dir", tmp_path / "run"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "static"]
    agents += ["--master_addr", "127.0.0.1", "--master_port", port, "--local_addr", "127.0.0.1"]
    with ThreadPoolExecutor(2) as pool:
        nodes = [
            pool.submit(launch, home, *agents, "--node_rank", node, "recipes/finetune.py", *SMALL, *FEW, *own)
            for node in (0, 1)
        ]
    first, other = (node.result().stderr for node in nodes)
    reason = "the data set has no column 'body'; it has text"
    lines = [line for line in (first + other).splitlines() if line.startswith("rank ")]
    assert [line.partition(" (")[0] for line in lines] == [
        f"rank 0: error: {reason}",
        f"rank 1: error: rank 0 could not prepare the data: {reason}",
    ]
    assert "rank      : 0 (local_rank: 0)" in first.partition("Root Cause")[2]
    assert lines[1] in other.partition("Root Cause")[2], "the one rank of that node"


def test_a_first_run_tells_what_it_trains_on_and_how_long_it_takes(trained, home, tmp_path, capsys):
    rows = ["", *(f"number {i} is followed by number {i + 1}" for i in range(78)), "long " * 600]
    (tmp_path / "my.csv").write_text("body\n" + "".join(f'"{row}"\n' for row in rows))
    own = ["--model", trained[0], "--dataset_name", tmp_path / "my.csv", "--text_column", "body"]
    own += ["--save_strategy", "no", "--output_dir", tmp_path / "run"]
    run_in_ranks(home, "finetune.py", own, 1)
    out = capsys.readouterr().out
    assert "my.csv: dropped 1 of 80 rows: 1 empty (row 1); " in out
    assert "1 row truncated to 512 tokens" in out
    assert "first row, ░ not trained on ░: ░n░umber " in out
    assert "30 optimizer steps" in out
    assert "after 10 steps: " in out


def test_trl_trains_on_chats_of_any_form_and_counts_the_others(trained, home, tmp_path, capsys):
    skip_without_trl("trl")
    question, answer = {"role": "user", "content": "What follows 3?"}, {"role": "assistant", "content": "4"}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    chats = [[question, answer]] * 30 + [[{"from": "human", "value": "3?"}, {"from": "gpt", "value": "4"}]] * 6
    chats += [[question, {"role": "assistant", "content": None, "tool_calls": [call]}], None, [], [question]]
    data = _json_lines(tmp_path / "chats.jsonl", [{"chat": chat} for chat in chats])
    own = ["configs/chat.yaml", *SMALL, "--max_length", "64", "--dataset_name", data, "--messages_column", "chat"]
    own += ["--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no", "--output_dir", tmp_path / "run"]
    run_in_ranks(home, "finetune_trl.py", own, 1)
    out = capsys.readouterr().out
    assert "dropped 3 of 40 rows: 2 empty (rows 38, 39), 1 without an answer (row 40); 35 to train on" in out
    assert "░4<eos>" in out
