"""GradUtilsTrainer under DeepSpeed takes the step of one process with the whole batch, at every ZeRO stage."""

import copy
import shutil
import tempfile
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import profile
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError, TargetCountError
from tests.harness.counting import collectives
from tests.harness.deepspeed_cases import config, reference, train, whole_weights
from tests.harness.gradients import norm_of, relative_error
from tests.harness.heads import HEADS
from tests.harness.ranks import ranks, run_ranks
from tests.harness.trainer_cases import (
    CHECKPOINTING,
    make_data,
    make_model,
    micro_batches_of,
    truth,
    truth_of_micro_batches,
)

deepspeed = pytest.importorskip("deepspeed")

TOLERANCE = 1e-5
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
SETTINGS = {
    "zero 0": config(0),
    "zero 1": config(1),
    "zero 2": config(2),
    "zero 3": config(3),
    "zero 3 offloaded": config(3, zero=OFFLOADED),
}
IN_ORDER = {"train_sampling_strategy": "sequential"}
KINDS = ["bert classes", "t5 seq2seq", "bert masked", "llama causal", "wav2vec2 ctc sum", "qwen3 moe aux"]


def wanted(head, data, accumulation):
    layout = f"ddp{dist.get_world_size()}" if dist.get_world_size() > 1 else "one_rank"
    if head == "qwen3 moe aux":
        return truth_of_micro_batches(head, micro_batches_of(data, layout, accumulation))
    return truth(head, data)


def assert_exact(settings, head, accumulation):
    data = make_data(head)
    want, want_loss = wanted(head, data, accumulation)
    done = train(head, accumulation, settings=settings, data=data, arguments=IN_ORDER)
    assert relative_error(done.change, want) < TOLERANCE, (head, accumulation)
    entry = done.log[0]
    assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
    assert entry["num_targets"] == HEADS[head].targets(HEADS[head].collate(data))


def each_kind(name, heads, accumulations):
    for head in heads:
        for accumulation in accumulations:
            assert_exact(SETTINGS[name], head, accumulation)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_stage_is_exact_on_two_ranks(name):
    run_ranks(each_kind, 2, name, KINDS[:2], (1, 8))


def test_every_kind_of_head_is_exact_on_two_ranks():
    run_ranks(each_kind, 2, "zero 2", KINDS[2:], (1, 4))


@pytest.mark.wide
@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_head_is_exact_at_every_stage(name):
    run_ranks(each_kind, 2, name, KINDS, (1, 8), deadline_s=200)


@pytest.mark.parametrize("name", ["zero 0", "zero 3"])
def test_one_rank_is_exact(name):
    run_ranks(each_kind, 1, name, KINDS[:1], (1, 4))


@ranks(2)
def test_control_the_stock_trainer_takes_steps_that_are_too_long():
    head = "bert classes"
    want, want_loss = truth(head, make_data(head))
    for stage in (0, 1, 2, 3):
        for accumulation, factor in ((1, 2), (4, 8)):
            done = train(head, accumulation, settings=config(stage), trainer_class=Trainer)
            assert relative_error(done.change, {n: factor * g for n, g in want.items()}) < TOLERANCE
            assert done.log[0]["loss"] == pytest.approx(factor * want_loss, rel=1e-5)


