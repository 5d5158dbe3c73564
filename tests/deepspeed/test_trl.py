"""The mixin in front of trl's trainers, under DeepSpeed."""

import pytest

from tests.harness.deepspeed_cases import config, reset, use_cpu, whole_weights
from tests.harness.gradients import norm_of, relative_error
from tests.harness.ranks import ranks

deepspeed = pytest.importorskip("deepspeed")
pytest.importorskip("trl")

from tests.trainer.trl_cases import MARKS, ExactDPO, ExactSFT, make_data, make_llama, make_trainer, truth  # noqa: E402

pytestmark = MARKS


@ranks(2)
def test_trls_trainers_are_exact():
    use_cpu()
    for trainer_class, loss_type in ((ExactSFT, "sft"), (ExactDPO, "sigmoid")):
        want, want_loss = truth(loss_type, make_data())
        before = whole_weights(make_llama())
        for stage in (2, 3):
            reset()
            arguments = {"deepspeed": config(stage), "learning_rate": 1.0}
            trainer = make_trainer(trainer_class, 2, 4, arguments=arguments)
            trainer.train()
            after = whole_weights(trainer.model)
            assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
            assert relative_error({name: before[name] - after[name] for name in after}, want) < 1e-5, stage
            entry = trainer.state.log_history[0]
            assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
