"""``hf-gradutils check``: the answer, the exit code, and that programs end where they would train."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.programs.cases import LOOP, ROOT, TRAIN, answer, launch, run, run_python, write

pytestmark = pytest.mark.slow


def test_the_answer_comes_first_and_decides_the_exit_code(tmp_path):
    write(tmp_path, train=TRAIN)
    done = run(tmp_path, "check", "--json", "report.json", "train.py", "4")
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert lines[0] == "loading data"
    assert lines[1].startswith("WRONG: the gradient is 4"), "the report's first line"
    assert "after" not in done.out, "nothing of the program runs after the check, not even `finally`"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["answer"] == lines[1]
    assert report["trainer"] == "__main__.Mine"
    assert report["verdict"] == "FAILED"
    assert not list((tmp_path / "out").glob("*"))


def test_what_is_right_passes_and_what_is_made_exact(tmp_path):
    write(tmp_path, train=TRAIN)
    right = run(tmp_path, "check", "train.py", "1")
    assert (right.code, answer(right).split(":")[0]) == (0, "EXACT"), right.err
    exact = run(tmp_path, "check", "--exact", "train.py", "4")
    assert (exact.code, answer(exact).split(":")[0]) == (0, "EXACT"), exact.err
    assert "checked: __main__.ExactMine" in exact.out


@pytest.mark.parametrize("launcher", ["inside", "outside"])
def test_two_ranks_are_checked_together(launcher, tmp_path):
    write(tmp_path, train=TRAIN)
    if launcher == "inside":
        done = run(tmp_path, "check", "accelerate", "launch", *launch("train.py", "2"))
    else:
        words = launch("-m", "hf_gradutils", "check", "train.py", "2")
        done = run_python(tmp_path, "-m", "accelerate.commands.launch", *words)
    assert done.code == 1, done.err
    answers = [line for line in done.out.splitlines() if line.startswith("WRONG: the gradient is")]
    assert answers[0].startswith("WRONG: the gradient is 4")
    assert len([line for line in done.out.splitlines() if line.startswith("checked:")]) == 1


SEVERAL = """
from common import *
from transformers import Trainer

early = Trainer(model(), arguments(1), train_dataset=ROWS)
late = Trainer(model(), arguments(4), train_dataset=ROWS)
early.train()
early.train()
late.train()
print("end", norm(early), norm(late))
"""


def test_all_trainers_of_a_program_are_checked_and_trained(tmp_path):
    write(tmp_path, several=SEVERAL)
    done = run(tmp_path, "check", "--all", "--json", "report.json", "several.py")
    assert done.code == 1, done.err
    assert "2 Trainers: EXACT, WRONG" in done.out
    assert "end norm" in done.out
    verdicts = [json.loads((tmp_path / name).read_text())["verdict"] for name in ("report.json", "report-2.json")]
    assert verdicts == ["passed", "FAILED"]


GOES_ON = "import subprocess, sys; subprocess.call([sys.executable, 'train.py', '4']); print('saves')"
SPAWNS = """
import multiprocessing, train
if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=train.main)
    process.start()
    process.join()
    print("saves")
