"""Settings of GradUtilsPlugin: keywords, then variables, then defaults; and the set-ups that are refused."""

import math

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.trainer_cases import reset_accelerate


def test_a_stock_accelerator_does_not_take_the_plugin():
    reset_accelerate()
    with pytest.raises(InvalidArgumentError, match=r"use hf_gradutils\.GradUtilsAccelerator"):
        Accelerator(cpu=True, gradient_accumulation_plugin=GradUtilsPlugin(num_steps=2))


def test_the_number_of_micro_batches_comes_from_one_place(monkeypatch):
    def steps(**options):
        reset_accelerate()
        return GradUtilsAccelerator(cpu=True, **options).gradient_accumulation_steps

    assert steps() == 1
    assert steps(gradient_accumulation_steps=3) == 3
    assert steps(gradient_accumulation_plugin=GradUtilsPlugin(num_steps=4)) == 4
    assert steps(gradient_accumulation_plugin=GradUtilsPlugin(), gradient_accumulation_steps=5) == 5
    assert steps(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=6)) == 6
    with pytest.raises(InvalidArgumentError, match="leave out gradient_accumulation_steps"):
        steps(gradient_accumulation_plugin=GradUtilsPlugin(num_steps=4), gradient_accumulation_steps=5)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    assert steps() == 7
    assert steps(gradient_accumulation_plugin=GradUtilsPlugin()) == 7
    assert steps(gradient_accumulation_steps=3) == 3


@pytest.mark.parametrize("kind", [DistributedType.XLA, DistributedType.MEGATRON_LM])
def test_what_scales_gradients_itself_is_refused(kind, monkeypatch):
    reset_accelerate()
    monkeypatch.setattr(GradUtilsAccelerator, "distributed_type", kind)
    with pytest.raises(InvalidArgumentError, match=rf"{kind.value} scales and clips gradients itself.*use FSDP2"):
        GradUtilsAccelerator(cpu=True)


def test_fields_come_from_keywords_then_variables_then_defaults(monkeypatch):
    assert GradUtilsPlugin().sync is None
    for name, text in {
        "SYNC": "every",
        "NORM_TYPE": "inf",
        "CHECK_LOSS_UNIT": "no",
        "MAX_SKIPPED_STEPS": "3",
        "GRAD_NORM_GROUPS": '{"head": "*lm_head*"}',
        "OWNERSHIP": '{"*expert*": "sharded"}',
    }.items():
        monkeypatch.setenv(f"HF_GRADUTILS_{name}", text)
    plugin = GradUtilsPlugin()
    assert (plugin.sync, plugin.norm_type, plugin.check_loss_unit) == ("every", math.inf, False)
    assert (plugin.max_skipped_steps, plugin.grad_norm_groups) == (3, {"head": "*lm_head*"})
    assert plugin.ownership == {"*expert*": "sharded"}
    assert GradUtilsPlugin(sync="defer", norm_type=1).sync == "defer"


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("SYNC", "never", "HF_GRADUTILS_SYNC: sync must be one of"),
        ("ON_NONFINITE", "hope", "HF_GRADUTILS_ON_NONFINITE: on_nonfinite must be"),
        ("NORM_TYPE", "large", "HF_GRADUTILS_NORM_TYPE must be a number, got 'large'"),
        ("NORM_TYPE", "-1", "HF_GRADUTILS_NORM_TYPE: norm_type must be > 0"),
        ("MAX_SKIPPED_STEPS", "-1", "HF_GRADUTILS_MAX_SKIPPED_STEPS: max_skipped_steps must be"),
        ("FOLD_INTO_OPTIMIZER", "perhaps", "HF_GRADUTILS_FOLD_INTO_OPTIMIZER must be true or false"),
        ("OWNERSHIP", "[1]", "HF_GRADUTILS_OWNERSHIP must be JSON"),
        ("LOSS_UNIT", "words", "HF_GRADUTILS_LOSS_UNIT: loss_unit must be"),
        ("SINC", "defer", "HF_GRADUTILS_SINC sets nothing; the variables are HF_GRADUTILS_LOSS_UNIT"),
    ],
)
def test_a_bad_value_names_the_variable(variable, text, message, monkeypatch):
    monkeypatch.setenv(f"HF_GRADUTILS_{variable}", text)
    with pytest.raises(InvalidArgumentError, match=message):
        GradUtilsPlugin()


def test_a_bad_keyword_is_not_blamed_on_a_variable(monkeypatch):
    monkeypatch.setenv("HF_GRADUTILS_SYNC", "every")
    with pytest.raises(InvalidArgumentError, match=r"^sync must be one of"):
        GradUtilsPlugin(sync="never")
