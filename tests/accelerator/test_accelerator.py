"""GradUtilsAccelerator: the loop of accelerate's documentation with one more argument, exact everywhere."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError, TargetCountError
from tests.harness.accelerator_cases import make, run_loop
from tests.harness.counting import collectives, events_of, num_host_syncs
from tests.harness.gradients import norm_of, relative_error, whole_gradients
from tests.harness.half_cases import with_scaler
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, run
from tests.harness.trainer_cases import (
    make_data,
    make_model,
    micro_batches_of,
    reset_accelerate,
    truth,
    truth_of_micro_batches,
)

TOLERANCE = 1e-5
NO_STEP = functools.partial(torch.optim.SGD, lr=0.0)
FUSED = functools.partial(torch.optim.AdamW, lr=0.1, fused=True)
HEAD = "llama causal"


# ---- The matrix ----


SUMS = ("wav2vec2 ctc sum",)
"""Heads that return no mean, which a loop of one's own divides itself."""

IN_LAYOUT = {
    "one_rank": [head for head in HEADS if head not in SUMS],
    "ddp2": [head for head in HEADS if head not in SUMS],
    "ddp4": [HEAD],
    "fsdp2x2": [HEAD, "t5 seq2seq", "bert classes", "qwen3 moe aux", "plain shifting module"],
    "hsdp2x2": [HEAD, "bert classes"],
    "native_fsdp2x2": [HEAD, "bert tokens"],
    "native_hsdp2x2": [HEAD],
    "tp2": [HEAD, "qwen3 causal"],
    "tp2_fsdp2x2": [HEAD, "qwen3 causal"],
    "ep2_fsdp2x2": ["qwen3 moe aux"],
}


@pytest.mark.parametrize("layout", IN_LAYOUT)
def test_every_head_is_exact_in_every_layout(layout):
    run(_heads_are_exact, layout)


def _heads_are_exact(layout):
    for head in IN_LAYOUT[layout]:
        for accumulation in (8,) if "qwen3 causal" in head else (1, 4) if head == HEAD else (4,):
            _is_exact(layout, head, accumulation)


def _is_exact(layout, head, accumulation):
    rows = make_data(head)
    want, loss = (
        truth_of_micro_batches(head, micro_batches_of(rows, layout, accumulation))
        if "moe aux" in head
        else truth(head, rows)
    )
    loop = run_loop(head, layout, accumulation, max_norm=math.inf)
    assert len(loop.gradients) == 1
    assert relative_error(loop.gradients[0], want) < TOLERANCE, (head, accumulation)
    assert loop.norms == pytest.approx([norm_of(want)], rel=TOLERANCE)
    assert loop.losses == pytest.approx([loss], rel=TOLERANCE)
    assert loop.num_targets == [HEADS[head].targets(HEADS[head].collate(rows))]