"""
SHELL = f"#!/bin/sh\n{sys.executable} train.py 4\necho saves\n"


@pytest.mark.parametrize("parent", ["python", "fork", "shell", "module"])
def test_what_starts_the_training_does_not_go_on(parent, tmp_path):
    write(tmp_path, train=TRAIN, parent=GOES_ON, spawns=SPAWNS)
    (tmp_path / "train.sh").write_text(SHELL)
    (tmp_path / "train.sh").chmod(0o755)
    words = {"python": ["parent.py"], "fork": ["spawns.py", "4"], "shell": ["./train.sh"], "module": ["-m", "parent"]}
    done = run(tmp_path, "check", "--plot", "report.png", *words[parent])
    assert done.code == 1, done.err
    assert answer(done).startswith("WRONG: the gradient is 4")
    assert "saves" not in done.out
    assert (tmp_path / "report.png").stat().st_size > 1000


INSIDE = f"#!/bin/sh\n{sys.executable} -m hf_gradutils run train.py 4\n"


@pytest.mark.parametrize("outer", ["check", "run"])
def test_a_run_that_is_checked_is_checked_as_it_trains(outer, tmp_path):
    write(tmp_path, train=TRAIN)
    (tmp_path / "train.sh").write_text(INSIDE)
    (tmp_path / "train.sh").chmod(0o755)
    words = ["check", "./train.sh"] if outer == "check" else ["run", "-m", "hf_gradutils", "check", "train.py", "4"]
    done = run(tmp_path, *words)
    assert done.code == 0, done.err
    assert answer(done).startswith("EXACT")


LATER = SEVERAL.replace("late.train()", "sys.exit(7)")


def test_a_program_that_fails_after_a_right_trainer_is_not_called_right(tmp_path):
    write(tmp_path, several=LATER)
    done = run(tmp_path, "check", "--all", "several.py")
    assert done.code == 2
    assert "the program ended with code 7, perhaps before further Trainers" in done.out


def test_long_accumulations_are_checked_as_they_are(tmp_path):
    write(tmp_path, train=TRAIN.replace("int(sys.argv[1]))", "32, 1)"))
    (tmp_path / "common.py").write_text(
        (tmp_path / "common.py")
        .read_text()
        .replace("def arguments(accumulation,", "def arguments(accumulation, batch=None,")
        .replace("batch = 16 //", "batch = batch or 16 //")
        .replace("(16, 8)", "(64, 8)")
    )
    done = run(tmp_path, "check", "train.py")
    assert answer(done).startswith("WRONG: the gradient is 32"), "not as many as 16 samples allow"


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--plot", "report.docx", "cannot draw .docx files"),
        ("--json", "train.py/report.json", "cannot write 'train.py/report.json'"),
    ],
)
def test_files_that_cannot_be_written_are_an_error_before_the_program_runs(option, file, message, tmp_path):
    write(tmp_path, train="print('was run')")
    done = run(tmp_path, "check", option, file, "train.py")
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_an_error_of_the_command_removes_no_file(tmp_path):
    for name in ("report.json", "report.png", "picture"):
        (tmp_path / name).write_text("of before")
    for words in (["nowhere.py"], ["--num_samples", "0", "x.py"], ["--plot", "report.docx", "-m", "x"]):
        assert run(tmp_path, "check", "--json", "report.json", "--plot", "report.png", *words).code == 2
    write(tmp_path, ends="pass")
    assert run(tmp_path, "check", "--plot", "picture", "ends.py").code == 2
    assert (tmp_path / "picture").read_text() == "of before", "the picture would be picture.png"
    assert {(tmp_path / name).read_text() for name in ("report.json", "report.png")} == {"of before"}


SWALLOWS = """
from common import *
from transformers import Trainer

class Broken(Trainer):
    def training_step(self, *args, **kwargs):
        raise KeyError("a bug of the user's")

try:
    Broken(model(), arguments(4), train_dataset=ROWS).train()
except BaseException:
    print("swallowed")
while True:
    pass
"""


def test_a_check_that_fails_ends_the_program_with_the_reason(tmp_path):
    write(tmp_path, train=SWALLOWS)
    (tmp_path / "report.json").write_text("that of another check")
    done = run(tmp_path, "check", "--json", "report.json", "train.py")
    assert done.code == 2
    assert done.out.startswith("NOT COMPARED of __main__.Broken: ")
    assert "a bug of the user's" in done.out
    assert "swallowed" not in done.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "NOT COMPARED"
    assert "a bug of the user's" in report["answer"]


TRIES_AGAIN = """
from common import *
from transformers import Trainer

class TriesAgain(Trainer):
    def _inner_training_loop(self, *args, **kwargs):
        while True:
            try:
                return super()._inner_training_loop(*args, **kwargs)
            except:
                print("once more")

TriesAgain(model(), arguments(4), train_dataset=ROWS).train()
"""


def test_a_program_that_catches_everything_is_checked_once(tmp_path):
    write(tmp_path, train=TRIES_AGAIN)
    done = run(tmp_path, "check", "train.py")
    assert done.code == 1
    assert answer(done).startswith("WRONG: the gradient is 4")
    assert "once more" not in done.out


HANGS = """
from common import *
import time
from transformers import Trainer

class Hangs(Trainer):
    def training_step(self, *args, **kwargs):
        time.sleep(600)

Hangs(model(), arguments(4), train_dataset=ROWS).train()
"""


def test_a_check_that_hangs_ends(tmp_path):
    write(tmp_path, train=HANGS)
    done = run(tmp_path, "check", "--timeout_s", "5", "train.py")
    assert done.code == 2
    assert "the check took more than 5 s (--timeout_s)" in done.out
    assert "in training_step" in done.err, "says where"


def test_a_program_that_trains_no_trainer_is_not_called_right(tmp_path):
    write(tmp_path, loop=LOOP, fails="raise SystemExit(7)")
    done = run(tmp_path, "check", "loop.py")
    assert done.code == 2
    assert "stepped" not in done.out
    assert "NOT COMPARED: SGD steps in a loop of this program's or its Trainer's own" in done.out
    assert "check_loop_invariance" in done.out
    done = run(tmp_path, "check", "fails.py")
    assert done.code == 2
    assert "no transformers.Trainer began to train in this program" in done.err
    assert "it ended with code 7, and nothing was checked" in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number, tmp_path):
    (tmp_path / "waits.py").write_text("import time; print('ready', flush=True); time.sleep(600)")
    command = [sys.executable, "-m", "hf_gradutils", "check", "waits.py"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # without a terminal, as in CI
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nothing was checked" in errors
