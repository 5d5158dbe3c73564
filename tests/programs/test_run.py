"""``hf-gradutils run``: unmodified programs train with the gradient of one batch."""

import sys

import pytest

from tests.programs.cases import LOOP, TRAIN, launch, run, run_python, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The gradient norm of one process with one batch, and stock's with four micro-batches."""
    folder = tmp_path_factory.mktemp("truth")
    write(folder, train=TRAIN)
    one, four = (run_python(folder, "train.py", accumulation) for accumulation in ("1", "4"))
    assert four.norm == pytest.approx(4 * one.norm, rel=1e-4), "the control: stock is wrong"
    return one.norm


def test_a_script_trains_exactly(truth, tmp_path):
    write(tmp_path, train=TRAIN)
    done = run(tmp_path, "run", "train.py", "4")
    assert done.code == 0, done.err
    assert done.norm == pytest.approx(truth, rel=1e-5)
    assert "of ExactMine" in done.out
    assert "hf-gradutils: __main__.Mine is exact" in done.err
    assert not list(tmp_path.glob("hf-gradutils-*")), "the folder of the run is gone"


def test_ranks_that_a_launcher_starts_train_exactly(truth, tmp_path):
    write(tmp_path, train=TRAIN)
    done = run(tmp_path, "run", "accelerate", "launch", *launch("train.py", "2"))
    assert done.code == 0, done.err
    assert done.norm == pytest.approx(truth, rel=1e-5)
    assert done.err.count("Mine is exact") == 1


PACKAGE_MAIN = "import runpy, sys; sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
PARENT = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, 'train.py', *sys.argv[1:]]))"
SPAWNS = """
import multiprocessing, sys, train
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=train.main)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
INSTALLED = "import sys\nsys.modules['was_here'] = sys\nsys.stderr.write('the site of this machine\\n')\n"


@pytest.mark.parametrize("program", ["module", "child", "spawned", "site"])
def test_programs_of_other_kinds_train_exactly(program, truth, tmp_path):
    write(tmp_path, train=TRAIN, package_main=PACKAGE_MAIN, parent=PARENT, spawns=SPAWNS)
    words = {"module": ("-m", "package_main"), "child": ("parent.py",), "spawned": ("spawns.py",)}
    env = None
    if program == "site":  # a sitecustomize that the machine has already
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(INSTALLED)
        env = {"PYTHONPATH": str(tmp_path / "site")}
    done = run(tmp_path, "run", *words.get(program, ("train.py",)), "4", env=env)
    assert done.code == 0, done.err
    assert done.norm == pytest.approx(truth, rel=1e-5)
    if program == "site":
        assert done.err.count("the site of this machine") == 1 + 1  # the command's own Python, and the program's


def test_a_loop_of_the_programs_own_is_an_error_before_its_first_step(tmp_path):
    write(tmp_path, loop=LOOP)
    done = run(tmp_path, "run", "loop.py")
    assert done.code == 1
    assert "stepped" not in done.out
    assert "SGD steps in a loop of this program's own" in done.err
    assert "use hf_gradutils.GradUtilsAccelerator" in done.err
    allowed = run(tmp_path, "run", "--allow_loops", "loop.py")
    assert (allowed.code, allowed.out) == (2, "stepped\n")
    assert "no transformers.Trainer was built in this program" in allowed.err


REFUSED = """
from common import *
from transformers import Trainer
args = arguments(4)
args.max_grad_norm = -1.0
Trainer(model(), args, train_dataset=ROWS).train()
"""


SWALLOWS = LOOP.replace("optimizer.step()", "for _ in 1, 2:\n    try: optimizer.step()\n    except Exception: pass")


def test_no_step_of_such_a_loop_is_taken(tmp_path):
    before = "before = layer.weight.detach().clone()\noptimizer"
    write(tmp_path, loop=SWALLOWS.replace("optimizer", before, 1) + "print(torch.equal(layer.weight, before))")
    assert run(tmp_path, "run", "loop.py").out == "stepped\nTrue\n"


CLEARED = "import os\nos.environ.clear()\n" + TRAIN


def test_what_is_not_seen_is_said(truth, tmp_path):
    write(tmp_path, train=CLEARED)
    assert run(tmp_path, "run", "train.py", "4").norm == pytest.approx(truth, rel=1e-5)
    (tmp_path / "train.sh").write_text(f"#!/bin/sh\nexec env -u PYTHONPATH {sys.executable} train.py 4\n")
    (tmp_path / "train.sh").chmod(0o755)
    done = run(tmp_path, "run", "./train.sh")
    assert done.code == 2
    assert "no transformers.Trainer was built in this program" in done.err


def test_a_trainer_that_cannot_be_exact_stops_with_the_reason(tmp_path):
    write(tmp_path, train=REFUSED)
    done = run(tmp_path, "run", "train.py")
    assert done.code == 1
    assert "InvalidArgumentError: max_grad_norm must be > 0, got -1.0" in done.err


def test_words_that_start_nothing_are_an_error(tmp_path):
    for words, message in {
        ("nowhere.py",): "no file or command 'nowhere.py'; give a script, -m and a module, or a command",
        ("no-such-command", "--x"): "no file or command 'no-such-command'",
        ("-m",): "-m needs the name of a module",
        (): "no program; give a script",
    }.items():
        done = run(tmp_path, "run", *words)
        assert done.code == 2
        assert f"hf-gradutils: error: {message}" in done.err