def test_control_the_stock_accelerator_is_not():
    reset_accelerate()
    want, _ = truth("bert tokens", rows := make_data("bert tokens"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = make_model("bert tokens")
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=HEADS["bert tokens"].collate)
    model, loader = accelerator.prepare(model, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
    assert relative_error(whole_gradients(model), want) > 1e-2


# ---- Windows ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_the_gradient_is_exact_without_clipping_and_in_a_short_last_window(layout):
    run(_short_window, layout)


def _short_window(layout):
    rows = make_data(HEAD)
    loop = run_loop(HEAD, layout, 3, batch_size=2, optimizer=NO_STEP)
    in_window = 6 * LAYOUTS[layout].num_data_ranks
    windows = [rows[start : start + in_window] for start in range(0, len(rows), in_window)]
    assert len(loop.losses) == len(windows) > 1
    assert len(windows[-1]) < in_window, "control: the last one is short"
    for got, loss, window in zip(loop.gradients, loop.losses, windows, strict=True):
        want, want_loss = truth(HEAD, window)
        assert relative_error(got, want) < TOLERANCE
        assert loss == pytest.approx(want_loss, rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_loop_that_says_no_sync_itself_is_exact(layout):
    run(_with_no_sync, layout)


def _with_no_sync(layout):
    rows = make_data(HEAD)
    size = len(rows) // (4 * LAYOUTS[layout].num_data_ranks)
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(), rows=rows, batch_size=size)
    for index, batch in enumerate(loader):
        is_last = index == len(loader) - 1
        windows, model = loop.accelerator.windows, loop.model
        with windows.sync_context(model, is_last=True) if is_last else loop.accelerator.no_sync(model):
            loss = loop.model(**batch).loss
            loop.accelerator.backward(loss, num_targets=HEADS[HEAD].targets(batch))
    loop.optimizer.step()
    assert relative_error(whole_gradients(loop.model), truth(HEAD, rows)[0]) < TOLERANCE


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2", "hsdp2x2"])
def test_every_sync_policy_gives_the_same_gradient(layout):
    run(_with_policies, layout)


def _with_policies(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    for sync in ("every", "reduce_scatter", "auto"):
        loop = run_loop(HEAD, layout, 4, plugin=GradUtilsPlugin(num_steps=4, sync=sync))
        assert relative_error(loop.gradients[0], want) < TOLERANCE


def test_ranks_with_fewer_batches_are_waited_for_and_count_for_nothing():
    run(_uneven, "ddp2", 10)  # 5 batches on 2 ranks
    run(_uneven, "ddp2", 2)  # and none on the second
    run(_uneven, "fsdp2x2", 10)


def _uneven(layout, num_rows):
    rows = make_data(HEAD, num_rows)
    want, loss = truth(HEAD, rows)
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=4), rows=rows, batch_size=2)
    accelerator, seen = loop.accelerator, 0
    with accelerator.join_uneven_inputs([loop.model], even_batches=False):
        for batch in loader:
            seen += 1
            with accelerator.accumulate(loop.model):
                accelerator.backward(loop.model(**batch).loss, num_targets=HEADS[HEAD].targets(batch))
                loop.optimizer.step()
    assert seen == -(-num_rows // 4)
    assert relative_error(whole_gradients(loop.model), want) < TOLERANCE
    assert float(accelerator.report.loss) == pytest.approx(loss, rel=TOLERANCE)
    assert loader.batch_sampler.even_batches, "as before"


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_window_that_is_given_up_leaves_nothing_behind(layout):
    run(_given_up, layout)


def _given_up(layout):
    rows = make_data(HEAD)
    size = len(rows) // (4 * LAYOUTS[layout].num_data_ranks)
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=4), rows=rows, batch_size=size)

    def micro_batch(batch):
        with loop.accelerator.accumulate(loop.model):
            loss = loop.model(**batch).loss
            loop.accelerator.backward(loss, num_targets=HEADS[HEAD].targets(batch))

    for batch in list(loader)[:3]:
        micro_batch(batch)
    loop.accelerator.discard_window(loop.model)
    for batch in loader:
        micro_batch(batch)
    loop.optimizer.step()
    assert relative_error(whole_gradients(loop.model), truth(HEAD, rows)[0]) < TOLERANCE


# ---- Several models and optimizers ----


class Regression(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


def _points(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, generator=generator) for count in counts]


def _mean(model, x):
    return model(x).square().mean(1).mean()


def _true(make_models, loss_of, parts):
    models = [model.double() for model in make_models()]
    sum(loss_of(*models, part.double()) * len(part) for part in parts).div(sum(map(len, parts))).backward()
    return [{name: p.grad for name, p in model.named_parameters()} for model in models]


def _prepared(plugin, models, num_optimizers=None, **options):
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=plugin, **options)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models[:num_optimizers]]
    prepared = accelerator.prepare(*models, *optimizers)
    return accelerator, prepared[: len(models)], prepared[len(models) :]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_two_models_with_a_loss_each_have_a_window_each(num_ranks):
    run(_two_losses, "one_rank" if num_ranks == 1 else "ddp2")


