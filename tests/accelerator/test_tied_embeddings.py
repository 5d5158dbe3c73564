"""T5, BART and their kin under FSDP2: their embeddings are one parameter in several modules."""

import pytest
import torch
from packaging.version import Version
from transformers import Trainer

from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import CHECKPOINTING, make_data, train, truth


@pytest.mark.parametrize("head", ["t5 seq2seq", "bart seq2seq"])
@on_layouts("fsdp2x2", "hsdp2x2")
def test_they_train_exactly(layout, head):
    assert error_of_a_step(layout, head) < 1e-5


@on_layouts("fsdp2x2")
def test_so_they_do_with_activation_checkpointing(layout):
    assert error_of_a_step(layout, "t5 seq2seq", {CHECKPOINTING: True}) < 1e-5


def error_of_a_step(layout, head, arguments=None):
    _, tap = train(head, 2, layout=layout, arguments=arguments)
    return relative_error(tap.steps[0], truth(head, make_data(head))[0])


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.11 lets it pass")
@on_layouts("fsdp2x2")
def test_control_accelerate_puts_the_embedding_into_two_groups(layout):
    with pytest.raises(ValueError, match="is shared with a parameter already managed by another FSDP"):
        train("t5 seq2seq", 2, layout=layout, trainer_class=Trainer)


@on_layouts("fsdp2x2")
def test_they_resume_where_they_were(layout, tmp_path):
    arguments = {"output_dir": str(tmp_path), "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    arguments |= {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole, _ = train("t5 seq2seq", 2, layout=layout, arguments=arguments)
    again, _ = train("t5 seq2seq", 2, layout=layout, arguments=arguments, resume=str(tmp_path / "checkpoint-2"))
    losses, resumed = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, again))
    assert len(losses) == 3
    assert resumed == pytest.approx(losses, rel=1e-6)
