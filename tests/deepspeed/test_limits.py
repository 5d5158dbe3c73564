"""Refusals and warnings under DeepSpeed, before the first step; and DeepSpeed's own facts."""

import inspect
from importlib import metadata

import pytest
import torch

from hf_gradutils import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.deepspeed import ENGINE_ATTRIBUTES, OPTIMIZER_ATTRIBUTES, version_before_checked
from tests.harness.deepspeed_cases import config, fp16_on_cpu, reference, train, whole_weights
from tests.harness.gradients import relative_error
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, make_model, truth, warnings_of

deepspeed = pytest.importorskip("deepspeed")
from deepspeed.runtime.zenflow.engine import configure_zenflow  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402

HEAD = "bert classes"


def refused(message, settings, **options):
    model = make_model(HEAD)
    before = whole_weights(model)
    with pytest.raises(InvalidArgumentError, match=message):
        train(HEAD, 2, settings=settings, model=model, **options)
    assert all(torch.equal(before[name], weight) for name, weight in whole_weights(model).items())


@ranks(2)
def test_configurations_that_cannot_be_exact_are_refused():
    fp16_on_cpu()
    unclipped = config(2)
    del unclipped["gradient_clipping"]
    for wanted in (0.5, 0.0):
        refused(rf'clips .* to 1, .*set "gradient_clipping": {wanted}', unclipped, arguments={"max_grad_norm": wanted})
    refused("leaves the averaging over ranks to the step", config(1, managed_gradient_accumulation=False))
    refused("leaves no norm to log", config(2, zero={"compute_grad_norm": False}))
    refused("is not undone", config(3, gradient_predivide_factor=2.0, zero={"reduce_scatter": False}))
    for stage in (0, 2):
        autocast = {"enabled": True, "dtype": "float16"}
        refused("leaves its loss scale in the norm", config(stage, torch_autocast=autocast))


@ranks(2)
def test_settings_that_the_engine_does_not_follow_are_refused():
    for stage, setting, message in (
        (1, {"counts": "streamed"}, "counts='streamed' has no effect under DeepSpeed"),
        (1, {"sync": "every"}, "its ZeRO stage says when"),
        (1, {"accumulate_in_float32": True}, '"grad_accum_dtype": "fp32"'),
        (1, {"norm_type": 1.0}, "norm_type=1 .* 2-norm only"),
        (1, {"ownership": {"*bias*": "sharded"}}, "ownership has no effect"),
        (1, {"grad_norm_groups": "layer"}, "grad_norm_groups has no effect"),
        (1, {"on_nonfinite": "ignore"}, "leaves out such a step whatever is set"),
        (1, {"fold_into_optimizer": True}, "fold_into_optimizer=True has no effect"),
    ):
        refused(message, config(stage), grad_plugin=GradUtilsPlugin(**setting))
    clipped = {"grad_plugin": GradUtilsPlugin(norm_type=float("inf")), "arguments": {"max_grad_norm": 0.1}}
    refused("norm_type=inf .* 2-norm only", config(0), **clipped)
    takes_all = config(1, bf16={"enabled": True, "check_grad_overflow": False})
    with pytest.raises(InvalidArgumentError, match='"check_grad_overflow": false takes steps'):
        train(HEAD, 2, settings=takes_all, arguments={"bf16": True})


@ranks(2)
def test_stage_0_in_float32_has_norms_of_groups_and_other_norms():
    want, _ = truth(HEAD, make_data(HEAD))
    plugin = GradUtilsPlugin(norm_type=float("inf"), grad_norm_groups="layer")
    done = train(HEAD, 2, settings=config(0), grad_plugin=plugin)
    assert relative_error(done.change, want) < 1e-5
    largest = pytest.approx(max(float(gradient.abs().max()) for gradient in want.values()), rel=1e-5)
    entry = done.log[0]
    assert entry["grad_norm"] == largest
    assert max(value for name, value in entry.items() if name.startswith("grad_norm/")) == largest


@ranks(2)
def test_other_ways_to_communicate_are_exact():
    want, _ = truth(HEAD, make_data(HEAD))
    for stage, more in (
        (0, {"gradient_predivide_factor": 2.0}),
        (3, {"gradient_predivide_factor": 4.0, "zero": {"reduce_scatter": False}}),
        (1, {"prescale_gradients": True, "gradient_predivide_factor": 2.0}),
        (2, {"zero": {"reduce_scatter": False, "overlap_comm": True}}),
        (2, {"zero": {"round_robin_gradients": True, "contiguous_gradients": False}}),
        (3, {"zero": {"reduce_scatter": False, "contiguous_gradients": False}}),
        (3, {"zero": {"zero_hpz_partition_size": 2}}),
        (1, {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_allow_untested_optimizer": True}),
        (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    ):
        done = train(HEAD, 4, settings=config(stage, **more))
        assert relative_error(done.change, want) < 1e-5, (stage, more)


@ranks(2)
def test_a_number_in_both_configurations_is_clipped_to():
    want, _, norms = reference(HEAD, [make_data(HEAD)], clip=0.5)
    assert norms[0] > 1
    for stage in (0, 2):
        settings = config(stage, gradient_clipping=0.5)
        done = train(HEAD, 4, settings=settings, arguments={"max_grad_norm": 0.5})
        assert relative_error(done.change, want) < 1e-5
        assert done.log[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)


@ranks(2)
def test_communication_in_half_precision_is_warned_of():
    want, _ = truth(HEAD, make_data(HEAD))
    with warnings_of("hf_gradutils.accelerator") as said:
        done = train(HEAD, 2, settings=config(1, communication_data_type="bf16"))
    assert [message for message in said if "communication_data_type" in message] or torch.distributed.get_rank()
    assert 1e-4 < relative_error(done.change, want) < 1e-2


@ranks(1)
def test_an_optimizer_that_transformers_would_drop_is_warned_of():
    model = make_model(HEAD)
    passed = (torch.optim.SGD(model.parameters(), lr=0.0), None)
    with warnings_of("hf_gradutils.trainer") as said:
        train(HEAD, 2, settings=config(0), model=model, optimizers=passed)
    assert any("override create_optimizer" in message for message in said)


def test_the_engine_and_its_optimizers_have_what_is_asked_of_them():
    source = inspect.getsource(deepspeed.DeepSpeedEngine) + inspect.getsource(configure_zenflow)
    for name in ENGINE_ATTRIBUTES:
        is_set = f"self.{name}" in source or f"engine.{name} = " in source
        assert hasattr(deepspeed.DeepSpeedEngine, name) or is_set, name
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        source = inspect.getsource(optimizer)
        for name in OPTIMIZER_ATTRIBUTES:
            assert hasattr(optimizer, name) or f"self.{name} = " in source, name


def test_an_older_deepspeed_is_told_from_the_one_that_was_checked(monkeypatch):
    assert version_before_checked() == ""
    monkeypatch.setattr(metadata, "version", lambda name: "0.19.7")
    assert version_before_checked() == "0.19.7"
