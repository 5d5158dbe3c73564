"""check_invariance under DeepSpeed: it measures every stage of ZeRO, finds what is wrong, and leaves nothing behind."""

import functools

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_gradutils import (
    GradUtilsAccelerator,
    GradUtilsPlugin,
    GradUtilsTrainer,
    check_invariance,
    check_loop_invariance,
    check_window_invariance,
)
from hf_gradutils.errors import InvarianceError, TargetCountError
from hf_gradutils.upstream.deepspeed import ENGINE_ATTRIBUTES
from tests.harness.deepspeed_cases import config, fp16_on_cpu, reset, train, use_cpu, whole_weights
from tests.harness.heads import HEADS
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, make_model
from tests.invariance.checks import COPIES, LAYOUT, PARTS, report_of_training

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings(  # DeepSpeed 0.19.8 under torch 2.13
    "ignore:.*is deprecated. Please:FutureWarning", "ignore:.*is deprecated. Please:DeprecationWarning"
)

BERT, CAUSAL, T5, MOE, PLAIN = "bert classes", "llama causal", "t5 seq2seq", "qwen3 moe aux", "plain shifting module"
TO_CPU = {"zero": {"offload_optimizer": {"device": "cpu"}}}
ALL_TO_CPU = {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
BF16 = {"bf16": {"enabled": True}}
WIDE_BF16 = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 256}}
OVERFLOWING = {"fp16": {"enabled": True, "initial_scale_power": 26, "hysteresis": 1}}


def arguments_for(settings):
    return {name: True for name in ("bf16", "fp16") if name in settings}


def report_of(trainer_class, head, stage, *, more=None, **options):
    """The report of a check before training."""
    more = more or {}
    fp16_on_cpu()
    options["arguments"] = arguments_for(more) | options.get("arguments", {})
    return report_of_training(train, trainer_class, head, settings=config(stage, **more), **options)


# ---- What is right passes, and what is wrong is found ----


@ranks(2, deadline_s=120)
def test_ours_passes_at_every_stage():
    for head, stage, more in [(BERT, 0, {}), (T5, 1, {}), (CAUSAL, 2, TO_CPU), (MOE, 3, ALL_TO_CPU)]:
        report = report_of(GradUtilsTrainer, head, stage, more=more, arguments={"max_grad_norm": 0.01})
        assert report.passed, str(report)
        assert [row.not_compared for row in report.comparisons] == [""] * 4, str(report)
        assert all(row.gradient_error < 2e-6 for row in report.comparisons[PARTS:]), str(report)


@ranks(2, deadline_s=120)
def test_half_precision_is_compared_without_its_loss_scale():
    for stage, more in [(0, BF16), (3, FP16)]:
        report = report_of(GradUtilsTrainer, BERT, stage, more=more)
        assert report.passed, str(report)
        assert report.tolerance == 5e-2
        assert all(0 < row.gradient_error < 2e-2 for row in report.comparisons[PARTS:]), str(report)
    wrong = report_of(Trainer, BERT, 3, more=FP16).comparisons[LAYOUT].problem
    assert "the gradient is 8" in wrong
    assert "times what it should be" in wrong


@ranks(2, deadline_s=120)
def test_the_stock_trainer_is_shown_to_scale_wrongly():
    for stage in (1, 3):
        report = report_of(Trainer, BERT, stage)
        parts, whole = report.comparisons[PARTS], report.comparisons[LAYOUT]
        assert report.comparisons[COPIES].passed
        assert "the gradient is 4 times what it should be" in parts.problem
        assert "the gradient is 8 times what it should be" in whole.problem
        assert "use hf_gradutils.GradUtilsTrainer" in whole.problem
        assert whole.grad_norm[1] == pytest.approx(8 * whole.grad_norm[0], rel=1e-4)
    assert report_of(Trainer, CAUSAL, 2).passed


