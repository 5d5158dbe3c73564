"""GradUtilsAccelerator in a loop under DeepSpeed."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import DataLoader

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError, TargetCountError
from tests.harness.deepspeed_cases import config, reference, reset, use_cpu, whole_weights
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.ranks import ranks
from tests.harness.shared_heads import LOSS_OF_PAIRS, SHARED_HEADS
from tests.harness.trainer_cases import make_data, make_model, truth

deepspeed = pytest.importorskip("deepspeed")

HEAD = "bert masked"
TOLERANCE = 1e-5


def make_accelerator(stage, clipping, num_steps, *, ours=True, plugin=None, **more):
    """An Accelerator whose configuration of DeepSpeed has this ``gradient_clipping``; None for no entry."""
    use_cpu()
    reset()
    PartialState(cpu=True)  # with Accelerator(cpu=True) accelerate silently leaves DeepSpeed out
    settings = config(stage, **more)
    if clipping is None:
        del settings["gradient_clipping"]
    else:
        settings["gradient_clipping"] = clipping
    deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=settings)
    if not ours:
        return Accelerator(deepspeed_plugin=deepspeed_plugin, gradient_accumulation_steps=num_steps)
    plugin = plugin or GradUtilsPlugin(num_steps=num_steps)
    return GradUtilsAccelerator(deepspeed_plugin=deepspeed_plugin, gradient_accumulation_plugin=plugin)


def prepared(accelerator, *, data=None, size=8, rate=1.0):
    """Model, optimizer and loader, ready to train."""
    model = make_model(HEAD)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loader = DataLoader(make_data(HEAD) if data is None else data, batch_size=size, collate_fn=HEADS[HEAD].collate)
    return accelerator.prepare(model, optimizer, loader)


def loop(
    stage,
    num_steps,
    *,
    clipping=0.0,
    clips=None,
    starts=True,
    steps=True,
    backwards=1,
    data=None,
    size=2,
    zeroes_first=False,
    **options,
):
    """One epoch; returns the weights' change, the norms that clipping returned, and the Accelerator."""
    data = make_data(HEAD) if data is None else data
    accelerator = make_accelerator(stage, clipping, num_steps, **options)
    model = make_model(HEAD)
    before = whole_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(data, batch_size=size, collate_fn=HEADS[HEAD].collate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    assert type(model).__name__ == "DeepSpeedEngine"
    norms, batches = [], list(loader)
    is_ours = isinstance(accelerator, GradUtilsAccelerator)
    for start in range(0, len(batches), num_steps):
        window = batches[start : start + num_steps]
        counts = [(batch["labels"] != -100).sum() for batch in window]
        if starts and is_ours:
            accelerator.start_window(sum(counts))
        for batch, count in zip(window, counts, strict=True):
            with accelerator.accumulate(model):
                if zeroes_first:
                    optimizer.zero_grad()
                for _ in range(backwards):
                    loss = model(**batch).loss
                    accelerator.backward(loss, **({"num_targets": count} if is_ours else {}))
                if accelerator.sync_gradients and clips is not None:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clips)))
                if steps:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    after = whole_weights(accelerator.unwrap_model(model))
    return {name: before[name] - after[name] for name in after}, norms, accelerator, optimizer, scheduler


@ranks(2)
def test_a_loop_is_exact_at_every_stage():
    want, losses, norms = reference(HEAD, [make_data(HEAD)])
    for stage in (0, 1, 2, 3):
        for num_steps, size, starts in ((4, 2, True), (1, 8, False)):
            change, _, accelerator, _, _ = loop(stage, num_steps, size=size, starts=starts)
            assert relative_error(change, want) < TOLERANCE, (stage, num_steps)
            assert float(accelerator.report.loss) == pytest.approx(losses[0], rel=1e-5)
            assert float(accelerator.report.grad_norm) == pytest.approx(norms[0], rel=1e-5)
            assert float(accelerator.report.num_targets) == sum((r["labels"] != -100).sum() for r in make_data(HEAD))


