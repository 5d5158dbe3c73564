"""The recipes that call ``exact``, in the ranks of a test: step 1 is that of one rank with the whole batch."""

import runpy
import sys
import warnings
from unittest import mock

import pytest
import yaml

from tests.harness.framework_programs import EXACT, LAYOUTS, PROGRAMS, RECIPES, TRUTH, Layout, Run, step_1
from tests.harness.ranks import run_ranks

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.slow

IN_CODE = {
    "sentence-transformers": "sentence_transformers_pairs.py",
    "trl SFT": "trl_sft.py",
    "trl DPO": "trl_dpo.py",
    "trl Reward": "trl_reward.py",
    "peft": "peft_lora.py",
}
"""Program → its recipe."""
STOCK_IS_WRONG = {"peft"}
"""BERT's head ignores the number of targets. The others are exact in stock: their micro-batches have equally many
rows, and SFT's model takes the number of targets."""
ALONE = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def train(key, layout, materials, folder, *, is_exact, more=()):
    """Loss and gradient norm of step 1."""
    out = folder / f"{key}-{is_exact}-{layout.ranks}-{layout.accumulation}-{len(more)}".replace(" ", "-")
    words = PROGRAMS[key].command(Run(materials, layout, is_exact, out, sys.executable))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    env = ALONE if layout.ranks == 1 else {}
    run_ranks(_run_script, layout.ranks, [*words[script:], *more], init=False, env=env)
    return step_1(out)


def _run_script(words):
    warnings.simplefilter("default")  # as when a user runs it
    with mock.patch.object(sys, "argv", words):
        runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="module", params=IN_CODE)
def program(request):
    return request.param


@pytest.fixture(scope="module")
def truth(program, materials, tmp_path_factory):
    """Of the stock program, one rank with the whole batch."""
    return train(program, TRUTH, materials, tmp_path_factory.mktemp("truth"), is_exact=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_step_1_is_that_of_the_whole_batch(program, truth, layout, materials, tmp_path):
    assert train(program, layout, materials, tmp_path, is_exact=True) == pytest.approx(truth, rel=1e-5)


def test_stock_is_as_the_page_says(program, truth, materials, tmp_path):
    stock = train(program, Layout(1, 4), materials, tmp_path, is_exact=False)
    if program in STOCK_IS_WRONG:
        assert stock["grad_norm"] > 3 * truth["grad_norm"]
    else:
        assert stock == pytest.approx(truth, rel=1e-5)


def test_a_mean_of_the_ranks_means_would_be_seen(materials, tmp_path):
    truth = train("trl SFT", TRUTH, materials, tmp_path, is_exact=False)
    means = ["--average_tokens_across_devices", "False"]
    stock = train("trl SFT", Layout(2, 2), materials, tmp_path, is_exact=False, more=means)
    assert stock["grad_norm"] != pytest.approx(truth["grad_norm"], rel=2e-4)


# ---- The files ----


def test_a_recipe_in_python_has_one_line_that_makes_it_exact():
    scripts = {path.name: path.read_text() for path in RECIPES.glob("*.py")}
    assert set(scripts) == set(IN_CODE.values())
    assert {name: len(EXACT.findall(text)) for name, text in scripts.items()} == dict.fromkeys(scripts, 1)


def test_recipes_of_command_lines_are_yaml_and_say_how_they_are_started():
    recipes = {path.name: path.read_text() for path in RECIPES.glob("*.yaml")}
    assert len(recipes) == 4
    for name, text in recipes.items():
        assert yaml.safe_load(text)["output_dir"].startswith("outputs/")
        assert f"recipes/frameworks/{name}" in text
    assert "- hf_gradutils.integrations.axolotl.ExactPlugin" in recipes.pop("axolotl.yaml")
    assert all("#   hf-gradutils run " in text for text in recipes.values())
