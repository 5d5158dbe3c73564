"""A loss of the user's own is looked at again in later steps, because a term of it may grow from nothing."""

import logging

import pytest
import torch
from torch import nn

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_model, train

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_gradutils.loss_unit"]


# ---- Terms that grow ----


class Growing(GradUtilsTrainer):
    """A penalty on the batch's mean activation, off in the first step."""

    def weight(self):
        return 0.1 * self.state.global_step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + self.weight() * outputs.logits.mean(0).square().sum()
        return (loss, outputs) if return_outputs else loss


class LateGrowing(Growing):
    def weight(self):
        return float(self.state.global_step >= 5)


class GrowingByAttribute(Growing):
    """Counts its own calls; the check must not count."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        return super().compute_loss(model, inputs, return_outputs)

    def weight(self):
        return float(self.calls > 4)


@pytest.mark.parametrize(("trainer_class", "steps"), [(Growing, 1), (LateGrowing, 10), (GrowingByAttribute, 1)])
@pytest.mark.parametrize("accumulation", [4, 16])
def test_a_term_that_grows_from_nothing_is_noticed_once(trainer_class, steps, accumulation, caplog):
    if trainer_class is GrowingByAttribute and accumulation == 16:
        return  # grows within the first step
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        trainer, _ = train("bert classes", accumulation, trainer_class=trainer_class, arguments={"max_steps": 12})
    assert trainer.state.global_step == 12
    (message,) = said(caplog)
    assert f"after {steps} optimizer steps the loss is no longer a mean over the targets counted" in message
    assert "L(AB)·n(AB) = " in message


@on_layouts("ddp2", "fsdp2x2")
def test_ranks_look_again_together(layout):
    trainer, _ = train("bert classes", 4, layout=layout, trainer_class=Growing, arguments={"max_steps": 12})
    assert trainer.state.global_step == 12


class Counting(GradUtilsTrainer):
    forwards: list[int] = []  # noqa: RUF012

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not torch.is_grad_enabled():
            Counting.forwards.append(self.state.global_step)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


def test_looking_again_costs_three_forwards_after_steps_1_and_10_and_nothing_for_transformers_own_losses():
    Counting.forwards.clear()
    train("bert classes", 4, trainer_class=Counting, arguments={"max_steps": 12})
    assert Counting.forwards == [0] * 6 + [1] * 3 + [10] * 3
    model, modes = make_model("bert classes"), []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    train("bert classes", 4, model=model, arguments={"max_steps": 12})
    assert modes == [False] * 3 + [True] * 48


def test_training_goes_on_exactly_after_looking_again():
    steps = []
    for plugin in (GradUtilsPlugin(), GradUtilsPlugin(check_loss_unit=False)):
        model = make_model("bert masked")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        options = {"model": model, "trainer_class": Counting, "grad_plugin": plugin}
        steps.append(train("bert masked", 4, arguments={"max_steps": 3}, **options)[1].steps)
    for checked, unchecked in zip(*steps, strict=True):
        assert relative_error(checked, unchecked) == 0