def _two_losses(layout):
    counts = [(1, 6), (5, 2), (3, 3), (4, 1)]  # rows of (the first loss, the second), in each micro-batch
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, second = (_points(seed, [c[seed] for c in counts]) for seed in (0, 1))
    want = [_true(lambda seed=seed: [Regression(seed)], _mean, parts)[0] for seed, parts in ((0, first), (1, second))]
    accumulation = len(counts) // num_ranks
    accelerator, (a, b), (step_a, step_b) = _prepared(
        GradUtilsPlugin(num_steps=accumulation), [Regression(0), Regression(1)]
    )
    for x, y in list(zip(first, second, strict=True))[rank::num_ranks]:
        with accelerator.accumulate(a, b):
            accelerator.backward(_mean(a, x), num_targets=len(x), model=a)
            step_a.step()
            accelerator.backward(_mean(b, y), num_targets=len(y), model=b)
            if accelerator.sync_gradients:
                total = accelerator.clip_grad_norm_(b.parameters(), math.inf)
            step_b.step()
    for model, gradients in zip((a, b), want, strict=True):
        assert relative_error(whole_gradients(model), gradients) < TOLERANCE
    assert float(total) == pytest.approx(norm_of(want[1]), rel=TOLERANCE)


def test_a_loss_that_trains_two_models_with_an_optimizer_each():
    parts = _points(3, [1, 5, 2])

    def both(a, b, x):
        return b(torch.nn.functional.pad(a(x), (0, 1))).square().mean(1).mean()

    want = _true(lambda: [Regression(0), Regression(1)], both, parts)
    accelerator, (a, b), steps = _prepared(GradUtilsPlugin(num_steps=3), [Regression(0), Regression(1)])
    before = [[p.detach().clone() for p in model.parameters()] for model in (a, b)]
    for part in parts:
        with accelerator.accumulate(a, b):
            accelerator.backward(both(a, b, part), num_targets=len(part))
            for optimizer in steps:
                optimizer.step()
    for model, old, gradients in zip((a, b), before, want, strict=True):
        assert relative_error(whole_gradients(model), gradients) < TOLERANCE
        for p, was, gradient in zip(model.parameters(), old, gradients.values(), strict=True):
            torch.testing.assert_close(p.double(), was.double() - 0.1 * gradient, rtol=1e-5, atol=1e-6)


def test_two_losses_of_one_window_are_refused():
    accelerator, (a, b), (step_a, _) = _prepared(GradUtilsPlugin(), [Regression(0), Regression(1)])
    (x,) = _points(0, [4])
    with accelerator.accumulate(a, b):
        accelerator.backward(_mean(a, x), num_targets=4)
        step_a.step()
        with pytest.raises(InvalidArgumentError, match="say which"):
            accelerator.backward(_mean(b, x), num_targets=4)
    with accelerator.accumulate(a):
        y = a(x)
        accelerator.backward(y.square().mean(), num_targets=4, retain_graph=True)
        with pytest.raises(InvalidArgumentError, match="add the terms"):
            accelerator.backward(y.abs().mean(), num_targets=4)
    with pytest.raises(InvalidArgumentError, match="which of the 2 prepared models"):
        accelerator.backward(_mean(a, x), num_targets=4)


def test_parameters_of_no_model_are_refused():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    model, scale = Regression(0), nn.Parameter(torch.ones(()))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([*model.parameters(), scale], lr=0.1))
    (x,) = _points(0, [4])
    accelerator.backward(_mean(model, x) * scale, num_targets=4)
    with pytest.raises(InvalidArgumentError, match="also steps on 1 parameters of no model"):
        optimizer.step()


# ---- fp16 ----


