"""T5, BART and their kin under FSDP2: their embeddings are one parameter in several modules."""

import pytest
import torch
from packaging.version import Version
from transformers import Trainer

from tests.harness.gradients import relative_error
from tests.harness.layouts import run
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainer_cases import CHECKPOINTING, make_data, train, truth


@pytest.mark.parametrize("layout", ["fsdp2x2", "hsdp2x2"])
@pytest.mark.parametrize("head", ["t5 seq2seq", "bart seq2seq"])
def test_they_train_exactly(head, layout):
    assert max(run(_error, layout, head)) < 1e-5


def test_so_they_do_with_activation_checkpointing():
    assert max(run(_error, "fsdp2x2", "t5 seq2seq", {CHECKPOINTING: True})) < 1e-5


def _error(layout, head, arguments=None):
    data = make_data(head)
    _, tap = train(head, 2, layout=layout, data=data, arguments=arguments)
    return relative_error(tap.steps[0], truth(head, data)[0])


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.11 lets it pass")
def test_control_accelerate_puts_the_embedding_into_two_groups():
    with pytest.raises(RankFailure, match="is shared with a parameter already managed by another FSDP"):
        run(_stock, "fsdp2x2")


def _stock(layout):
    train("t5 seq2seq", 2, layout=layout, trainer_class=Trainer)


def test_they_resume_where_they_were(tmp_path):
    whole, resumed = run_ranks(_resumed, 2, tmp_path)[0]
    assert resumed == pytest.approx(whole, rel=1e-6)


def _resumed(folder):
    arguments = {"output_dir": str(folder), "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    arguments |= {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole, _ = train("t5 seq2seq", 2, layout="fsdp2x2", arguments=arguments)
    again, _ = train("t5 seq2seq", 2, layout="fsdp2x2", arguments=arguments, resume=str(folder / "checkpoint-2"))
    return [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, again)]