class _Shorter(torch.utils.data.IterableDataset):
    """Rows without a length, of which a window is filled up."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@ranks(1)
def test_a_window_is_filled_up_on_one_process():
    head = "bert masked"
    data = make_data(head, 12)
    want, losses, _ = reference(head, [data[:8], data[8:]], rate=0.1)
    arguments = IN_ORDER | {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1}
    for stage in (0, 1, 3):
        done = train(head, 4, settings=config(stage), data=_Shorter(data), arguments=arguments)
        assert relative_error(done.change, want) < TOLERANCE, stage
        assert [entry["loss"] for entry in done.log[:2]] == pytest.approx(losses, rel=1e-5)


def the_rest(name):
    settings, head = SETTINGS[name], "bert masked"
    data = make_data(head, 24)

    def steps(windows, rate=0.1, clip=None):
        return reference(head, windows, rate=rate, clip=clip)

    # A short last window: 4 micro-batches of 2 rows on each rank, then 2.
    want, losses, norms = steps([data[:16], data[16:]])
    arguments = {"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.1}
    done = train(head, 4, settings=settings, data=data, arguments=IN_ORDER | arguments)
    assert relative_error(done.change, want) < TOLERANCE
    assert [entry["loss"] for entry in done.log[:2]] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in done.log[:2]] == pytest.approx(norms, rel=1e-5)

    # A rank with fewer rows.
    want, losses, _ = steps([data[:13]], rate=1.0)
    arguments = {"per_device_train_batch_size": 1, "accelerator_config": {"even_batches": False}}
    done = train(head, 7, settings=settings, data=data[:13], arguments=IN_ORDER | arguments)
    assert relative_error(done.change, want) < TOLERANCE
    assert done.log[0]["loss"] == pytest.approx(losses[0], rel=1e-5)

    # Micro-batches without a target.
    holes = copy.deepcopy(data[:16])
    for row in holes[:6]:
        row["labels"] = torch.full_like(row["labels"], -100)
    want, losses, _ = steps([holes], rate=1.0)
    done = train(head, 8, settings=settings, data=holes, arguments=IN_ORDER)
    assert relative_error(done.change, want) < TOLERANCE
    assert done.log[0]["loss"] == pytest.approx(losses[0], rel=1e-5)

    # Clipped.
    want, _, norms = steps([data[:16]], rate=1.0, clip=0.5)
    done = train(head, 4, settings=settings, data=data[:16], arguments=IN_ORDER | {"max_grad_norm": 0.5})
    assert norms[0] > 1
    assert relative_error(done.change, want) < TOLERANCE
    assert done.log[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)

    # Activation checkpointing, and a head that does not train.
    want, _, _ = steps([data[:16]], rate=1.0)
    done = train(head, 4, settings=settings, data=data[:16], arguments=IN_ORDER | {CHECKPOINTING: True})
    assert relative_error(done.change, want) < TOLERANCE
    model = make_model(head)
    model.cls.requires_grad_(False)
    done = train(head, 4, settings=settings, model=model, data=data[:16], arguments=IN_ORDER)
    names = [name for name, p in model.named_parameters() if "encoder" in name]
    assert relative_error({n: done.change[n] for n in names}, {n: want[n] for n in names}) < TOLERANCE
    assert not any(done.change[name].any() for name in done.change if name.startswith("cls.predictions.transform"))


@pytest.mark.parametrize("name", ["zero 0", "zero 2", "zero 3 offloaded"])
def test_short_windows_uneven_ranks_empty_micro_batches_and_clipping_are_exact(name):
    run_ranks(the_rest, 2, name)


class _OwnSum(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class _OwnStep(GradUtilsTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class _TwoBackwards(_OwnStep):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.accelerator.backward(self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


class _PlainBackward(GradUtilsTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


class _PlainBeside(_OwnStep):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model(**self._prepare_inputs(dict(inputs))).logits.square().mean().backward()
        return super().training_step(model, inputs, num_items_in_batch)


class _ByTheEngine(GradUtilsTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        model.backward(loss)
        return loss.detach()


def sum_of_losses(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


@ranks(2)
def test_losses_and_steps_of_the_users_own_are_exact():
    head = "bert masked"
    want, want_loss = truth(head, make_data(head))
    for stage in (0, 2, 3):
        for options in ({"trainer_class": _OwnSum}, {"trainer_class": _OwnStep}, {"compute_loss_func": sum_of_losses}):
            done = train(head, 4, settings=config(stage), arguments=IN_ORDER, **options)
            assert relative_error(done.change, want) < TOLERANCE, options
            assert done.log[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


@ranks(2)
def test_backwards_that_would_not_be_weighted_or_averaged_stop_before_the_first_step():
    head = "bert masked"
    not_weighted = TargetCountError, "not made by accelerator.backward"
    for stage, accumulations in ((0, (1, 4)), (1, (4,)), (2, (1, 4)), (3, (4,))):
        refused = {
            _TwoBackwards: (InvalidArgumentError, "a second backward in one micro-batch"),
            _PlainBackward: not_weighted if stage else (RuntimeError, "Direct calls to"),  # by DeepSpeed
            _PlainBeside: not_weighted if stage else (RuntimeError, "Direct calls to"),
            _ByTheEngine: not_weighted,
        }
        for accumulation in accumulations:
            for trainer_class, (kind, message) in refused.items():
                model = make_model(head)
                before = whole_weights(model)
                with pytest.raises(kind, match=message):
                    train(head, accumulation, settings=config(stage), model=model, trainer_class=trainer_class)
                assert all(torch.equal(before[name], p) for name, p in whole_weights(model).items())


class _ChangesLabels(_OwnStep):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if inputs["labels"].shape[0] > 1:
            inputs["labels"][0] = -100
        return inputs


@ranks(2)
def test_labels_that_change_after_they_were_counted_stop_before_the_first_step():
    for stage in (1, 3):
        with pytest.raises(InvalidArgumentError, match="let the collator change labels"):
            train("bert masked", 4, settings=config(stage), trainer_class=_ChangesLabels)


@torch.no_grad()
def _spoiled(module):
    for p in module.parameters(recurse=False):
        p.add_(1.0)


@ranks(2)
def test_training_goes_on_from_a_checkpoint():
    head, data = "bert masked", make_data("bert masked", 32)
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    arguments = IN_ORDER | {
        "output_dir": folders[0],
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    try:
        for settings in SETTINGS.values():
            whole = train(head, 2, settings=settings, data=data, arguments=arguments)
            checkpoint = f"{folders[0]}/checkpoint-1"
            again = arguments | {"save_strategy": "no"}
            other = make_model(head).apply(_spoiled)  # nothing of it may be left
            resumed = train(head, 2, settings=settings, data=data, arguments=again, resume=checkpoint, model=other)
            want, got = whole_weights(whole.trainer.model), whole_weights(resumed.trainer.model)
            assert all(torch.equal(want[name], got[name]) for name in want)
            assert resumed.trainer.state.global_step - resumed.trainer._initial_global_step == 2
            dist.barrier()
    finally:
        dist.barrier()
        shutil.rmtree(folders[0], ignore_errors=True)


@ranks(2)
def test_the_evaluation_loss_is_that_of_the_whole_set():
    head, data = "bert masked", make_data("bert masked", 13)
    _, want = truth(head, data)
    for stage in (0, 3):
        arguments = {"eval_strategy": "steps", "eval_on_start": True, "per_device_eval_batch_size": 3}
        done = train(head, 2, settings=config(stage), arguments=arguments, eval_dataset=data)
        losses = [entry["eval_loss"] for entry in done.log if "eval_loss" in entry]
        assert len(losses) == 2
        assert losses[0] == pytest.approx(want, rel=1e-5)
        assert losses[1] < losses[0] - 0.1


@ranks(2)
def test_a_step_that_is_not_finite_is_left_out_on_all_ranks():
    head, data = "bert regression", make_data("bert regression", 32)
    data[3]["labels"] = torch.tensor(float("inf"))
    arguments = IN_ORDER | {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1}
    want, losses, _ = reference(head, [data[16:]], rate=0.1)
    for stage in (0, 1, 2, 3):
        model = make_model(head)
        before = whole_weights(model)
        with pytest.raises(NonfiniteGradientError, match=r"^step 1: the gradient is inf.*micro-batch 1 of 2 on rank 0"):
            train(head, 2, settings=config(stage), model=model, data=data, arguments=arguments)
        assert all(torch.equal(before[name], weight) for name, weight in whole_weights(model).items())

        plugin = GradUtilsPlugin(on_nonfinite="skip")
        done = train(head, 2, settings=config(stage), data=data, arguments=arguments, grad_plugin=plugin)
        assert relative_error(done.change, want) < TOLERANCE
        assert [entry["skipped_steps"] for entry in done.log[:2]] == [1, 1]
        assert done.log[1]["loss"] == pytest.approx(losses[0], rel=1e-5)
        plugin = GradUtilsPlugin(on_nonfinite="skip", max_skipped_steps=0)
        with pytest.raises(NonfiniteGradientError, match=r"max_skipped_steps=0"):
            train(head, 2, settings=config(stage), data=data, arguments=arguments, grad_plugin=plugin)

    plugin = GradUtilsPlugin(on_nonfinite="ignore")
    done = train(head, 2, settings=config(0), data=data, arguments=arguments, grad_plugin=plugin)
    assert not all(weight.isfinite().all() for weight in whole_weights(done.trainer.model).values())


class _PastTheEngine(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.model(**inputs).loss
        return (loss, None) if return_outputs else loss


class _ThroughItsModule(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model.module(**inputs).loss
        return (loss, None) if return_outputs else loss


@ranks(2)
def test_a_forward_past_the_engine_is_exact():
    head = "bert masked"
    want, _ = truth(head, make_data(head))
    for stage in (0, 2, 3):
        for trainer_class in (_PastTheEngine, _ThroughItsModule):
            done = train(head, 4, settings=config(stage), trainer_class=trainer_class)
            assert relative_error(done.change, want) < TOLERANCE, (stage, trainer_class)
    # The control: ZeRO-3 writes over the gradients of all micro-batches but the last.
    stock = type("Past", (Trainer,), {"compute_loss": _PastTheEngine.compute_loss})
    done = train("llama causal", 4, settings=config(3), trainer_class=stock)
    assert relative_error(done.change, truth("llama causal", make_data("llama causal"))[0]) > 0.1


class _TwoHeads(nn.Module):
    """Each row trains one of two equal heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, labels, task):
        hidden = self.body(x)
        losses = [
            nn.functional.cross_entropy(self.heads[one](hidden[task == one]), labels[task == one], reduction="sum")
            for one in task.unique().tolist()
        ]
        return {"loss": sum(losses) / len(labels)}


