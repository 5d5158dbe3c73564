"""Options a user may switch on: adapters, frozen parts, checkpointing, compilation, half precision, fp16's scaler."""

import math

import peft
import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from hf_gradutils import GradUtilsAccelerator, GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets.probe import loss_ignores_first_position
from tests.harness.gradients import norm_of, relative_error
from tests.harness.half_cases import with_scaler
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import CHECKPOINTING, IS_OLD, load, make_data, make_model, train, truth

TOLERANCE = 1e-5
COMMON = ["one_rank", "ddp2", "fsdp2x2"]


def gradient_of(model, head, data):
    model = model.double()
    batch = HEADS[head].collate(data)
    model(**batch)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_adapters(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8))
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # one of the two factors is zero at first, and so is the other's gradient
            values = 0.3 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(values)
    return adapted


@on_layouts(*COMMON, "native_fsdp2x2", "tp2")  # peft 0.21 fails on two-dimensional meshes
def test_adapters_are_exact(layout):
    if IS_OLD and layout == "native_fsdp2x2":
        pytest.skip("transformers 5.17 wraps such a model in DDP, which refuses it")
    head = "llama causal"
    data = make_data(head)
    want = gradient_of(with_adapters(make_model(head)), head, data)
    assert want
    assert all("lora" in name for name in want)
    spread = LAYOUTS[layout].loading
    model = with_adapters(load(head, spread) if spread else make_model(head))
    _, tap = train(head, 4, layout=layout, model=model, data=data)
    assert relative_error(tap.steps[0], want) < TOLERANCE


def without_embedding_and_attention(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name and "attn" not in name)
    return model


@on_layouts(*COMMON)
def test_frozen_parts_are_left_out(layout):
    head = "llama causal"
    data = make_data(head)
    want = gradient_of(without_embedding_and_attention(make_model(head)), head, data)
    model = without_embedding_and_attention(make_model(head))
    trainer, tap = train(head, 4, layout=layout, model=model, data=data)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)


class Unused(torch.nn.Module):
    """A model with a part that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.used = make_model("plain module")
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, input_ids, labels):
        return self.used(input_ids, labels)


@on_layouts(*COMMON)
def test_parts_that_no_loss_reaches_have_no_gradient(layout):
    head = "plain module"
    want, _ = truth(head, make_data(head))
    trainer, tap = train(head, 4, layout=layout, model=Unused())
    got = {name.removeprefix("used."): gradient for name, gradient in tap.steps[0].items()}
    got = {name: gradient for name, gradient in got.items() if not name.startswith("unused.") or gradient.any()}
    assert relative_error(got, want) < TOLERANCE
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)


@on_layouts(*COMMON)
@pytest.mark.parametrize(
    "option",
    [
        {CHECKPOINTING: True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
        {"average_tokens_across_devices": False},
        {"max_grad_norm": 1e9},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_change_nothing(option, layout):
    head = "llama causal"
    data = make_data(head)
    want, _ = truth(head, data)
    _, tap = train(head, 4, layout=layout, data=data, arguments=option)
    got = {name.replace("_orig_mod.", ""): gradient for name, gradient in tap.steps[0].items()}
    assert relative_error(got, want) < TOLERANCE


# ---- Half precision ----


@on_layouts(*COMMON)
def test_models_in_bfloat16_are_as_near_as_bfloat16_gets(layout):
    head = "bert classes"
    data = make_data(head)
    # The rounded weights, in float64; and the rounding that one backward over the whole batch has by itself.
    want = gradient_of(make_model(head).bfloat16(), head, data)
    _, whole = train(head, 1, layout=layout, model=make_model(head).bfloat16(), data=data)
    _, tap = train(head, 8, layout=layout, model=make_model(head).bfloat16(), data=data)
    inherent = relative_error(whole.steps[0], want)
    assert inherent < 0.03
    assert relative_error(tap.steps[0], want) < 1.5 * inherent


def test_autocast_to_bfloat16_is_as_near_too():
    head = "bert classes"
    want, _ = truth(head, make_data(head))
    _, tap = train(head, 8, arguments={"bf16": True})
    assert relative_error(tap.steps[0], want) < 0.03


class _Scaled(GradUtilsTrainer):
    """fp16's loss scaling around a model that computes in float32, to see what scaling does."""

    init_scale = 2.0**16

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        with_scaler(self.accelerator, self.init_scale)