@ranks(2)
def test_gradients_may_be_zeroed_before_each_backward_too():
    want, _, _ = reference(HEAD, [make_data(HEAD)])
    for stage in (0, 2, 3):
        assert relative_error(loop(stage, 4, zeroes_first=True)[0], want) < TOLERANCE


@ranks(2)
def test_control_accelerates_own_loop_is_off():
    want, _, _ = reference(HEAD, [make_data(HEAD)])
    assert relative_error(loop(2, 4, ours=False)[0], want) > 1e-2


@ranks(2)
def test_the_engine_clips_as_its_configuration_says_or_the_loop_stops():
    data = make_data(HEAD)
    clipped, _, norms = reference(HEAD, [data], clip=0.5)
    to_one, _, _ = reference(HEAD, [data], clip=1.0)
    for stage in (0, 2):
        for clips in (None, 0.5):
            change, measured, *_ = loop(stage, 4, clipping=0.5, clips=clips)
            assert relative_error(change, clipped) < TOLERANCE
            assert measured == pytest.approx(norms if clips else [], rel=1e-5)
        for setting in (None, "auto"):  # both are 1.0 to DeepSpeed and accelerate
            assert relative_error(loop(stage, 4, clipping=setting, clips=1.0)[0], to_one) < TOLERANCE
            with pytest.raises(InvalidArgumentError, match=r'its configuration does not say.*"gradient_clipping": 0.0'):
                loop(stage, 4, clipping=setting)
        with pytest.raises(InvalidArgumentError, match=r'to 1, but .* says 0.5 .*"gradient_clipping": 0.5'):
            loop(stage, 4, clipping=1.0, clips=0.5)
        with pytest.raises(InvalidArgumentError, match=r'"gradient_clipping": 0.0'):
            loop(stage, 4, clipping=1.0, clips=math.inf)
        assert loop(stage, 4, clips=math.inf)[1] == pytest.approx(norms, rel=1e-5)


@ranks(2)
def test_what_a_loop_forgets_stops_it_before_the_first_step():
    for stage in (0, 3):
        with pytest.raises(InvalidArgumentError, match=r"call accelerator.start_window\(num_targets\)"):
            loop(stage, 4, starts=False)
        with pytest.raises(InvalidArgumentError, match="a second backward in one micro-batch"):
            loop(stage, 4, backwards=2)
        with pytest.raises(InvalidArgumentError, match=r"none of optimizer.step\(\)"):
            loop(stage, 1, starts=False, steps=False)
        accelerator = make_accelerator(stage, 0.0, 1)
        model = make_model(HEAD)
        with pytest.raises(InvalidArgumentError, match="was never made"):
            accelerator.backward(model(**HEADS[HEAD].collate(make_data(HEAD))).loss, num_targets=1)


@ranks(2)
def test_a_step_that_is_left_out_leaves_the_scheduler_alone_too():
    data = make_data(HEAD, 32)
    for stage in (0, 2, 3):
        accelerator = make_accelerator(stage, 0.0, 1, plugin=GradUtilsPlugin(on_nonfinite="skip"))
        model = make_model(HEAD)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        loader = DataLoader(data, batch_size=8, collate_fn=HEADS[HEAD].collate)
        before = whole_weights(model)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        skipped = []
        for index, batch in enumerate(loader):
            loss = model(**batch).loss
            if index == 0 and dist.get_rank() == 1:
                loss = loss * math.inf
            accelerator.backward(loss, num_targets=(batch["labels"] != -100).sum())
            optimizer.step()
            scheduler.step()
            skipped.append(accelerator.optimizer_step_was_skipped)
        assert skipped == [True, False]
        assert accelerator.num_skipped_steps == 1
        want, _, _ = reference(HEAD, [data[16:]])
        after = whole_weights(accelerator.unwrap_model(model))
        assert relative_error({name: before[name] - after[name] for name in after}, want) < TOLERANCE
        assert scheduler.get_last_lr() == [0.25]  # accelerate steps it once for each process