class PastTheEngine(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class StepsTwice(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        losses = [self.compute_loss(model, self._prepare_inputs(inputs)) for _ in range(2)]
        for loss in losses:
            self.accelerator.backward(loss)
        return sum(losses).detach()


@ranks(2, deadline_s=120)
def test_planted_faults_are_found():
    plugin = GradUtilsPlugin(count_targets=lambda inputs: inputs["labels"].numel(), check_loss_unit=False)
    report = report_of(GradUtilsTrainer, CAUSAL, 2, grad_plugin=plugin)
    for row in report.comparisons[PARTS:]:
        assert row.gradient_error > 1e-3
        assert "leave out GradUtilsPlugin(count_targets=…)" in row.problem
    for kind, num_steps in [(PastTheEngine, 0), (StepsTwice, 2)]:
        row = report_of(kind, BERT, 1).comparisons[-1]
        assert f"DeepSpeed's engine has taken {num_steps} steps in one window" in row.problem


@ranks(1, deadline_s=120)
def test_one_rank_is_checked_too():
    for stage in (0, 3):
        assert report_of(GradUtilsTrainer, CAUSAL, stage).comparisons[LAYOUT].gradient_error < 2e-6
    assert "the gradient is 8 times what it should be" in report_of(Trainer, BERT, 2).comparisons[LAYOUT].problem


# ---- Nothing has changed ----


def state_of(engine):
    """Weights, master weights, optimizer states, counters, loss scale and schedule."""
    optimizer = engine.optimizer
    scale = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    plain = (bool, int, float, str)
    return copied(
        {
            "weights": whole_weights(engine.module),
            "masters": [p for group in engine.basic_optimizer.param_groups for p in group["params"]],
            "states": list(engine.basic_optimizer.state.values()),
            "engine": {name: x for name, x in vars(engine).items() if isinstance(x, plain)},
            "optimizer": {name: x for name, x in vars(optimizer).items() if isinstance(x, plain)},
            "scale": {} if scale is None else vars(scale),
            "schedule": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        }
    )


def copied(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def are_equal(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(are_equal, a, b))
    return a == b


class CheckAfter(TrainerCallback):
    """Checks once in a training."""

    def __init__(self, num_steps):
        self.num_steps, self.trainer, self.reports = num_steps, None, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.num_steps:
            before = state_of(self.trainer.model_wrapped)
            self.reports.append(check_invariance(self.trainer, num_samples=8))
            assert are_equal(before, state_of(self.trainer.model_wrapped))


class CheckBefore(GradUtilsTrainer):
    """Checks itself before it trains."""

    report = None

    def train(self, *args, **kwargs):
        if self.report is None:
            self.report = "under way"
            self.report = check_invariance(self, num_samples=8)
        return super().train(*args, **kwargs)


def trains(stage, more, trainer_class=GradUtilsTrainer, callback=None):
    def make(*args, **kwargs):
        trainer = trainer_class(*args, callbacks=[] if callback is None else [callback], **kwargs)
        if callback is not None:
            callback.trainer = trainer
        return trainer

    arguments = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"} | arguments_for(more)
    arguments |= {"max_steps": 3, "num_train_epochs": 9, "max_grad_norm": 0.5}
    return train(BERT, 2, settings=config(stage, **more), trainer_class=make, arguments=arguments)


def is_same_training(a, b):
    return all(torch.equal(a.change[name], change) for name, change in b.change.items()) and all(
        x.get("loss") == y.get("loss") and x.get("grad_norm") == y.get("grad_norm")
        for x, y in zip(a.log, b.log, strict=True)
    )


@ranks(2, deadline_s=120)
def test_a_training_is_the_same_with_and_without_checks():
    use_cpu()
    fp16_on_cpu()
    checks = functools.partial(GradUtilsTrainer, check_invariance=True)
    for stage, more, num_steps, other in [
        (0, {}, 1, checks),
        (1, WIDE_BF16, 0, None),
        (2, OVERFLOWING, 1, None),
        (3, {}, 1, CheckBefore),
    ]:
        without = trains(stage, more)
        callback = CheckAfter(num_steps)
        assert is_same_training(without, trains(stage, more, callback=callback)), (stage, more)
        assert [report.passed for report in callback.reports] == [True]
        assert other is None or is_same_training(without, trains(stage, more, other)), (stage, more)


class StopsInAWindow(GradUtilsTrainer):
    num_left = 10**6

    def training_step(self, *args, **kwargs):
        self.num_left -= 1
        if not self.num_left:
            raise TargetCountError("planted")
        return super().training_step(*args, **kwargs)


class CheckThatStops(CheckAfter):
    """Its window of four micro-batches ends after two."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.num_steps:
            self.trainer.num_left = 5
            super().on_step_end(args, state, control)
            self.trainer.num_left = 10**6


@ranks(2, deadline_s=120)
def test_a_check_that_stops_in_a_window_leaves_no_gradients():
    for stage, more in [(1, {}), (2, TO_CPU), (3, {})]:
        callback = CheckThatStops(1)
        assert is_same_training(
            trains(stage, more), trains(stage, more, trainer_class=StopsInAWindow, callback=callback)
        ), (stage, more)
        assert [report.comparisons[-1].problem for report in callback.reports] == ["planted"]


@ranks(2, deadline_s=120)
def test_a_wrong_training_stops_at_its_start():
    plugin = GradUtilsPlugin(count_targets=lambda inputs: inputs["labels"].numel(), check_loss_unit=False)
    checks = functools.partial(GradUtilsTrainer, check_invariance=True, grad_plugin=plugin)
    with pytest.raises(InvarianceError, match="count_targets"):
        train(CAUSAL, 2, settings=config(3), trainer_class=checks)


# ---- Loops ----


def loss_and_targets(head, model, batch):
    return model(**batch)["loss"], HEADS[head].targets(batch)


def loop_report(kind, stage, head=CAUSAL, accumulation=4, loss=None, **options):
    use_cpu()
    reset()
    PartialState(cpu=True)
    settings = config(stage) | {
        "gradient_clipping": 0.01,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * dist.get_world_size(),
    }
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    accelerator = kind(deepspeed_plugin=plugin, gradient_accumulation_steps=accumulation)
    made = make_model(head)
    engine, _ = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    loss = functools.partial(loss_and_targets, head) if loss is None else loss
    before = whole_weights(engine.module)
    report = check_loop_invariance(
        accelerator, engine, make_data(head), HEADS[head].collate, loss, num_samples=8, **options
    )
    assert are_equal(before, whole_weights(engine.module))
    assert engine.gradient_accumulation_steps() == accelerator.gradient_accumulation_steps == accumulation
    return report


@ranks(2, deadline_s=120)
def test_a_loop_is_checked_too():
    for stage in (0, 3):
        report = loop_report(GradUtilsAccelerator, stage)
        assert report.passed, str(report)
        assert all(row.gradient_error < 2e-6 for row in report.comparisons[PARTS:])
    stock = loop_report(Accelerator, 2).comparisons[LAYOUT]
    assert "use hf_gradutils.GradUtilsAccelerator" in stock.problem
    assert loop_report(Accelerator, 1, head=BERT, accumulation=1).passed  # each row has one target
    wrong = loop_report(GradUtilsAccelerator, 1, loss=lambda model, batch: (model(**batch).loss, len(batch["labels"])))
    assert "num_targets is not the number of targets that the loss is a mean over" in wrong.comparisons[PARTS].problem


@ranks(2, deadline_s=120)
def test_what_cannot_be_built_or_measured_is_not_compared():
    row = loop_report(GradUtilsAccelerator, 3, head=PLAIN).comparisons[LAYOUT]
    assert "pass make_model=…" in row.not_compared
    given = loop_report(GradUtilsAccelerator, 3, head=PLAIN, make_model=lambda: make_model(PLAIN))
    assert given.comparisons[LAYOUT].gradient_error < 2e-6
    row = loop_report(GradUtilsAccelerator, 3, head=PLAIN, make_model=dict).comparisons[LAYOUT]
    assert "the whole model cannot be made on one process" in row.not_compared  # on rank 0; the others do not wait

    class Swapping(GradUtilsAccelerator):
        def prepare(self, *args, **kwargs):
            engine, optimizer = super().prepare(*args, **kwargs)
            engine.optimizer.swap_optimizer = True
            return engine, optimizer

    report = loop_report(Swapping, 3, head=PLAIN)
    assert report.verdict == "NOT COMPARED"
    assert "in files" in report.comparisons[0].not_compared


def has_what_the_check_relies_on(engine):
    import transformers.integrations.deepspeed as integration

    is_partitioning = engine.zero_optimization_stage() in (1, 2)
    assert [name for name in ENGINE_ATTRIBUTES if not hasattr(engine, name)] == []
    assert hasattr(integration, "_hf_deepspeed_config_weak_ref")
    return not is_partitioning or all(
        hasattr(engine.optimizer, name)
        for name in ("_release_preflattened_grad_buffers", "all_grad_tensors", "averaged_gradients", "cpu_offload")
    )


@ranks(2, deadline_s=120)
def test_a_loop_with_the_engine_itself_is_checked_too():
    import deepspeed

    use_cpu()
    for stage, is_right in [(1, True), (3, True), (2, False)]:
        reset()
        settings = config(stage) | {"gradient_clipping": 0.01, "zero_allow_untested_optimizer": True}
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "train_batch_size": 8}
        made = make_model(CAUSAL)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        engine = deepspeed.initialize(model=made, optimizer=optimizer, config=settings)[0]

        def run_window(batches, engine=engine, is_right=is_right):
            num_targets = torch.tensor(float(sum(HEADS[CAUSAL].targets(batch) for batch in batches)))
            dist.all_reduce(num_targets)
            total = torch.zeros(())
            for batch in batches:
                loss, num_here = loss_and_targets(CAUSAL, engine, batch)
                share = loss * num_here / num_targets
                if is_right:
                    engine.backward(share * dist.get_world_size(), scale_wrt_gas=False)
                else:
                    engine.backward(loss)
                engine.step()
                total += share.detach()
            dist.all_reduce(total)
            return total

        loss = functools.partial(loss_and_targets, CAUSAL)
        report = check_window_invariance(
            engine, make_data(CAUSAL), HEADS[CAUSAL].collate, run_window, loss, num_samples=8
        )
        assert report.passed == is_right, str(report)
        assert engine.global_steps == engine.micro_steps == 0
        assert has_what_the_check_relies_on(engine)
