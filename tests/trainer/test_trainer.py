"""GradUtilsTrainer takes the step of one process with the whole batch, for every head, cut and layout here."""

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer, clip_gradients, get_sync_ctx, reduce_loss, rescale_gradients
from hf_gradutils.accelerator import GradUtilsPlugin
from tests.harness.gradients import norm_of, relative_error
from tests.harness.heads import HEADS, collate
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import (
    GradientTap,
    make_data,
    make_model,
    micro_batches_of,
    train,
    truth,
    truth_of_micro_batches,
)

TOLERANCE = 1e-5
COMMON = ["one_rank", "ddp2", "fsdp2x2"]


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_exact_on_one_rank_and_on_two(head, layout):
    assert_exact(layout, head, *((1, 8) if layout == "one_rank" else (4,)))


@on_layouts("fsdp2x2")
@pytest.mark.parametrize("head", ["llama causal", "bert masked", "t5 seq2seq", "bert classes"])
def test_every_kind_of_head_is_exact_under_fsdp2(head, layout):
    assert_exact(layout, head, 1, 4, 8)


@on_layouts("hsdp2x2", "native_fsdp2x2", "native_hsdp2x2", "tp2", "tp2_fsdp2x2", "ep2_fsdp2x2")
def test_a_mixture_of_experts_with_qk_norm_and_auxiliary_loss_is_exact_in_every_layout(layout):
    assert_exact(layout, "qwen3 moe aux", 8)


def assert_exact(layout, head, *accumulations):
    data = make_data(head, 32)
    for accumulation in accumulations:
        splits = micro_batches_of(data, layout, accumulation) if head == "qwen3 moe aux" else [data]
        want, want_loss = truth_of_micro_batches(head, splits)
        arguments = {"train_sampling_strategy": "sequential"}
        trainer, tap = train(head, accumulation, layout=layout, data=data, arguments=arguments)
        assert relative_error(tap.steps[0], want) < TOLERANCE, accumulation
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
        assert entry["num_targets"] == HEADS[head].targets(HEADS[head].collate(data))


@pytest.mark.parametrize("head", HEADS)
def test_control_the_stock_trainer_is_wrong_where_it_is_said_to_be(head):
    want, _ = truth(head, make_data(head, 32))
    _, tap = train(head, 8, trainer_class=Trainer, data=make_data(head, 32))
    error = relative_error(tap.steps[0], want)
    assert error < TOLERANCE if HEADS[head].stock_is_exact else error > 1e-2


@on_layouts("tp2")
def test_control_the_stock_trainer_sums_qk_norms_gradients_too_often_under_tensor_parallelism(layout):
    head = "qwen3 causal"
    data = make_data(head, 32)
    want, _ = truth(head, data)
    assert relative_error(train(head, 8, layout=layout, data=data, trainer_class=Trainer)[1].steps[0], want) > 1e-2
    assert relative_error(train(head, 8, layout=layout, data=data)[1].steps[0], want) < TOLERANCE


@on_layouts(*COMMON)
def test_clipping_is_to_the_norm_of_the_whole_batch(layout):
    head = "t5 seq2seq"
    want, _ = truth(head, make_data(head))
    limit = norm_of(want) / 4
    trainer, tap = train(head, 4, layout=layout, arguments={"max_grad_norm": limit})
    clipped = {name: g * limit / (norm_of(want) + 1e-6) for name, g in want.items()}
    assert relative_error(tap.steps[0], clipped) < TOLERANCE
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)


@on_layouts("one_rank", "ddp2")
def test_a_loop_written_from_the_utilities_takes_the_same_step(layout):
    head, accumulation, limit = "bert masked", 4, 0.5
    trainer, _ = train(head, accumulation, arguments={"max_grad_norm": limit})

    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = make_model(head)
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, losses, num_tokens = make_data(head)[rank::world_size], [], torch.tensor(0)
    size = len(data) // accumulation
    for micro in range(accumulation):
        batch = collate(data[micro * size : (micro + 1) * size])
        num_targets = batch["labels"].ne(-100).sum()
        with get_sync_ctx(model, is_optim_step=micro == accumulation - 1):
            loss = model(**batch).loss * num_targets
            loss.backward()
        losses.append(loss.detach())
        num_tokens += num_targets
    rescale_gradients(model, num_tokens)
    grad_norm = clip_gradients(model, limit)
    optimizer.step()
    loss, denominator = reduce_loss(losses, num_tokens)

    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx((loss / denominator).item(), rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-5)
    assert entry["num_targets"] == denominator.item()
    start = dict(make_model(head).named_parameters())
    moved = {n: (p - start[n]).detach().double() for n, p in trainer.model.named_parameters()}
    by_hand = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    want = {n: (by_hand[n] - start[n]).detach().double() for n in start}
    assert relative_error(moved, want) < TOLERANCE