@ranks(2)
def test_what_the_engine_cannot_clip_is_refused():
    accelerator = make_accelerator(2, 0.0, 1)
    model, optimizer, loader = prepared(accelerator, size=4)
    with pytest.raises(InvalidArgumentError, match="after the last backward of a window"):
        accelerator.clip_grad_norm_(model.parameters(), math.inf)
    with pytest.raises(InvalidArgumentError, match="clips by a norm only"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(InvalidArgumentError, match="no_sync has no effect"), accelerator.no_sync(model):
        pass
    with pytest.raises(InvalidArgumentError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TargetCountError, match=r"call accelerator.backward\(loss\)"):
        optimizer.step()
    batch = next(iter(loader))
    accelerator.backward(model(**batch).loss, num_targets=(batch["labels"] != -100).sum())
    with pytest.raises(InvalidArgumentError, match="another norm than norm_type=inf"):
        accelerator.clip_grad_norm_(model.parameters(), math.inf, norm_type=math.inf)
    with pytest.raises(InvalidArgumentError, match="with all parameters of the model"):
        accelerator.clip_grad_norm_(list(model.parameters())[:2], math.inf)


@ranks(2)
def test_a_window_can_be_dropped():
    data = make_data(HEAD)
    want, _, norms = reference(HEAD, [data])
    for stage in (0, 1, 2, 3):
        for drop in ("discard_window", "zero_grad"):
            accelerator = make_accelerator(stage, 0.0, 1)
            before = whole_weights(make_model(HEAD))
            model, optimizer, loader = prepared(accelerator)
            (batch,) = loader
            for is_dropped in (True, False):
                loss = model(**batch).loss * (7 if is_dropped else 1)
                accelerator.backward(loss, num_targets=(batch["labels"] != -100).sum())
                if is_dropped:
                    accelerator.discard_window() if drop == "discard_window" else optimizer.zero_grad()
            optimizer.step()
            after = whole_weights(accelerator.unwrap_model(model))
            assert relative_error({n: before[n] - after[n] for n in after}, want) < TOLERANCE, (stage, drop)
            assert float(accelerator.report.grad_norm) == pytest.approx(norms[0], rel=1e-5)


@ranks(2)
def test_an_accelerator_that_prepares_again_still_knows_that_clipping_was_not_set():
    accelerator = make_accelerator(2, "auto", 1)
    for is_first in (True, False):
        model, optimizer, loader = prepared(accelerator)
        (batch,) = loader
        accelerator.backward(model(**batch).loss, num_targets=(batch["labels"] != -100).sum())
        with pytest.raises(InvalidArgumentError, match="does not say to what norm"):
            optimizer.step()
        if is_first:
            accelerator.free_memory()


@ranks(2)
def test_a_second_model_to_train_is_refused():
    accelerator = make_accelerator(2, 0.0, 1, train_micro_batch_size_per_gpu=8)
    for is_first in (True, False):
        model = make_model(HEAD)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if is_first:
            accelerator.prepare(model, optimizer)
        else:
            with pytest.raises(InvalidArgumentError, match="make a GradUtilsAccelerator for each"):
                accelerator.prepare(model, optimizer)


@ranks(2)
def test_a_gradient_that_is_not_finite_stops_a_loop():
    accelerator = make_accelerator(2, 0.0, 1)
    model, optimizer, loader = prepared(accelerator)
    batch = next(iter(loader))
    accelerator.backward(model(**batch).loss * (math.inf if dist.get_rank() else 1.0), num_targets=3)
    with pytest.raises(NonfiniteGradientError, match="on rank 1: inf"):
        optimizer.step()


@ranks(2)
def test_an_accelerator_that_leaves_deepspeed_out_silently_is_refused():
    use_cpu()
    reset()
    with pytest.raises(InvalidArgumentError, match="leaves out DeepSpeed with cpu=True"):
        GradUtilsAccelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(2)))


