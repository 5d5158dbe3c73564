"""One GPU, or two ranks that share it, take the step of one process with the whole batch in float64 on the CPU."""

import functools
import math

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs
from transformers import Trainer

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from tests.gpu.cuda_cases import DEVICE, SHARED, arguments_for, assert_on, exact_attention, run
from tests.harness.accelerator_cases import run_loop
from tests.harness.gradients import norm_of, relative_error
from tests.harness.half_cases import with_scaler
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
ACCUMULATION = 8
HERE = ["llama causal", "t5 seq2seq", "bert classes"]
IN_ALL = ["one_rank", *SHARED]


def loop(layout, device, head, accumulation=ACCUMULATION, **options):
    """:func:`run_loop` on a device."""
    if device != "cpu" and LAYOUTS[layout].num_ranks > 1:
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True), InitProcessGroupKwargs(backend="gloo")]
        options["kwargs_handlers"] = handlers + options.get("kwargs_handlers", [])
    return run_loop(head, layout, accumulation, cpu=device == "cpu", **options)


# ---- float32 ----


@pytest.mark.parametrize("layout", IN_ALL)
def test_the_trainer_is_exact(layout):
    run(trainer_is_exact, layout, HERE)


def trainer_is_exact(layout, device, heads):
    for head in heads:
        data = make_data(head, 32)
        want, want_loss = truth(head, data)
        with exact_attention():
            trainer, tap = train(head, ACCUMULATION, layout=layout, data=data, arguments=arguments_for(device, layout))
        assert_on(trainer.model_wrapped, device)
        assert relative_error(tap.steps[0], want) < TOLERANCE, head
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
        assert entry["num_targets"] == HEADS[head].targets(HEADS[head].collate(data))


@pytest.mark.parametrize("head", ["t5 seq2seq", "bert classes"])
def test_control_the_stock_trainer_is_wrong(head):
    run(stock_is_wrong, "ddp2", head)


def stock_is_wrong(layout, device, head):
    data = make_data(head, 32)
    want, _ = truth(head, data)
    _, tap = train(
        head, ACCUMULATION, layout=layout, data=data, trainer_class=Trainer, arguments=arguments_for(device, layout)
    )
    assert relative_error(tap.steps[0], want) > 1e-2


@pytest.mark.parametrize("layout", IN_ALL)
def test_the_loop_of_accelerate_is_exact_and_clips_to_the_norm_of_the_whole_batch(layout):
    run(loop_is_exact, layout, HERE)


def loop_is_exact(layout, device, heads):
    for head in heads:
        rows = make_data(head, 32)
        want, want_loss = truth(head, rows)
        limit = norm_of(want) / 4
        with exact_attention():
            done = loop(layout, device, head, rows=rows, max_norm=limit)
        assert_on(done.model, device)
        clipped = {name: g * limit / (norm_of(want) + 1e-6) for name, g in want.items()}
        assert relative_error(done.gradients[0], clipped) < TOLERANCE, head
        assert done.norms == pytest.approx([norm_of(want)], rel=1e-5)
        assert done.losses == pytest.approx([want_loss], rel=1e-5)
        assert done.num_targets == [HEADS[head].targets(HEADS[head].collate(rows))]


@pytest.mark.parametrize("layout", IN_ALL)
def test_other_norms_and_norms_of_layers(layout):
    run(other_norms, layout)


def other_norms(layout, device):
    head = "llama causal"
    want, _ = truth(head, make_data(head))
    for p in (1.0, 2.0, math.inf):
        plugin = GradUtilsPlugin(norm_type=p, grad_norm_groups="layer")
        with exact_attention():
            trainer, _ = train(head, 4, layout=layout, grad_plugin=plugin, arguments=arguments_for(device, layout))
        entry = trainer.state.log_history[0]
        whole = torch.cat([g.flatten() for g in want.values()])
        assert entry["grad_norm"] == pytest.approx(torch.linalg.vector_norm(whole, p).item(), rel=1e-5)
        norms = {name.removeprefix("grad_norm/"): n for name, n in entry.items() if name.startswith("grad_norm/")}
        assert len(norms) == 5
        for group, value in norms.items():
            part = torch.cat([g.flatten() for name, g in want.items() if name.startswith(f"{group}.")])
            assert value == pytest.approx(torch.linalg.vector_norm(part, p).item(), rel=1e-5), (p, group)


# ---- A fused optimizer ----

LR, EPS = 0.01, 1e-3
"""EPS is large, so that an element whose gradient is nothing but rounding does not move by LR."""


