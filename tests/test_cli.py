"""The command line: what it prints, its exit codes, and no traceback for what the user can put right."""

import json
import os
import re

import pytest
import torch
from transformers import TrainingArguments

from hf_gradutils import __version__
from hf_gradutils.cli import main
from hf_gradutils.plots import read_run
from tests.harness.ranks import run_ranks


def test_without_a_command_it_helps(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in ("check", "run", "env", "plot"))
    with pytest.raises(SystemExit) as end:
        main(["plot", "--help"])
    assert end.value.code == 0
    assert "RUN_DIR" in capsys.readouterr().out


def test_env_of_one_process(capsys, monkeypatch):
    monkeypatch.setenv("HF_GRADUTILS_SYNC", "auto")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^hf-gradutils +{re.escape(__version__)}$", out, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.M)
    assert "HF_GRADUTILS_SYNC=auto" in out
    assert "ranks        1, no launcher" in out
    monkeypatch.setenv("HF_GRADUTILS_SYNC", "never")
    assert main(["env"]) == 2
    assert "hf-gradutils: error: HF_GRADUTILS_SYNC: sync must be one of" in capsys.readouterr().err


def test_env_of_two_nodes():
    first, *others = run_ranks(_env, 4, nodes=2, init=False)
    assert others == [""] * 3
    assert "launcher     torchrun" in first
    assert "ranks        4" in first
    for rank, node, local in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)):
        line = next(line for line in first.splitlines() if f"rank {rank}:" in line)
        assert f"node {node}, local rank {local}" in line
        assert ("first of its node" in line) == (local == 0)


def _env():
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["env"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("env", [{"LOCAL_RANK": "0"}, {"LOCAL_RANK": None}, {"LOCAL_RANK": ""}])
def test_env_names_the_first_ranks_that_blocks_elect(env):
    first, *_ = run_ranks(_env, 4, nodes=2, init=False, env=env)
    nodes = [line.partition("node ")[2][0] for line in first.splitlines() if "(first of its node)" in line]
    assert sorted(nodes) == ["0", "1"]


def test_env_names_the_ranks_that_never_come():
    code, error = run_ranks(_env_of_one, 2, init=False)[0]
    assert code == 2
    assert "ranks [1] of 2 are missing; gave up after 0.3 s; start all ranks" in error
    assert "RANK=0 and WORLD_SIZE=2 say that this is one of 2 processes: if it is the only one, unset both" in error


def _env_of_one():
    import contextlib
    import io

    if os.environ["RANK"] == "1":
        return None
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return main(["env", "--timeout_s", "0.3"]), err.getvalue()


def test_check_of_no_script_is_an_error(capsys):
    assert main(["check", "nowhere.py"]) == 2
    assert "no file or command 'nowhere.py'; give a script" in capsys.readouterr().err
    assert main(["check", "--num_samples", "0", "nowhere.py"]) == 2
    assert "--num_samples and --timeout_s must be > 0" in capsys.readouterr().err


def _write_run(folder, *, groups=False, checkpoint=""):
    log = [
        {
            "step": step,
            "loss": 4.0 / step,
            "grad_norm": 1.0 / step,
            "num_targets": 10 * step,
            "skipped_steps": step // 3,
        }
        | ({"grad_norm/a": 0.5 / step, "grad_norm/b": 0.1} if groups else {})
        for step in range(1, 6)
    ]
    log.append({"step": 5, "eval_loss": 1.0})
    target = folder / checkpoint if checkpoint else folder
    target.mkdir(parents=True, exist_ok=True)
    (target / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    torch.save(TrainingArguments(str(folder), max_grad_norm=0.25, use_cpu=True), target / "training_args.bin")
    return folder


@pytest.mark.slow
def test_plot_draws_several_runs_over_one_another(tmp_path, capsys):
    runs = [_write_run(tmp_path / "one", groups=True), _write_run(tmp_path / "two", checkpoint="checkpoint-5")]
    assert main(["plot", *map(str, runs)]) == 0
    picture = tmp_path / "one" / "training.png"
    assert f"wrote {picture}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(runs[1]), "--out", str(tmp_path / "new" / "x.png"), "--max_grad_norm", "2"]) == 0
    smaller = (tmp_path / "new" / "x.png").stat().st_size
    assert 0 < smaller < picture.stat().st_size, "one run without groups has less to draw"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "is a folder; give a file, as"),
        ("x.docx", "cannot draw .docx files;"),
        ("trainer_state.json/x.png", "cannot write"),
        ("a" * 300 + ".png", "cannot write"),
        ("/proc/x.png", "cannot write"),
    ],
)
def test_plot_to_a_place_that_cannot_be_written_says_so(out, message, tmp_path, capsys):
    run = _write_run(tmp_path)
    assert main(["plot", str(run), "--out", str(run / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-gradutils: error: ")
    assert message in line


def test_plot_without_a_suffix_says_what_it_has_written(tmp_path, capsys):
    assert main(["plot", str(_write_run(tmp_path)), "--out", str(tmp_path / "x")]) == 0
    assert f"wrote {tmp_path / 'x.png'}" in capsys.readouterr().out
    assert (tmp_path / "x.png").exists()


def test_a_run_is_read_from_its_newest_checkpoint_and_nothing_is_unpickled(tmp_path):
    for step in (9, 10):
        _write_run(tmp_path / "run", checkpoint=f"checkpoint-{step}")
    state = tmp_path / "run" / "checkpoint-10" / "trainer_state.json"
    state.write_text(state.read_text().replace('"eval_loss": 1.0', '"eval_loss": 7.0'))
    run = read_run(tmp_path / "run")
    assert (run.name, run.max_grad_norm) == ("run", 0.25)
    assert run.series("eval_loss") == ([5], [7.0])
    assert run.series("num_targets")[1] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no trainer_state.json in"),
        ("{", "was not written by a Trainer"),
        ('{"log_history": [{"step": 1, "epoch": 1}]}', "none with a loss; set logging_steps lower"),
    ],
)
def test_plot_of_something_else_says_what_is_wrong(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "nowhere")]) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
