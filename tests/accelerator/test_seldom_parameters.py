"""Parameters that few micro-batches use: FSDP2 loses and rounds none of their gradients, DDP averages them all."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import Trainer

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.sync import SyncContext
from hf_gradutils.upstream.fsdp import _fsdp2_groups, fsdp2_adds_shards_by_position
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.half_cases import SELDOM, Seldom, collate, seldom_rows
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import fsdp_on_cpu, make_data, make_model, reset_accelerate, train, truth

NEEDS_EVERY_PARAMETER = fsdp2_adds_shards_by_position()
"""Before torch 2.15."""


@pytest.mark.parametrize("kind", SELDOM)
@on_layouts("fsdp2x2", "hsdp2x2")
def test_a_part_that_is_first_used_in_the_last_micro_batch_gets_the_gradient_of_every(layout, kind):
    num_ranks = LAYOUTS[layout].num_data_ranks
    rows = seldom_rows(8 * num_ranks, lambda index: index >= 6 * num_ranks)  # of 4 micro-batches the last
    steps = {}
    for sync in ("defer", "every"):
        _, tap = train(
            "plain module",
            4,
            layout=layout,
            model=Seldom(kind),
            data=rows,
            data_collator=collate,
            arguments={"bf16": True, "train_sampling_strategy": "sequential", "max_steps": 2},
            grad_plugin=GradUtilsPlugin(sync=sync, loss_unit="tokens"),
        )
        steps[sync] = tap.steps
    for deferred, every in zip(*steps.values(), strict=True):
        assert set(deferred) == set(every)
        assert relative_error(deferred, every) < 1e-6
    assert deferred[SELDOM[kind]].any()
    want = true_gradients(Seldom(kind), rows[: 6 * num_ranks], rows[6 * num_ranks :])
    assert relative_error(steps["defer"][0], want) < 0.02


def true_gradients(model, often, seldom):
    """Of the mean over all targets in float64; the last rows need the seldom part."""
    model.double()
    parts = [collate(often), collate(seldom)]
    counts = [(part["labels"] != -100).sum() for part in parts]
    for part, count in zip(parts, counts, strict=True):
        (model(**part)["loss"] * (count / sum(counts))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def seldom_in_bf16():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fully_shard(Seldom("rare branch"), mp_policy=policy)


@pytest.mark.skipif(not NEEDS_EVERY_PARAMETER, reason="torch 2.15 widens by itself")
@ranks(2)
def test_control_torch_refuses_to_reduce_gradients_of_two_dtypes():
    model = seldom_in_bf16()
    first, last = (collate([row]) for row in seldom_rows(2, lambda index: index == 1))
    model.set_requires_gradient_sync(False)
    model(**first)["loss"].backward()
    model.set_requires_gradient_sync(True)
    with pytest.raises(AssertionError, match="uniform gradient dtype"):
        model(**last)["loss"].backward()


@ranks(2)
def test_what_is_widened_for_the_last_micro_batch_is_put_back():
    model = seldom_in_bf16()
    for _ in range(2):
        for index, row in enumerate(seldom_rows(2, lambda index: index == 1)):
            with SyncContext(model, is_last=index == 1):
                model(**collate([row]))["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert {g.dtype for g in gradients.values() if g is not None} == {torch.float32}
        assert gradients["gate"] is not None
        model.zero_grad()
    if NEEDS_EVERY_PARAMETER:
        unsharded = [p._unsharded_param for group in _fsdp2_groups(model) for p in group.fsdp_params]
        assert all(p.grad_dtype == p.dtype == torch.bfloat16 and p.grad is None for p in unsharded)


# ---- Loops that end their windows in other ways ----


class Loop:
    """accelerate's loop over four micro-batches of two ranks, of which only the last needs the seldom part."""

    def __init__(self, layout):
        reset_accelerate()
        self.rows = seldom_rows(16, lambda index: index >= 12)
        plugin = GradUtilsPlugin(num_steps=4, accumulate_in_float32=layout == "ddp2", sync="defer")
        self.own = Seldom("rare branch")
        options = {"kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]}
        if layout == "fsdp2x2":
            options |= {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2), "mixed_precision": "bf16"}
        else:
            self.own = self.own.bfloat16()
        with fsdp_on_cpu() if layout == "fsdp2x2" else contextlib.nullcontext():
            self.accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=plugin, **options)
            self.model, self.optimizer = self.accelerator.prepare(
                self.own, torch.optim.AdamW(self.own.parameters(), lr=0.0)
            )
        assert LAYOUTS[layout].is_right(self.model)

    def batches(self):
        place = dist.get_rank()
        return [collate(self.rows[start + 2 * place : start + 2 * place + 2]) for start in range(0, 16, 4)]

    def backward(self, batch, scale=1.0):
        labels = batch["labels"]
        self.accelerator.backward(scale * self.model(**batch)["loss"], num_targets=(labels != -100).sum())

    def error(self):
        self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf)
        got = whole_gradients(self.model)
        alone = Seldom("rare branch") if isinstance(self.model, FSDPModule) else Seldom("rare branch").bfloat16()
        want = true_gradients(alone, self.rows[:12], self.rows[12:])
        assert want["gate"].any()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return relative_error(got, want)