class Untapped(GradUtilsTrainer):
    """Without anything that looks at gradients before the step, which folding does not allow."""

    def __init__(self, *args, callbacks=None, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("layout", IN_ALL)
@pytest.mark.parametrize("fold", [False, True], ids=["explicit", "folded"])
def test_fused_adamw_takes_the_step_of_float64(fold, layout):
    run(fused_step, layout, fold)


def fused_step(layout, device, fold):
    head = "llama causal"
    want, _ = truth(head, make_data(head))
    limit = norm_of(want) / 2
    reference, before = make_model(head).double(), make_model(head).double()
    for name, parameter in reference.named_parameters():
        parameter.grad = want[name] * limit / (norm_of(want) + 1e-6)
    torch.optim.AdamW(reference.parameters(), lr=LR, eps=EPS, weight_decay=0.0).step()
    moved = difference(reference, before)

    plugin = GradUtilsPlugin(fold_into_optimizer=fold)
    arguments = {"optim": "adamw_torch_fused", "learning_rate": LR, "adam_epsilon": EPS, "max_grad_norm": limit}
    arguments |= arguments_for(device, layout)
    fused = functools.partial(torch.optim.AdamW, lr=LR, eps=EPS, weight_decay=0.0, fused=True)
    with exact_attention():
        trainer, _ = train(head, 4, layout=layout, trainer_class=Untapped, grad_plugin=plugin, arguments=arguments)
        plugin = GradUtilsPlugin(num_steps=4, fold_into_optimizer=fold)
        done = loop(layout, device, head, 4, plugin=plugin, max_norm=limit, optimizer=fused)
    for optimizer in (trainer.optimizer.optimizer, done.optimizer.optimizer):
        assert all(group["fused"] for group in optimizer.param_groups)
    for model in (trainer.model_wrapped, done.model):
        assert_on(model, device)
        assert relative_error(difference(model, before), moved) < 1e-4, "float32 weights, rounded"


def difference(model, before):
    start = dict(before.named_parameters())
    moved = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        moved[name] = whole.detach().to("cpu", torch.float64) - start[name].detach()
    return moved


# ---- Half precision ----


@pytest.mark.parametrize("layout", IN_ALL)
def test_in_bfloat16_accumulating_is_as_near_as_one_batch(layout):
    run(half_is_as_near, layout, {"bf16": True}, {"mixed_precision": "bf16"}, 0.06)


@pytest.mark.parametrize("layout", IN_ALL)
def test_in_float16_gradients_are_unscaled_and_accumulating_is_as_near_as_one_batch(layout):
    run(half_is_as_near, layout, {"fp16": True}, {"mixed_precision": "fp16"}, 0.015)


class Scaled(GradUtilsTrainer):
    """fp16 with a first scale under which these small models do not overflow."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        if accelerator.scaler is not None:
            accelerator.scaler = type(accelerator.scaler)(init_scale=1024.0)
        elif self.args.fp16:  # accelerate offers it on accelerators only
            with_scaler(accelerator)


def half_is_as_near(layout, device, arguments, options, most):
    head = "llama causal"
    rows = make_data(head)
    want, want_loss = truth(head, rows)
    limit = norm_of(want) / 4
    clipped = {name: g * limit / (norm_of(want) + 1e-6) for name, g in want.items()}
    is_scaled = "fp16" in arguments
    handlers = [GradScalerKwargs(init_scale=1024.0)] if is_scaled else []

    def by_trainer(accumulation):
        given = arguments | {"max_grad_norm": limit} | arguments_for(device, layout)
        trainer, tap = train(head, accumulation, layout=layout, data=rows, trainer_class=Scaled, arguments=given)
        assert_on(trainer.model_wrapped, device)
        assert (trainer.accelerator.scaler is not None) == is_scaled
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(want_loss, rel=most)
        assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=most)
        return tap.steps[0]

    def by_loop(accumulation):
        done = loop(layout, device, head, accumulation, rows=rows, max_norm=limit, kwargs_handlers=handlers, **options)
        assert_on(done.model, device)
        assert (done.accelerator.scaler is not None) == is_scaled
        assert done.losses == pytest.approx([want_loss], rel=most)
        assert done.norms == pytest.approx([norm_of(want)], rel=most)
        return done.gradients[0]

    doors = [by_trainer] if device == "cpu" and is_scaled else [by_trainer, by_loop]
    for gradients_of in doors:
        inherent = relative_error(gradients_of(1), clipped)
        assert inherent < most
        assert relative_error(gradients_of(ACCUMULATION), clipped) < max(2 * inherent, TOLERANCE), inherent


@pytest.mark.skipif(DEVICE == "cpu", reason="accelerate has a scaler on accelerators only")
@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_an_overflow_of_the_scaler_skips_the_step(layout):
    run(overflow_skips, layout)


class Overflowing(GradUtilsTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = type(self.accelerator.scaler)(init_scale=2.0**40)


def overflow_skips(layout, device):
    head = "bert classes"
    arguments = {"fp16": True} | arguments_for(device, layout)
    trainer, _ = train(head, 4, layout=layout, trainer_class=Overflowing, arguments=arguments)
    assert not math.isfinite(trainer.state.log_history[0]["grad_norm"])
    assert trainer.accelerator.scaler is not None
    moved = difference(trainer.model_wrapped, make_model(head).double())
    assert not any(change.any() for change in moved.values())
