"""Trainers of trl, stock and ours: what is right passes."""

import pytest
from transformers import LlamaForSequenceClassification

from hf_gradutils import check_invariance
from hf_gradutils.targets import trl_terms
from tests.harness.layouts import on_layouts
from tests.invariance.checks import LAYOUT, PARTS
from tests.trainer.trl_cases import (
    MARKS,
    ExactDPO,
    ExactReward,
    ExactSFT,
    make_llama,
    make_trainer,
    trl,
)

pytestmark = MARKS


def make_reward():
    config = make_llama().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


RIGHT = {
    "stock reward": (trl.RewardTrainer, None),
    "stock sft": (trl.SFTTrainer, {}),
    "stock dpo": (trl.DPOTrainer, {}),
    "reward": (ExactReward, None),
    "sft": (ExactSFT, {}),
    "sft dft": (ExactSFT, {"loss_type": "dft"}),
    "dpo": (ExactDPO, {}),
    "dpo with sft": (ExactDPO, {"loss_type": ["sigmoid", "sft"]}),
}


@pytest.mark.parametrize("name", RIGHT)
@on_layouts("one_rank", "ddp2")
def test_trainers_that_are_right_pass(layout, name):
    kind, arguments = RIGHT[name]
    model = {"model": make_reward()} if arguments is None else {}
    trainer = make_trainer(kind, 4, 2, arguments=arguments or {}, **model)
    report = check_invariance(trainer, num_samples=8)
    assert report.passed, str(report)
    assert [row.not_compared for row in report.comparisons] == [""] * 4, str(report)
    assert all(row.gradient_error < 5e-6 for row in report.comparisons[PARTS : LAYOUT + 1])


def test_counts_of_the_other_loss_are_found(monkeypatch):
    options = {"arguments": {"loss_type": ["sigmoid", "sft"]}}
    report = check_invariance(make_trainer(trl.DPOTrainer, 4, 2, **options), num_samples=8)
    assert report.verdict == "FAILED"  # a mean of micro-batches
    counts = trl_terms.dpo_counts
    monkeypatch.setattr(trl_terms, "dpo_counts", lambda trainer, batch: counts(trainer, batch).flip(0))
    report = check_invariance(make_trainer(ExactDPO, 4, 2, **options), num_samples=8)
    assert report.verdict == "FAILED"
    assert report.comparisons[PARTS].gradient_error > 1e-3