def no_sync_and_then_bare(loop):
    *waiting, last = loop.batches()
    for batch in waiting:
        with loop.accelerator.no_sync(loop.model):
            loop.backward(batch)
    loop.backward(last)


def two_losses_in_each(loop):
    for batch in loop.batches():
        with loop.accelerator.accumulate(loop.model):
            loop.backward(batch, 0.25)
            loop.backward(batch | {"flag": batch["flag"].clone()}, 0.75)


def with_the_model_inside(loop):
    for batch in loop.batches():
        with loop.accelerator.accumulate(loop.own):
            loop.backward(batch)


@pytest.mark.parametrize("run_window", [no_sync_and_then_bare, two_losses_in_each, with_the_model_inside])
@on_layouts("ddp2", "fsdp2x2")
def test_loops_that_end_their_windows_in_other_ways_are_right_too(layout, run_window):
    loop = Loop(layout)
    for _ in range(2):
        run_window(loop)
        assert loop.error() < 0.02


# ---- DDP that has not averaged ----


class Partly(nn.Module):
    def __init__(self, used):
        super().__init__()
        self.used, self.unused = used, nn.Linear(2, 2)

    def forward(self, pixel_values, labels):
        return self.used(pixel_values=pixel_values, labels=labels)


def error_where_a_part_is_not_used(trainer_class, num_steps):
    """Of the first step's gradient, under DDP that was not asked to look for unused parameters."""
    head = "vit images"
    arguments = {"max_steps": num_steps, "ddp_find_unused_parameters": False}
    _, tap = train(head, trainer_class=trainer_class, model=Partly(make_model(head)), arguments=arguments)
    want, _ = truth(head, make_data(head))
    return relative_error(tap.steps[0], {f"used.{name}": gradient for name, gradient in want.items()})


@on_layouts("ddp2")
def test_ddp_that_waits_for_a_part_that_is_not_used_is_noticed_before_the_first_step(layout):
    with pytest.raises(
        InvalidArgumentError,
        match="^DDP has not averaged all gradients of the model: it waits for parameters that took no part in "
        r"the loss \(.*ddp_find_unused_parameters=True",
    ):
        error_where_a_part_is_not_used(GradUtilsTrainer, 1)


@on_layouts("ddp2")
def test_control_the_stock_trainer_takes_that_step_and_stops_in_the_next(layout):
    assert error_where_a_part_is_not_used(Trainer, 1) > 0.1, "its gradients are not averaged"
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        error_where_a_part_is_not_used(Trainer, 2)