class _Overflowing(_Scaled):
    init_scale = 2.0**127


def large_loss(outputs, labels, num_items_in_batch=None):
    return 1000 * torch.nn.functional.cross_entropy(outputs.logits, labels)


@on_layouts("one_rank", "ddp2")
def test_gradients_are_unscaled_before_they_are_measured_and_clipped(layout):
    head = "bert classes"
    want, _ = truth(head, make_data(head))
    limit = norm_of(want) / 4
    trainer, tap = train(head, 4, trainer_class=_Scaled, arguments={"max_grad_norm": limit})
    clipped = {name: g * limit / (norm_of(want) + 1e-6) for name, g in want.items()}
    assert relative_error(tap.steps[0], clipped) < TOLERANCE
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
    before = dict(make_model(head).named_parameters())
    moved = {n: (before[n] - p).detach().double() for n, p in trainer.model.named_parameters()}
    assert relative_error(moved, {n: 0.1 * g for n, g in clipped.items()}) < 1e-4  # float32 weights, rounded


def test_an_overflow_of_the_scaler_skips_the_step():
    head = "bert classes"
    trainer, _ = train(head, 4, trainer_class=_Overflowing, compute_loss_func=large_loss)
    assert not math.isfinite(trainer.state.log_history[0]["grad_norm"])
    for before, after in zip(make_model(head).parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(before, after)


# ---- Settings ----


def test_accumulation_is_set_in_one_place():
    with pytest.raises(InvalidArgumentError, match=r"^GradUtilsPlugin\(num_steps=4, sync_each_batch=True\)"):
        train("bert classes", grad_plugin=GradUtilsPlugin(num_steps=4, sync_each_batch=True))


@ranks(2)
def test_communication_in_every_micro_batch_as_accelerate_offers_it_is_exact():
    head = "t5 seq2seq"
    want, _ = truth(head, make_data(head))
    arguments = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    assert relative_error(train(head, 4, arguments=arguments)[1].steps[0], want) < TOLERANCE


def test_the_arguments_that_are_saved_are_those_of_the_user(tmp_path):
    arguments = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer, _ = train("bert classes", 2, arguments=arguments)
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.logging_nan_inf_filter
    assert trainer.args.logging_nan_inf_filter


def test_a_smaller_batch_after_running_out_of_memory_starts_over():
    class RunsOut(GradUtilsTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if len(inputs["labels"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

    head = "bert masked"
    data = make_data(head, 4)
    want, _ = truth(head, data)
    arguments = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    _, tap = train(head, 2, data=data, trainer_class=RunsOut, arguments=arguments)
    assert relative_error(tap.steps[-1], want) < TOLERANCE


@ranks(2)
def test_control_the_stock_trainer_averages_ranks_where_tokens_are_not_averaged():
    head = "llama causal"
    want, _ = truth(head, make_data(head))
    arguments = {"average_tokens_across_devices": False}
    _, tap = train(head, 4, trainer_class=Trainer, arguments=arguments)
    assert relative_error(tap.steps[0], want) > 1e-2


def test_a_head_that_takes_no_label_minus_100_is_named_where_asking_it_has_ended_cuda():
    def loss_of(batch):
        if (batch["labels"] == -100).any():
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return batch["labels"].float().mean()

    with pytest.raises(LossUnitError, match="the head takes the label -100 for a class"):
        loss_ignores_first_position(loss_of, {"labels": torch.ones(2, 3, dtype=torch.long)})


def test_mps_is_refused(monkeypatch):
    monkeypatch.setattr(GradUtilsAccelerator, "device", torch.device("mps"))
    with pytest.raises(InvalidArgumentError, match=r"MPS has no float64.*; pass cpu=True"):
        GradUtilsAccelerator(cpu=True)
