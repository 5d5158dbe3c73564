"""The trainers of trl and their names: which are exact, which are refused, and what the package reads of them."""

import inspect
import re

import pytest
from datasets import Dataset
from transformers import Trainer

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets import trl as trl_trainers
from hf_gradutils.trainer import GradUtilsTrainerMixin
from hf_gradutils.upstream.trl import TRL_AUXILIARY, TRL_METRICS
from tests.harness.trainer_cases import reset_accelerate
from tests.trainer.trl_cases import MARKS, make_data, make_llama, make_tokenizer, trl

pytestmark = MARKS


# ---- Trainers that weight or batch by themselves ----


class ExactKTO(GradUtilsTrainerMixin, trl.KTOTrainer):
    pass


def test_a_trainer_whose_loss_changes_with_its_micro_batch_is_refused(tmp_path):
    reset_accelerate()
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(make_data())]
    with pytest.raises(InvalidArgumentError, match="KTOTrainer estimates a divergence from each micro-batch"):
        ExactKTO(
            model=make_llama(),
            ref_model=make_llama(12),
            args=trl.KTOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )


@pytest.mark.parametrize("name", sorted(trl_trainers.NOT_EXACT))
def test_trainers_that_are_refused_are_recognised_by_their_class(name):
    users = type(f"My{name}", (GradUtilsTrainerMixin, getattr(trl, name)), {})
    assert trl_trainers.why_not_exact(users.__new__(users)) == trl_trainers.NOT_EXACT[name]


def test_every_trainer_of_trl_is_in_the_table():
    known = {*trl_trainers.EXACT, *trl_trainers.NOT_EXACT} - {"GKDTrainer"}  # which is not exported
    assert {name for name in dir(trl) if name.endswith("Trainer")} == known


def test_a_trainer_that_overrides_an_exact_one_is_not_taken_for_it():
    of_trl = type("DistilledSFTTrainer", (trl.SFTTrainer,), {"__module__": "trl.experimental.distilled"})
    users = type("DistilledSFTTrainer", (trl.SFTTrainer,), {"__module__": "my_project"})
    assert "not known" in trl_trainers.why_not_exact(of_trl.__new__(of_trl))
    assert trl_trainers.why_not_exact(users.__new__(users)) == ""
    assert trl_trainers.why_not_exact(object()) == ""


# ---- Names of trl that the package relies on ----


@pytest.mark.parametrize("trainer_class", [trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer])
def test_the_attributes_of_trl_are_still_there(trainer_class):
    assert trainer_class.__name__ in trl_trainers.EXACT
    source = inspect.getsource(trainer_class)
    for name in TRL_METRICS:
        assert f"self.{name} = " in source, f"{trainer_class.__name__} no longer keeps {name}"
    if trainer_class is not trl.RewardTrainer:
        for name in TRL_AUXILIARY:
            assert f"self.{name} = " in source
            assert f"if self.{name}:" in source


@pytest.mark.parametrize("trainer_class", [trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer])
def test_the_mixin_hides_nothing_of_trls_trainers_but_what_it_calls(trainer_class):
    mixins = [c for c in GradUtilsTrainerMixin.__mro__ if c.__module__.startswith("hf_gradutils")]
    ours = {name for mixin in mixins for name in vars(mixin) if not name.startswith("__")}
    theirs = {name for c in trainer_class.__mro__ if c.__module__.startswith("trl") for name in vars(c)}
    attributes = set(re.findall(r"self\.(\w+) = ", inspect.getsource(trainer_class)))
    assert {name for name in ours & (theirs | attributes) if not hasattr(Trainer, name)} == set()