def test_optimizers_that_share_a_scaler_step_on_gradients_of_one_scale():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_steps=2)
    with_scaler(accelerator)
    accelerator.scaler.set_growth_interval(1)  # it changes at every update
    models = [Regression(0), Regression(1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    a, b, step_a, step_b = accelerator.prepare(*models, *optimizers)
    for parts in (_points(5, [1, 6]), _points(6, [3, 2])):
        want = [_true(lambda model=model: [_copy(model)], _mean, parts)[0] for model in (a, b)]
        for part in parts:
            with accelerator.accumulate(a, b):
                accelerator.backward(_mean(a, part) + _mean(b, part), num_targets=len(part))
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients()  # allowed, as in accelerate
                    accelerator.clip_grad_norm_([*a.parameters(), *b.parameters()], math.inf)
                    for model, gradients in zip((a, b), want, strict=True):
                        assert relative_error(whole_gradients(model), gradients) < TOLERANCE
                before = [[p.detach().clone() for p in model.parameters()] for model in (a, b)]
                step_a.step()
                step_b.step()
                step_a.zero_grad()
                step_b.zero_grad()
        for model, old, gradients in zip((a, b), before, want, strict=True):
            for p, was, gradient in zip(model.parameters(), old, gradients.values(), strict=True):
                torch.testing.assert_close(p.double(), was.double() - 0.1 * gradient, rtol=1e-5, atol=1e-6)
    assert accelerator.scaler.get_scale() == 2048.0, "it grew once, between the windows"


def _copy(model):
    copy = Regression(0)
    copy.load_state_dict(model.state_dict())
    return copy


def test_an_overflow_skips_the_step_and_the_scheduler_holds():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    with_scaler(accelerator, init_scale=2.0**127)
    model = Regression(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    before = [p.detach().clone() for p in model.parameters()]
    (x,) = _points(0, [4])
    accelerator.backward(1e6 * _mean(model, x), num_targets=4)
    optimizer.step()
    scheduler.step()
    assert accelerator.optimizer_step_was_skipped
    assert scheduler.get_last_lr() == [0.1]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    accelerator.backward(_mean(model, x), num_targets=4)
    assert accelerator.scaler.get_scale() < 2.0**127, "lowered for the next window"


# ---- Clipping ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2", "tp2"])
def test_any_parameters_can_be_clipped(layout):
    run(_clip_some, layout)


def _clip_some(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    stranger = Regression(9)
    stranger.layer.weight.grad = torch.full((2, 3), 2.0)
    some = {name: g for name, g in want.items() if "mlp" in name}
    rest = {name: g for name, g in want.items() if "mlp" not in name}
    assert some
    assert rest
    checked = []

    def clip(loop):
        if not loop.accelerator.sync_gradients:
            return
        accelerator = loop.accelerator
        named = dict(loop.model.named_parameters())
        limit = norm_of(some) / 2
        got = accelerator.clip_grad_norm_((p for n, p in named.items() if "mlp" in n), limit)
        assert float(got) == pytest.approx(norm_of(some), rel=TOLERANCE)
        clipped = {n: g * 0.5 for n, g in some.items()} | rest
        assert relative_error(whole_gradients(loop.model), clipped) < TOLERANCE
        assert float(accelerator.report.grad_norm) == pytest.approx(norm_of(want), rel=TOLERANCE)
        backwards = accelerator.clip_grad_norm_(reversed(list(named.values())), math.inf)
        assert float(backwards) == pytest.approx(norm_of(clipped), rel=TOLERANCE)
        one = next(n for n in named if "mlp" in n)
        largest = float(clipped[one.removeprefix("module.")].abs().max())
        assert float(accelerator.clip_grad_norm_(named[one], math.inf, norm_type=math.inf)) == pytest.approx(
            largest, rel=TOLERANCE
        )
        assert float(accelerator.clip_grad_norm_(stranger.parameters(), 1.0)) == pytest.approx(24**0.5)
        assert float(stranger.layer.weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)
        checked.append(True)

    run_loop(HEAD, layout, 4, after_backward=clip)
    assert checked == [True]


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_values_can_be_clipped_wherever_they_are(layout):
    run(_clip_values, layout)


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2"])
def test_clipping_some_parameters_plans_once(layout):
    run(_plans_once, layout)


def _plans_once(layout):
    gathers = []

    def clip(loop):
        def end():
            named = loop.model.named_parameters()
            loop.accelerator.clip_grad_norm_([p for n, p in named if "mlp" in n], 1.0)
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

        gathers.append(sum(collectives(events_of(end)).values()))

    run_loop(HEAD, layout, 1, batch_size=2, after_backward=clip)
    assert set(gathers[1:]) == {3}, "one for the window, one for each that is clipped apart"
    assert gathers[0] > 3, "control: plans are made in the first step"


def _clip_values(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    limit = float(torch.cat([g.abs().flatten() for g in want.values()]).quantile(0.9))
    plugin = GradUtilsPlugin(num_steps=4, fold_into_optimizer=True)

    def clip(loop):
        if loop.accelerator.sync_gradients:
            loop.accelerator.clip_grad_value_(loop.model.parameters(), limit)

    loop = run_loop(HEAD, layout, 4, plugin=plugin, optimizer=FUSED, after_backward=clip)
    assert relative_error(loop.gradients[0], {n: g.clamp(-limit, limit) for n, g in want.items()}) < TOLERANCE


def test_clipping_before_the_end_of_a_window_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"if accelerator\.sync_gradients"):
        run_loop(
            HEAD,
            "one_rank",
            4,
            after_backward=lambda loop: loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0),
        )


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_fused_optimizer_that_scales_takes_the_same_steps(layout):
    run(_folded, layout)


def _folded(layout):
    weights = []
    for folds in (False, True):
        plugin = GradUtilsPlugin(num_steps=2, fold_into_optimizer=folds)
        limit = 0.5
        loop = run_loop(HEAD, layout, 2, batch_size=2, plugin=plugin, optimizer=FUSED, max_norm=limit)
        weights.append({n: p.detach().double() for n, p in loop.model.named_parameters()})
        weights[-1] = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights[-1].items()}
        assert len(loop.norms) > 1
    assert relative_error(weights[1], weights[0]) < 1e-4  # AdamW turns the last bits into steps


def test_clipping_twice_is_refused_where_the_optimizer_still_scales():
    plugin = GradUtilsPlugin(num_steps=1, fold_into_optimizer=True)

    def clip_again(loop):
        if loop.losses:  # the first step was clipped once
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

    with pytest.raises(InvalidArgumentError, match="clipped once per window with fold_into_optimizer=True"):
        run_loop(
            HEAD, "one_rank", 1, batch_size=4, plugin=plugin, optimizer=FUSED, max_norm=1.0, after_backward=clip_again
        )


# ---- Non-finite gradients ----


def _poison(loop):
    """NaN in one element on the last rank, in the first window."""
    loop.count = getattr(loop, "count", 0) + 1
    is_last_rank = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    if loop.count == 1 and is_last_rank:
        p = next(p for p in loop.model.parameters() if p.grad is not None)
        grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        grad.view(-1)[0] = math.nan


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_a_bad_step_is_skipped_and_the_scheduler_holds(layout):
    run(_skips, layout)


def _skips(layout):
    plugin = GradUtilsPlugin(num_steps=1, on_nonfinite="skip")
    loop = run_loop(HEAD, layout, 1, batch_size=4, plugin=plugin, after_backward=_poison)
    num_steps = len(loop.losses)
    assert num_steps > 1
    assert loop.accelerator.num_skipped_steps == 1
    factor = 1 if LAYOUTS[layout].num_ranks == 1 else 2  # accelerate steps a scheduler once per rank
    assert loop.scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.5 ** (factor * (num_steps - 1)))
    assert all(p.isfinite().all() for p in loop.model.parameters())


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
@pytest.mark.parametrize("kind", ["sgd", "fused"])
def test_a_bad_step_raises_and_nothing_has_moved(layout, kind):
    run(_raises, layout, kind)


def _raises(layout, kind):
    seen = []

    def look(loop):
        if not seen:
            seen.append((loop, [p.detach().clone() for p in loop.model.parameters()]))
        _poison(loop)

    optimizer = FUSED if kind == "fused" else functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(NonfiniteGradientError, match="step 1: the gradient is inf or NaN in rank"):
        run_loop(HEAD, layout, 1, batch_size=4, optimizer=optimizer, after_backward=look)
    ((loop, before),) = seen
    assert loop.count == (2 if kind == "fused" else 1), "the device's decision is known one step later"
    assert loop.scheduler.get_last_lr() == [0.1]
    for p, was in zip(loop.model.parameters(), before, strict=True):
        local = [t.to_local() if hasattr(t, "to_local") else t for t in (p, was)]
        assert torch.equal(*local)


def test_no_checkpoint_is_written_over_a_bad_step(tmp_path):
    loop, loader = make(
        HEAD, "one_rank", plugin=GradUtilsPlugin(), rows=make_data(HEAD), batch_size=16, optimizer=FUSED
    )
    for batch in loader:
        loop.accelerator.backward(loop.model(**batch).loss, num_targets=HEADS[HEAD].targets(batch))
        _poison(loop)
        loop.optimizer.step()
        loop.scheduler.step()
    with pytest.raises(NonfiniteGradientError):
        loop.accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.iterdir())
    loop.accelerator.end_training()  # raised once