def rows_of_tasks(tasks):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 4), "task": torch.tensor(task)}
        for i, task in enumerate(tasks)
    ]


@ranks(2)
def test_ranks_that_train_different_parameters_are_refused_where_deepspeed_mixes_them_up():
    in_order = IN_ORDER | {"per_device_train_batch_size": 1}

    def step(rows, stage, **options):
        options |= {"data": rows, "model": _TwoHeads(), "arguments": in_order}
        return train("bert classes", 4, settings=config(stage), **options)

    def whole_batch(rows):
        model = _TwoHeads().double()
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        model(**batch | {"x": batch["x"].double()})["loss"].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    alike, apart = rows_of_tasks([0, 0, 1, 1] * 2), rows_of_tasks([0, 1] * 4)
    for stage in (0, 1, 2):
        assert relative_error(step(alike, stage).change, whole_batch(alike)) < TOLERANCE, stage
    assert relative_error(step(apart, 0).change, whole_batch(apart)) < TOLERANCE
    for stage in (1, 2):
        with pytest.raises(InvalidArgumentError, match=r"different parameters .*heads\.0\.bias.*use stage 0"):
            step(apart, stage)
    # The control: the mean of equally large micro-batches is the mean of the batch, but for DeepSpeed.
    assert relative_error(step(alike, 2, trainer_class=Trainer).change, whole_batch(alike)) < TOLERANCE
    assert relative_error(step(apart, 2, trainer_class=Trainer).change, whole_batch(apart)) > 0.1