@on_layouts(*COMMON)
def test_a_short_last_window_is_stepped_with_its_own_count(layout):
    head = "t5 seq2seq"
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    data = make_data(head, 10 * world_size)
    # 5 micro-batches of 2 on each rank, windows of 3 and 2; no learning, so that both are at the same weights
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer, tap = train(head, 3, layout=layout, data=data, arguments=options)
    targets = [e["num_targets"] for e in trainer.state.log_history if "loss" in e]
    assert len(tap.steps) == 2
    whole, _ = truth(head, data)
    total = sum(targets)
    joined = {n: (tap.steps[0][n] * targets[0] + tap.steps[1][n] * targets[1]) / total for n in whole}
    assert relative_error(joined, whole) < TOLERANCE
    assert total == int(collate(data)["labels"].ne(-100).sum())
    assert targets[0] != targets[1]


def test_the_logged_loss_over_several_steps_is_the_mean_of_theirs():
    head = "bert masked"
    one_by_one = [e["loss"] for e in train(head, 2, arguments={"max_steps": 4})[0].state.log_history if "loss" in e]
    pairs = train(head, 2, arguments={"max_steps": 4, "logging_steps": 2})[0].state.log_history
    assert [e["loss"] for e in pairs if "loss" in e] == pytest.approx(
        [sum(one_by_one[:2]) / 2, sum(one_by_one[2:]) / 2], rel=1e-6
    )
    assert pairs[-1]["train_loss"] == pytest.approx(sum(one_by_one) / 4, rel=1e-6)
    assert pairs[0]["num_targets"] == 2 * HEADS[head].targets(collate(make_data(head)))


@pytest.mark.parametrize(("head", "num_questions"), [("bert classes", 3), ("llama causal", 5)])
def test_the_check_costs_three_forwards_once_and_the_question_whether_the_head_shifts_two(head, num_questions):
    model = make_model(head)
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    train(head, 2, model=model, arguments={"max_steps": 3})
    assert modes == [(False, False)] * num_questions + [(True, True)] * 6


def test_dropout_and_random_states_are_not_disturbed_by_the_check():
    head = "bert masked"
    results = []
    for check in (True, False):
        model = make_model(head)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        tap = train(head, 2, model=model, grad_plugin=GradUtilsPlugin(check_loss_unit=check))[1]
        assert all(module.training for module in model.modules())
        results.append(tap.steps[0])
    assert relative_error(results[0], results[1]) == 0


class _OwnLoader(GradUtilsTrainer):
    def get_train_dataloader(self):
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        rows = [row for i, row in enumerate(self.train_dataset) if i % world_size == rank]
        return torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate)


@on_layouts("one_rank", "ddp2")
def test_a_loader_that_accelerate_has_not_prepared_is_exact_too(layout):
    head = "bert masked"
    data = make_data(head, 12)
    want, _ = truth(head, data)
    _, tap = train(head, 8, trainer_class=_OwnLoader, data=data, arguments={"num_train_epochs": 1, "max_steps": -1})
    assert len(tap.steps) == 1, "one short window"
    assert relative_error(tap.steps[0], want) < TOLERANCE


def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on_as_if_nothing_had_happened(tmp_path):
    head = "llama causal"
    data = make_data(head, 32)
    arguments = {"output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    arguments |= {"save_strategy": "steps", "save_steps": 3}
    whole, _ = train(head, 2, data=data, arguments=arguments)
    resumed = GradUtilsTrainer(model=make_model(head), args=whole.args, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for before, after in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert [e["loss"] for e in whole.state.log_history[:6]] == [e["loss"] for e in resumed.state.log_history[:6]]


def test_taking_several_trainers_in_turn_keeps_windows_apart():
    head = "t5 seq2seq"
    want, _ = truth(head, make_data(head))
    trainer, _ = train(head, 4, arguments={"learning_rate": 0.0})
    tap = GradientTap()
    trainer.add_callback(tap)
    trainer.train()
    assert relative_error(tap.steps[0], want) < TOLERANCE
