"""Sync policies in the Trainer and in the loop of accelerate, counted."""

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.tiny_net import make_net, summed_loss, true_mean_gradient
from tests.harness.trainer_cases import IS_OLD, make_data, make_model, train, truth
from tests.sync.policy_cases import (
    ACCUMULATION,
    COUNTS,
    POLICIES,
    counted,
    error_of,
    lines_logged,
    micro_batches,
    num_groups,
    times,
)

HEAD = "llama causal"


class Counting(GradUtilsTrainer):
    """Counts the collectives of every forward and backward."""

    def training_step(self, *args, **kwargs):
        losses = []
        pair = counted(lambda: losses.append(super(Counting, self).training_step(*args, **kwargs)))
        self.counts = [*getattr(self, "counts", []), pair]
        return losses[0]

    def per_step(self, accumulation=ACCUMULATION):
        starts = range(0, len(self.counts), accumulation)
        sums = [tuple(map(sum, zip(*self.counts[i : i + accumulation], strict=True))) for i in starts]
        return [times(pair, 1 / num_groups(self.model_wrapped)) for pair in sums]


def with_adapters(model):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def assert_a_step_communicates_as_promised(layout, want, make):
    for sync in POLICIES:
        trainer, tap = train(
            HEAD,
            ACCUMULATION,
            layout=layout,
            model=make(),
            trainer_class=Counting,
            grad_plugin=GradUtilsPlugin(sync=sync),
            arguments={"max_steps": 2, "ddp_find_unused_parameters": False},
        )
        # The first step also looks at the model: buckets, copies, the unit of the loss.
        assert trainer.per_step()[1] == COUNTS[layout.removeprefix("native_")][sync], sync
        assert relative_error(tap.steps[0], want) < 1e-5, sync


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2", *([] if IS_OLD else ["native_hsdp2x2"]))
def test_a_step_of_the_trainer_communicates_as_the_policy_says(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    assert_a_step_communicates_as_promised(layout, want, lambda: None)


@on_layouts("fsdp2x2")
def test_so_it_does_with_adapters(layout):
    alone = with_adapters(make_model(HEAD)).double()
    alone(**HEADS[HEAD].collate(make_data(HEAD)))["loss"].backward()
    want = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert_a_step_communicates_as_promised(layout, want, lambda: with_adapters(make_model(HEAD)))


class Interrupted(GradUtilsTrainer):
    """Stops once, in the middle of its first window, and is started again."""

    num_steps = 0

    def training_step(self, *args, **kwargs):
        self.num_steps += 1
        loss = super().training_step(*args, **kwargs)
        if self.num_steps == 2:
            raise KeyboardInterrupt
        return loss

    def train(self, *args, **kwargs):
        if not self.num_steps:
            with pytest.raises(KeyboardInterrupt):
                super().train(*args, **kwargs)
        return super().train(*args, **kwargs)


@on_layouts("native_fsdp2x2")
def test_a_training_that_was_interrupted_starts_afresh(layout):
    _, tap = train(HEAD, ACCUMULATION, layout=layout, trainer_class=Interrupted)
    assert relative_error(tap.steps[0], truth(HEAD, make_data(HEAD))[0]) < 1e-5


@on_layouts("fsdp2x2")
def test_auto_settles_in_the_third_step_of_the_trainer(layout):
    lines = lines_logged()
    options = {"grad_plugin": GradUtilsPlugin(sync="auto"), "arguments": {"max_steps": 4}}
    trainer, _ = train(HEAD, ACCUMULATION, layout=layout, trainer_class=Counting, **options)
    assert [num_reduce_scatters for num_reduce_scatters, _ in trainer.per_step()] == [4, 4, 1, 1]
    assert len(lines) == (dist.get_rank() == 0)


def each_batch():
    # A dict of its own each time: transformers writes into it.
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


@ranks(2)
def test_accelerates_own_option_means_every():
    arguments = {"max_steps": 2, "ddp_find_unused_parameters": False}
    trainer, _ = train(HEAD, ACCUMULATION, trainer_class=Counting, arguments=arguments | each_batch())
    assert trainer.per_step()[1] == COUNTS["ddp2"]["every"]
    with pytest.raises(InvalidArgumentError, match="sync='auto' and accelerate's sync_each_batch=True contradict"):
        train(HEAD, ACCUMULATION, grad_plugin=GradUtilsPlugin(sync="auto"), arguments=each_batch())


@ranks(2)
def test_the_loop_of_accelerate_communicates_as_the_policy_says():
    plugin = GradientAccumulationPlugin(num_steps=ACCUMULATION, sync_with_dataloader=False)
    for sync in POLICIES:
        stock = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        accelerator = GradUtilsAccelerator.adopt(stock, GradUtilsPlugin(sync=sync))
        accelerator.step = 0
        model = accelerator.prepare(make_net())
        assert isinstance(model, DistributedDataParallel)

        def window(accelerator=accelerator, model=model):
            for x, y, mask in micro_batches():
                with accelerator.accumulate(model):
                    summed_loss(model, x, y, mask).backward()
            assert accelerator.sync_gradients

        window()
        model.zero_grad()
        assert counted(window) == COUNTS["ddp2"][sync], sync
        assert error_of(model, true_mean_gradient()) < 1e-12
        with accelerator.no_sync(model):
            assert model.require_backward_grad_sync is (sync == "every")
