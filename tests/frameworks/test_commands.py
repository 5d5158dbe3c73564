"""TRL's command line, and a script, unmodified: started by ``hf-gradutils run`` and ``check``, as a user does."""

import sys

import pytest

from tests.harness.framework_programs import CHECK, OURS, PROGRAMS, STOCK, TRUTH, Layout, Run, start

pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow
SPLIT = Layout(1, 4)


def outcome(key, mode, layout, materials, folder):
    run = Run(materials, layout, mode == OURS, folder / f"{mode}-{layout.ranks}", sys.executable)
    return start(PROGRAMS[key], mode, run, timeout_s=200)


def test_trl_sft_is_exact_on_two_ranks(materials, tmp_path):
    stock = outcome("trl cli sft", STOCK, TRUTH, materials, tmp_path)
    ours = outcome("trl cli sft", OURS, Layout(2, 2), materials, tmp_path)
    assert (stock.code, ours.code) == (0, 0), ours.text[-3000:]
    assert ours.numbers == pytest.approx(stock.numbers, rel=1e-5)
    assert "SFTTrainer is exact" in ours.text
    assert "is exact" not in stock.text


def test_a_check_finds_no_fault_in_trls_reward_trainer_and_one_in_berts_head(materials, tmp_path):
    reward = outcome("trl cli reward", CHECK, SPLIT, materials, tmp_path / "reward")
    assert reward.code == 0, reward.text[-3000:]
    assert "\nEXACT: " in reward.text
    bert = outcome("peft", CHECK, SPLIT, materials, tmp_path / "bert")
    assert bert.code == 1, bert.text[-3000:]
    assert "\nWRONG: " in bert.text
    assert reward.numbers is bert.numbers is None, "nothing was trained"
