"""The smallest recipe: one rank and two print the same numbers, and the mean of means would not."""

import contextlib
import io
import itertools
import re
import runpy

import pytest

from tests.harness.ranks import run_ranks
from tests.harness.recipe_cases import RECIPES, TWO_RANKS, launch

pytestmark = pytest.mark.slow

EXACT = "num_here = (labels[:, 1:] != -100).sum()"
MEAN_OF_MEANS = "num_here = torch.tensor(1)"


def numbers_in(output):
    """Per step: loss, gradient norm and targets."""
    steps = re.findall(r"^step \d  loss (\S+)  norm (\S+)  targets (\d+)$", output, re.MULTILINE)
    return [tuple(map(float, step)) for step in steps]


@pytest.fixture(scope="module")
def one(home):
    run = launch(home, "recipes/minimal.py")
    assert run.returncode == 0, run.stderr[-3000:]
    return numbers_in(run.stdout)


def test_two_ranks_print_what_one_process_prints(one, home):
    run = launch(home, *TWO_RANKS, "recipes/minimal.py")
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(one) == 5
    assert one == [pytest.approx(step, rel=1e-5) for step in numbers_in(run.stdout)]
    assert one[-1][0] < one[0][0] - 1


def test_the_mean_of_means_depends_on_the_ranks_and_is_another_loss(one, tmp_path):
    recipe = (RECIPES / "minimal.py").read_text()
    assert recipe.count(EXACT) == 1
    (tmp_path / "changed.py").write_text(recipe.replace(EXACT, MEAN_OF_MEANS))
    changed = [numbers_in(run_ranks(_output_of, n, str(tmp_path / "changed.py"), init=False)[0]) for n in (1, 2)]
    assert [steps[0][2] for steps in changed] == [8, 8], "micro-batches in place of targets"
    for a, b in itertools.combinations([one, *changed], 2):
        assert a[0][1] != pytest.approx(b[0][1], rel=1e-2), "the first gradient's norm"
        assert a[3][0] != pytest.approx(b[3][0], rel=5e-3), "the loss after three steps"


_kept = []
"""What a script leaves, until its process ends: DDP that is taken down before waits, with the interpreter's lock, for
threads of gloo that may wait for that lock (torch 2.13)."""


def _output_of(script):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        _kept.append(runpy.run_path(script, run_name="__main__"))
    return output.getvalue()