# ---- Costs ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_the_end_of_a_window_is_one_all_reduce_and_no_host_sync(layout):
    run(_counts, layout)


def _counts(layout):
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(), rows=make_data(HEAD), batch_size=2, optimizer=FUSED)
    torch_own_syncs = len(list(loop.model.parameters()))  # on CPU the fused kernel reads each parameter's step count
    counted = []
    for index, batch in enumerate(loader):
        num_targets = torch.tensor(HEADS[HEAD].targets(batch))
        loss = loop.model(**batch).loss
        loop.accelerator.backward(loss, num_targets=num_targets)

        def end():
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

        events = events_of(end)
        if index:  # the first makes the plan
            counted.append((sum(collectives(events).values()), num_host_syncs(events)))
        steps = events_of(loop.optimizer.step)
        assert not collectives(steps)
        assert num_host_syncs(steps) == torch_own_syncs
        loop.optimizer.zero_grad()
    assert counted == [(0 if layout == "one_rank" else 1, 0)] * len(counted)
    assert counted


# ---- Settings and errors ----


def test_without_the_number_of_targets_it_says_what_to_pass():
    accelerator, model, _ = _prepared(GradUtilsPlugin(), [Regression(0)])
    (x,) = _points(0, [4])
    with pytest.raises(TargetCountError, match=r"num_targets=\(labels != -100\)"):
        accelerator.backward(_mean(model[0], x))
    for bad in (torch.ones(4), -1, "four", True):
        with pytest.raises(InvalidArgumentError, match="num_targets must be one number"):
            accelerator.backward(_mean(model[0], x), num_targets=bad)