@ranks(2)
def test_a_loop_that_reads_ahead_steps_in_a_short_last_window_too():
    data = make_data(HEAD, 24)
    want, losses, _ = reference(HEAD, [data[:16], data[16:]] * 2, rate=0.1)
    for stage in (0, 2, 3):
        accelerator = make_accelerator(stage, 0.0, 4)
        before = whole_weights(make_model(HEAD))
        model, optimizer, loader = prepared(accelerator, data=data, size=2, rate=0.1)
        seen = []
        for _ in range(2):
            batches = iter(loader)
            while window := list(itertools.islice(batches, 4)):
                counts = [(batch["labels"] != -100).sum() for batch in window]
                accelerator.start_window(sum(counts), num_micro_batches=len(window))
                for batch, count in zip(window, counts, strict=True):
                    with accelerator.accumulate(model):
                        accelerator.backward(model(**batch).loss, num_targets=count)
                        optimizer.step()
                        optimizer.zero_grad()
                seen.append(float(accelerator.report.loss))
        after = whole_weights(accelerator.unwrap_model(model))
        assert seen == pytest.approx(losses, rel=1e-5)
        assert relative_error({name: (before[name] - after[name]) / 0.1 for name in after}, want) < TOLERANCE
    with pytest.raises(InvalidArgumentError, match="num_micro_batches must be ≥ 1"):
        accelerator.start_window(3, num_micro_batches=0)


@ranks(2)
def test_a_window_whose_last_micro_batch_has_no_backward_is_not_stepped_on():
    for stage in (0, 1):
        accelerator = make_accelerator(stage, 0.0, 2)
        before = whole_weights(make_model(HEAD))
        model, optimizer, loader = prepared(accelerator, size=4)
        batches = list(loader)
        accelerator.start_window((batches[0]["labels"] != -100).sum(), num_micro_batches=2)
        with accelerator.accumulate(model):
            accelerator.backward(model(**batches[0]).loss, num_targets=(batches[0]["labels"] != -100).sum())
            optimizer.step()
        with accelerator.accumulate(model), pytest.raises(InvalidArgumentError, match="had no backward"):
            optimizer.step()
        after = whole_weights(accelerator.unwrap_model(model))
        assert all(torch.equal(before[name], after[name]) for name in after)


# ---- Losses of the whole batch ----

PAIRS = SHARED_HEADS["clip pairs"]


def pairs_in_two_passes(stage):
    """A step on four micro-batches of each rank: the weights' change, and that of one process in float64."""
    data = make_data("clip pairs")
    want, _ = truth("clip pairs", data)  # before ZeRO 3, which partitions every model
    accelerator, model = make_accelerator(stage, 0.0, 4), make_model("clip pairs")
    model.logit_scale = torch.nn.Parameter(model.logit_scale.data[None])  # DeepSpeed broadcasts no scalar
    before, optimizer = whole_weights(model), torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(data, batch_size=len(data) // 8, collate_fn=PAIRS.collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.backward_whole_batch(LOSS_OF_PAIRS, list(loader))
    optimizer.step()
    after = whole_weights(accelerator.unwrap_model(model))
    return {name: before[name] - after[name] for name in before}, want


@pytest.mark.parametrize("stage", [0, 1, 2])
@ranks(2)
def test_two_passes_of_a_loop_are_exact(stage):
    assert relative_error(*pairs_in_two_passes(stage)) < TOLERANCE


@ranks(2)
def test_two_passes_are_refused_under_zero_3():
    with pytest.raises(InvalidArgumentError, match="not exact with DeepSpeed's ZeRO 3"):
        pairs_in_two_passes(3)