class _Thaws(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.cls.requires_grad_(True)


@ranks(2)
def test_parameters_that_are_thawed_late_stop_the_training():
    model = make_model("bert masked")
    model.cls.requires_grad_(False)
    data = make_data("bert masked", 32)
    with pytest.raises(InvalidArgumentError, match="train that did not when DeepSpeed made its engine"):
        train(
            "bert masked",
            2,
            settings=config(2),
            model=model,
            data=data,
            arguments={"per_device_train_batch_size": 4, "max_steps": 2},
            callbacks=[_Thaws()],
        )


class _Counts(TrainerCallback):
    """Collectives of the third step, from the batches to the update."""

    def __init__(self):
        self.collectives = Counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profiler = profile()
            self.profiler.__enter__()
        elif state.global_step == 3:
            self.profiler.__exit__(None, None, None)
            self.collectives = collectives(list(self.profiler.events()))


@ranks(2)
def test_a_step_has_two_small_all_reduces_in_place_of_the_gather_of_the_stock_trainer():
    data = make_data("bert classes", 48)
    arguments = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_strategy": "no"}
    for stage in (1, 2, 3):
        counted = {}
        for trainer_class in (GradUtilsTrainer, Trainer):
            counts = _Counts()
            options = {"data": data, "arguments": arguments, "callbacks": [counts], "trainer_class": trainer_class}
            train("bert classes", 4, settings=config(stage), **options)
            counted[trainer_class] = counts.collectives
        assert sum(counted[Trainer].values()) > 0
        assert counted[GradUtilsTrainer] - counted[Trainer] == Counter({"all_reduce": 2}), stage
        assert counted[Trainer] - counted[GradUtilsTrainer] == Counter({"all_gather": 1}), "stock's own count"