def test_a_closure_is_refused():
    _, _, (optimizer,) = _prepared(GradUtilsPlugin(), [Regression(0)])
    with pytest.raises(InvalidArgumentError, match="takes no closure"):
        optimizer.step(lambda: None)


def test_a_stock_accelerator_does_not_take_the_plugin():
    reset_accelerate()
    with pytest.raises(InvalidArgumentError, match=r"use hf_gradutils\.GradUtilsAccelerator"):
        Accelerator(cpu=True, gradient_accumulation_plugin=GradUtilsPlugin(num_steps=2))


def test_the_number_of_micro_batches_comes_from_one_place(monkeypatch):
    def steps(**options):
        reset_accelerate()
        return GradUtilsAccelerator(cpu=True, **options).gradient_accumulation_steps

    assert steps() == 1
    assert steps(gradient_accumulation_steps=3) == 3
    assert steps(gradient_accumulation_plugin=GradUtilsPlugin(num_steps=4)) == 4
    assert steps(gradient_accumulation_plugin=GradUtilsPlugin(), gradient_accumulation_steps=5) == 5
    assert steps(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=6)) == 6
    with pytest.raises(InvalidArgumentError, match="leave out gradient_accumulation_steps"):
        steps(gradient_accumulation_plugin=GradUtilsPlugin(num_steps=4), gradient_accumulation_steps=5)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    assert steps() == 7
    assert steps(gradient_accumulation_plugin=GradUtilsPlugin()) == 7
    assert steps(gradient_accumulation_steps=3) == 3


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_what_scales_gradients_itself_is_refused(kind, monkeypatch):
    reset_accelerate()
    monkeypatch.setattr(GradUtilsAccelerator, "distributed_type", kind)
    with pytest.raises(InvalidArgumentError, match=rf"{kind.value} scales and clips gradients itself.*use FSDP2"):
        GradUtilsAccelerator(cpu=True)


def test_an_optimizer_that_steps_inside_backward_is_refused():
    reset_accelerate()
    kind = type("Lomo", (torch.optim.SGD,), {"__module__": "lomo_optim.lomo"})
    with pytest.raises(InvalidArgumentError, match="Lomo steps inside backward"):
        GradUtilsAccelerator(cpu=True).prepare(kind(Regression(0).parameters(), lr=0.1))


def test_fields_come_from_keywords_then_variables_then_defaults(monkeypatch):
    assert GradUtilsPlugin().sync is None
    for name, text in {
        "SYNC": "every",
        "NORM_TYPE": "inf",
        "CHECK_LOSS_UNIT": "no",
        "MAX_SKIPPED_STEPS": "3",
        "GRAD_NORM_GROUPS": '{"head": "*lm_head*"}',
        "OWNERSHIP": '{"*expert*": "sharded"}',
    }.items():
        monkeypatch.setenv(f"HF_GRADUTILS_{name}", text)
    plugin = GradUtilsPlugin()
    assert (plugin.sync, plugin.norm_type, plugin.check_loss_unit) == ("every", math.inf, False)
    assert (plugin.max_skipped_steps, plugin.grad_norm_groups) == (3, {"head": "*lm_head*"})
    assert plugin.ownership == {"*expert*": "sharded"}
    assert GradUtilsPlugin(sync="defer", norm_type=1).sync == "defer"


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("SYNC", "never", "HF_GRADUTILS_SYNC: sync must be one of"),
        ("ON_NONFINITE", "hope", "HF_GRADUTILS_ON_NONFINITE: on_nonfinite must be"),
        ("NORM_TYPE", "large", "HF_GRADUTILS_NORM_TYPE must be a number, got 'large'"),
        ("NORM_TYPE", "-1", "HF_GRADUTILS_NORM_TYPE: norm_type must be > 0"),
        ("MAX_SKIPPED_STEPS", "-1", "HF_GRADUTILS_MAX_SKIPPED_STEPS: max_skipped_steps must be"),
        ("FOLD_INTO_OPTIMIZER", "perhaps", "HF_GRADUTILS_FOLD_INTO_OPTIMIZER must be true or false"),
        ("OWNERSHIP", "[1]", "HF_GRADUTILS_OWNERSHIP must be JSON"),
        ("LOSS_UNIT", "words", "HF_GRADUTILS_LOSS_UNIT: loss_unit must be"),
        ("SINC", "defer", "HF_GRADUTILS_SINC sets nothing; the variables are HF_GRADUTILS_LOSS_UNIT"),
    ],
)
def test_a_bad_value_names_the_variable(variable, text, message, monkeypatch):
    monkeypatch.setenv(f"HF_GRADUTILS_{variable}", text)
    with pytest.raises(InvalidArgumentError, match=message):
        GradUtilsPlugin()


def test_a_bad_keyword_is_not_blamed_on_a_variable(monkeypatch):
    monkeypatch.setenv("HF_GRADUTILS_SYNC", "every")
    with pytest.raises(InvalidArgumentError, match=r"^sync must be one of"):
        GradUtilsPlugin(sync="never")


# ---- Checkpoints ----


def test_a_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    def loop_from(start, *, saves=None, loads=None):
        loop, loader = make(HEAD, "one_rank", plugin=GradUtilsPlugin(num_steps=2), rows=make_data(HEAD), batch_size=2)
        accelerator = loop.accelerator
        if loads:
            accelerator.load_state(loads)
        rest = accelerator.skip_first_batches(loader, start) if start else loader
        for index, batch in enumerate(rest, start):
            with accelerator.accumulate(loop.model):
                accelerator.backward(loop.model(**batch).loss, num_targets=HEADS[HEAD].targets(batch))
                loop.optimizer.step()
                if accelerator.sync_gradients:
                    loop.losses.append(float(accelerator.report.loss))
                loop.scheduler.step()
                loop.optimizer.zero_grad()
            if saves and index == 3:
                accelerator.save_state(saves)
        return loop.losses

    whole = loop_from(0, saves=str(tmp_path))
    assert len(whole) == 4
    assert loop_from(4, loads=str(tmp_path)) == whole[2:]
