"""bfloat16 and float16: what is kept in float32, what is left alone, and what the check of the unit lets pass."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from benchmarks.exactness import half as half_exactness
from benchmarks.exactness import half_bounds
from benchmarks.exactness.accumulation import gradient_error, truth_of_rounded_weights
from benchmarks.exactness.half_bounds import Cell, Closeness
from benchmarks.exactness.memory import MIB, model_of_benchmark, peaks_of
from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils._undisturbed import undisturbed
from hf_gradutils.accelerator._half_precision import HalfParameters, accumulates_in_float32
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.sync import PolicyChoice, SyncContext, communicates
from hf_gradutils.sync._auto import sparing_policy
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import check_additivity
from hf_gradutils.targets.unit import settle_unit
from hf_gradutils.upstream.dtensor import local_tensor
from hf_gradutils.upstream.fsdp import _fsdp2_groups, fsdp2_adds_shards_by_position
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.half_cases import SELDOM, Seldom, collate, dtypes_in, seldom_rows, with_scaler
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, run
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.tiny_net import (
    make_batch,
    make_mesh,
    make_net,
    parallelize,
    summed_loss,
    sync_plain_gradients,
    true_mean_gradient,
)
from tests.harness.trainer_cases import fsdp_on_cpu, make_data, make_model, reset_accelerate, train

NEEDS_EVERY_PARAMETER = fsdp2_adds_shards_by_position()
"""Before torch 2.15."""


# ---- FSDP2: what is widened and what is not ----


class Outputs(TrainerCallback):
    """What each FSDP2 module of a model hands out, as it comes to whoever called it."""

    def __init__(self):
        self.dtypes, self.loss_dtypes = {}, set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                module.register_forward_hook(lambda m, a, out, name=name: self._look(name, out))

    def _look(self, name, out):
        self.dtypes.setdefault(name, set()).update(dtypes_in(out))
        if not name:
            self.loss_dtypes.add(out["loss"].dtype)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("head", ["llama causal", "bert classes"])
def test_layers_hand_out_what_they_do_without_us_and_losses_keep_their_digits(head, precision):
    for ours, stock, loss, reduced in run_ranks(_outputs, 2, head, precision):
        half = half_exactness.DTYPES[precision]
        assert ours == stock
        assert set.union(*ours.values()) == {half}
        is_wide_by_itself = head == "llama causal"
        assert loss == {torch.float32 if is_wide_by_itself else half}
        assert reduced == {torch.float32}, "only what is reduced is wider"


def _outputs(head, precision):
    seen = {}
    for trainer_class in (half_exactness.ScaledOurs, half_exactness.ScaledStock):
        outputs = Outputs()
        trainer, _ = train(
            head, 2, layout="fsdp2x2", trainer_class=trainer_class, arguments={precision: True}, callback=outputs
        )
        seen[trainer_class] = outputs
    policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
    assert policy.reduce_dtype == half_exactness.DTYPES[precision], "control: stock accelerate reduces in it"
    ours, stock = seen.values()
    assert stock.loss_dtypes == {half_exactness.DTYPES[precision]}, "control: stock hands out a rounded loss"
    return ours.dtypes, stock.dtypes, ours.loss_dtypes, _reduced(head, precision)


def _reduced(head, precision):
    trainer, _ = train(head, 2, layout="fsdp2x2", trainer_class=half_exactness.ScaledOurs, arguments={precision: True})
    return {
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy.reduce_dtype,
        *(
            group._reduce_dtype
            for module in trainer.model.modules()
            if isinstance(module, FSDPModule)
            for group in _fsdp2_groups(module)
        ),
    }


def test_a_second_accelerator_on_the_same_state_widens_as_the_first_did():
    assert run_ranks(_second_accelerator, 2) == [True, True]


def _second_accelerator():
    trainer, _ = train("bert classes", 2, layout="fsdp2x2", arguments={"bf16": True})
    return GradUtilsAccelerator.adopt(trainer.accelerator, GradUtilsPlugin()).windows.widens_gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", [(2, 8, 1, False), (2, 8, 1, True), (8, 1, 4, True)], ids=str)
def test_a_step_takes_no_more_memory_at_its_peak_than_the_stock_trainers(case):
    peaks = peaks_of(case, ("stock", "every", "defer"))
    accumulation = case[2]
    assert peaks["every"] <= 1.002 * peaks["stock"]
    if accumulation == 1:
        assert peaks["defer"] <= 1.002 * peaks["stock"]
    else:  # control: it is seen that deferred gradients in float32 are larger by 2 bytes per parameter
        extra = 2 * sum(p.numel() for p in model_of_benchmark().parameters()) / MIB
        assert peaks["defer"] == pytest.approx(peaks["stock"] + extra, rel=0.02)


# ---- FSDP2: when gradients are communicated by default ----


def test_where_deferring_takes_more_than_stock_the_default_asks_the_memory():
    assert GradUtilsPlugin().effective_sync(each_batch=False) == "defer"
    assert GradUtilsPlugin().effective_sync(each_batch=False, widens_gradients=True) == "auto"
    assert GradUtilsPlugin(sync="defer").effective_sync(each_batch=False, widens_gradients=True) == "defer"
    assert GradUtilsPlugin().effective_sync(each_batch=True, widens_gradients=True) == "every"


def test_the_trainer_asks_the_memory_under_bf16_and_fsdp2_alone():
    assert run_ranks(_policies, 2) == [["auto", "defer", "defer"]] * 2


def _policies():
    trainers = [
        train("bert classes", 2, layout=layout, arguments=arguments)[0]
        for layout, arguments in (("fsdp2x2", {"bf16": True}), ("fsdp2x2", {}), ("ddp2", {"bf16": True}))
    ]
    return [trainer.accelerator.windows._policy._sync for trainer in trainers]


def test_until_it_is_decided_no_parameter_has_to_take_part_every_time():
    assert run_ranks(_careful, 4) == [["every" if NEEDS_EVERY_PARAMETER else "reduce_scatter", "reduce_scatter"]] * 4


def _careful():
    found = []
    for layout in ("hsdp2x2", "fsdp2x4"):
        model = parallelize(make_net(), layout, make_mesh(layout))
        assert PolicyChoice("auto", torch.device("cpu")).policy(model, is_last=False) == sparing_policy(model)
        found.append(sparing_policy(model))
    return found


# ---- Parameters that are first used in the last micro-batch ----


@pytest.mark.parametrize("layout", ["fsdp2x2", "hsdp2x2"])
@pytest.mark.parametrize("kind", SELDOM)
def test_a_part_that_is_first_used_in_the_last_micro_batch_gets_the_gradient_of_every(kind, layout):
    run(_seldom, layout, kind)


def _seldom(layout, kind):
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
    batch = collate(rows)
    truth = Seldom(kind).double()
    parts = [collate(rows[start : start + 2 * num_ranks]) for start in range(0, len(rows), 2 * num_ranks)]
    total = (batch["labels"] != -100).sum()
    for part in parts:
        (truth(**part)["loss"] * ((part["labels"] != -100).sum() / total)).backward()
    want = {name: p.grad for name, p in truth.named_parameters() if p.grad is not None}
    assert relative_error(steps["defer"][0], want) < 0.02


@pytest.mark.skipif(not NEEDS_EVERY_PARAMETER, reason="torch 2.15 widens by itself")
def test_control_torch_refuses_to_reduce_gradients_of_two_dtypes():
    with pytest.raises(RankFailure, match="uniform gradient dtype"):
        run_ranks(_two_dtypes, 2)


def _two_dtypes():
    model = Seldom("rare branch")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for index, row in enumerate(seldom_rows(2, lambda index: index == 1)):
        model.set_requires_gradient_sync(index == 1)
        model(**collate([row]))["loss"].backward()


class Loop:
    """accelerate's loop over four micro-batches of two ranks, of which only the last needs the seldom part."""

    def __init__(self, layout, *, wide=False, sync=None):
        reset_accelerate()
        self.rows = seldom_rows(16, lambda index: index >= 12)
        plugin = GradUtilsPlugin(num_steps=4, accumulate_in_float32=wide, sync=sync)
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
        wrapped = FSDPModule if layout == "fsdp2x2" else DistributedDataParallel
        assert isinstance(self.model, wrapped)

    def batches(self):
        place = dist.get_rank()
        return [collate(self.rows[start + 2 * place : start + 2 * place + 2]) for start in range(0, 16, 4)]

    def backward(self, batch, scale=1.0):
        labels = batch["labels"]
        self.accelerator.backward(scale * self.model(**batch)["loss"], num_targets=(labels != -100).sum())

    def error(self):
        self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf)
        got = whole_gradients(self.model)
        truth = Seldom("rare branch")
        truth = (truth if isinstance(self.model, FSDPModule) else truth.bfloat16()).double()
        total = sum(int((row["labels"] != -100).sum()) for row in self.rows)
        for part in (collate(self.rows[:12]), collate(self.rows[12:])):
            (truth(**part)["loss"] * ((part["labels"] != -100).sum() / total)).backward()
        want = {name: p.grad for name, p in truth.named_parameters() if p.grad is not None}
        assert want["gate"].any()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return relative_error(got, want)


def _no_sync_and_then_bare(loop):
    *waiting, last = loop.batches()
    for batch in waiting:
        with loop.accelerator.no_sync(loop.model):
            loop.backward(batch)
    loop.backward(last)


def _two_losses_in_each(loop):
    for batch in loop.batches():
        with loop.accelerator.accumulate(loop.model):
            loop.backward(batch, 0.25)
            loop.backward(batch | {"flag": batch["flag"].clone()}, 0.75)


def _with_the_model_inside(loop):
    for batch in loop.batches():
        with loop.accelerator.accumulate(loop.own):
            loop.backward(batch)


LOOPS = {f.__name__: f for f in (_no_sync_and_then_bare, _two_losses_in_each, _with_the_model_inside)}


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2"])
@pytest.mark.parametrize("name", LOOPS)
def test_loops_that_end_their_windows_in_other_ways_are_right_too(name, layout):
    for errors in run_ranks(_loops, 2, name, layout):
        assert max(errors) < 0.02


def _loops(name, layout):
    loop = Loop(layout, wide=layout == "ddp2", sync="defer")
    errors = []
    for _ in range(2):
        LOOPS[name](loop)
        errors.append(loop.error() if name != "_two_losses_in_each" else _without_double_count(loop))
    return errors


def _without_double_count(loop):
    """Both losses are counted, so that weights of a quarter and three quarters make half the gradient."""
    for p in loop.model.parameters():
        if p.grad is not None:
            p.grad *= 2
    return loop.error()


def test_what_is_widened_for_the_last_micro_batch_is_put_back():
    assert run_ranks(_put_back, 2) == [True, True]


def _put_back():
    model = Seldom("rare branch")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for _ in range(2):
        for index, row in enumerate(seldom_rows(2, lambda index: index == 1)):
            with SyncContext(model, is_last=index == 1):
                model(**collate([row]))["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert {g.dtype for g in gradients.values() if g is not None} == {torch.float32}
        assert gradients["gate"] is not None
        model.zero_grad()
    if not NEEDS_EVERY_PARAMETER:
        return True
    unsharded = [p._unsharded_param for group in _fsdp2_groups(model) for p in group.fsdp_params]
    return all(p.grad_dtype == p.dtype == torch.bfloat16 and p.grad is None for p in unsharded)


# ---- DDP that has not averaged ----


def test_ddp_that_waits_for_a_part_that_is_not_used_is_noticed_before_the_first_step():
    with pytest.raises(RankFailure) as failure:
        run_ranks(_waits, 2, GradUtilsTrainer, 1)
    [summary] = {report.summary.partition(" (")[0] for report in failure.value.reports}
    assert summary == (
        "raised InvalidArgumentError: DDP has not averaged all gradients of the model: it waits for parameters that "
        "took no part in the loss"
    )
    assert "ddp_find_unused_parameters=True" in failure.value.reports[0].summary


def test_control_the_stock_trainer_takes_that_step_and_stops_in_the_next():
    wrong = run_ranks(_waits, 2, Trainer, 1)
    assert min(wrong) > 0.1, "its gradients are not averaged"
    with pytest.raises(RankFailure, match="Expected to have finished reduction in the prior iteration"):
        run_ranks(_waits, 2, Trainer, 2)


def _waits(trainer_class, num_steps):
    head = "vit images"
    model = nn.ModuleDict({"used": make_model(head), "unused": nn.Linear(2, 2)})
    holder = _Holder(model)
    data = make_data(head)
    arguments = {"max_steps": num_steps, "ddp_find_unused_parameters": False}
    _, tap = train(head, 1, trainer_class=trainer_class, model=holder, data=data, arguments=arguments)
    own = make_model(head).double()
    batch = HEADS[head].collate(data)
    own(**{n: v.double() if v.is_floating_point() else v for n, v in batch.items()})["loss"].backward()
    want = {f"parts.used.{name}": p.grad for name, p in own.named_parameters() if p.grad is not None}
    return relative_error(tap.steps[0], want)


class _Holder(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, pixel_values, labels):
        return self.parts["used"](pixel_values=pixel_values, labels=labels)


# ---- The unit of a loss in half precision ----

ROUNDED = ("bert classes", "whisper seq2seq", "bert answers", "bert tokens", "t5 seq2seq", "vit images")
"""Heads that compute their loss in the dtype of the model."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ROUNDED)
def test_no_head_is_refused_because_its_loss_is_rounded(head, dtype):
    model = HEADS[head].build().to(dtype)
    assert _half_loss(model, _batch(head, 0, dtype)).dtype == dtype
    for seed in range(100):
        _settle(model, _batch(head, seed, dtype), TargetCounter())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ROUNDED)
def test_control_a_wrong_unit_is_still_found(head, dtype):
    model = HEADS[head].build().to(dtype)
    for seed in range(20):
        with pytest.raises(LossUnitError, match=r"L\(AB\)"):
            _settle(model, _batch(head, seed, dtype), TargetCounter(count=_one_for_each_micro_batch))


def _one_for_each_micro_batch(batch):
    return torch.tensor(1)


def _batch(head, seed, dtype):
    batch = HEADS[head].collate(HEADS[head].rows(8, seed))
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}


def _half_loss(model, batch):
    return model(**batch)["loss"]


def _settle(model, batch, counter):
    with undisturbed(model):
        settle_unit(
            lambda part: _half_loss(model, part),
            lambda part, counter: _half_loss(model, part),
            batch,
            counter,
            check=True,
            exact_arithmetic=False,
        )


def test_in_float32_a_loss_that_happens_to_fit_half_precision_is_no_excuse():
    losses = iter([89.0, 89.5, 90.0])
    batch = {"labels": torch.tensor([0, 1])}
    additivity = check_additivity(lambda _: torch.tensor(next(losses)), batch, TargetCounter("rows"))
    assert additivity.relative_error > 5e-3


# ---- fp16's scaler ----

MIXED = ("plain_beside_fsdp2x2", "two_meshes2x2", "tp2_fsdp2x2", "fsdp2x2", "tp2")


def _num_ranks(layout):
    return 4 if layout in ("two_meshes2x2", "tp2_fsdp2x2") else 2


@pytest.mark.parametrize("layout", MIXED)
def test_gradients_of_any_layouts_are_unscaled_side_by_side(layout):
    assert max(run_ranks(_unscaled, _num_ranks(layout), layout)) < 1e-5


def _loop(layout, spoil=None, init_scale=1024.0):
    """One step of a loop; the model, the accelerator and its optimizer."""
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    with_scaler(accelerator, init_scale)
    mesh = make_mesh(layout)
    model = parallelize(make_net(torch.float32), layout, mesh)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y, mask = make_batch()
    size = 1 if mesh is None or "dp" not in mesh.mesh_dim_names else mesh["dp"].size()
    place = 0 if size == 1 else mesh.get_local_rank("dp")
    part = slice(place * len(x) // size, (place + 1) * len(x) // size)
    x, y, mask = x[part].float(), y[part].float(), mask[part]
    num_targets = mask.sum()
    accelerator.backward(summed_loss(model, x, y, mask) / num_targets, num_targets=num_targets, model=model)
    sync_plain_gradients(model, layout, mesh)
    if spoil is not None:
        spoil(model)
    return model, accelerator, optimizer


def _unscaled(layout):
    model, accelerator, optimizer = _loop(layout)
    window = accelerator.windows.of_loss(model)
    window.sums._num_replicas = 1 if layout not in ("tp2", "tp2_fsdp2x2") else 2
    accelerator.clip_grad_norm_(model.parameters(), math.inf)
    got = whole_gradients(model)
    optimizer.step()
    assert not accelerator.optimizer_step_was_skipped
    return relative_error(got, true_mean_gradient())


@pytest.mark.parametrize("layout", MIXED)
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout):
    assert run_ranks(_overflow, _num_ranks(layout), layout) == [(True, 512.0)] * _num_ranks(layout)


def _overflow(layout):
    def spoil(model):
        if dist.get_rank() == 1:
            local_tensor(model.down.weight.grad)[0, 0] = math.inf

    model, accelerator, optimizer = _loop(layout, spoil)
    before = [local_tensor(p.detach()).clone() for p in model.parameters()]
    optimizer.step()
    after = [local_tensor(p.detach()) for p in model.parameters()]
    is_left_out = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.zero_grad()
    accelerator.windows.loss_scale.update()
    return is_left_out and accelerator.optimizer_step_was_skipped, accelerator.scaler.get_scale()


def test_a_backward_after_its_optimizers_gradients_were_unscaled_is_refused():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    with_scaler(accelerator)
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second, optimizer = accelerator.prepare(a, b, torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1))
    x = torch.ones(1, 2)
    accelerator.backward(second(x).sum(), num_targets=1, model=second)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.backward(first(x).sum(), num_targets=1, model=first)
    accelerator.clip_grad_norm_(first.parameters(), 1.0)
    with pytest.raises(InvalidArgumentError, match="gradients of this step had been unscaled"):
        accelerator.backward(second(x).sum(), num_targets=1, model=second)


def test_control_torchs_scaler_takes_no_plain_gradient_beside_a_sharded_one():
    with pytest.raises(RankFailure, match=r"got mixed torch\.Tensor and DTensor"):
        run_ranks(_torchs_unscale, 2)


def _torchs_unscale():
    _, accelerator, optimizer = _loop("plain_beside_fsdp2x2")
    accelerator.scaler.unscale_(optimizer.optimizer)


# ---- Parameters in bfloat16 ----


@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_many_micro_batches_lose_nothing_where_they_accumulate_in_float32(layout):
    narrow, wide = (max(error.error for error in run(_accumulated, layout, is_wide)) for is_wide in (False, True))
    assert wide < 0.8 * narrow
    assert wide < 0.01


def _accumulated(layout, is_wide):
    return gradient_error("vit images", layout, 64, 1, is_wide)


def test_nor_do_they_under_tensor_parallelism():
    for narrow, wide in run_ranks(_accumulated_in_parts, 2):
        assert wide < 0.7 * narrow
        assert wide < 0.01


def _accumulated_in_parts():
    x, y, mask = make_batch(64)
    errors = []
    for is_wide in (False, True):
        model = parallelize(make_net(torch.bfloat16), "tp2", make_mesh("tp2"))
        half = HalfParameters.of(model)
        assert len(half.others) == 10
        for row in range(64):
            if is_wide:
                half.begin(communicates("defer", is_last=row == 63), is_last=row == 63)
            part = slice(row, row + 1)
            summed_loss(model, x[part], y[part], mask[part]).backward()
        half.round()
        assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
        truth = make_net(torch.bfloat16).double()
        summed_loss(truth, x, y, mask).backward()
        errors.append(relative_error(whole_gradients(model), {name: p.grad for name, p in truth.named_parameters()}))
    return errors


def test_it_is_so_from_32_micro_batches_on_unless_something_else_is_said():
    assert [accumulates_in_float32("auto", n) for n in (1, 31, 32)] == [False, False, True]
    assert accumulates_in_float32(True, 1)
    assert not accumulates_in_float32(False, 1000)
    with pytest.raises(InvalidArgumentError, match="accumulate_in_float32 must be True, False or 'auto', got 'always'"):
        GradUtilsPlugin(accumulate_in_float32="always")


@pytest.mark.parametrize("sync", ["defer", "every"])
@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_optimizers_get_gradients_of_the_parameters_dtype_window_after_window(layout, sync, fused):
    run(_windows, layout, sync, fused)


def _windows(layout, sync, fused):
    head = "bert classes"
    trainer, tap = train(
        head,
        4,
        layout=layout,
        model=make_model(head).bfloat16(),
        grad_plugin=GradUtilsPlugin(
            accumulate_in_float32=True, sync=sync, fold_into_optimizer=fused and layout != "tp2"
        ),
        callback=None if fused else Dtypes(),
        arguments={"optim": "adamw_torch_fused" if fused else "adamw_torch", "max_steps": 3, "learning_rate": 1e-3},
        taps=not fused,
    )
    assert {p.grad_dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    if not fused:
        want = truth_of_rounded_weights(head, make_data(head))
        assert relative_error(tap.steps[0], want) < 0.03


class Dtypes(TrainerCallback):
    """Asserts the dtype of gradients at each step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


def test_gradients_that_are_kept_as_zeros_become_wide_again():
    layer = nn.Linear(3, 3).bfloat16()
    half = HalfParameters.of(layer)
    for _ in range(2):
        for is_last in (False, True):
            half.begin(communicates("defer", is_last=is_last), is_last=is_last)
            layer(torch.ones(1, 3).bfloat16()).sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        half.round()
        assert layer.weight.grad.dtype == torch.bfloat16
        assert torch.equal(layer.weight.grad, torch.full((3, 3), 2.0).bfloat16())
        layer.zero_grad(set_to_none=False)


def test_a_window_of_one_micro_batch_is_left_alone():
    layer = nn.Linear(3, 3).bfloat16()
    half = HalfParameters.of(layer)
    half.begin(communicates("defer", is_last=True), is_last=True)
    layer(torch.ones(1, 3).bfloat16()).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_a_training_that_was_interrupted_leaves_parameters_to_the_next_one():
    head = "bert classes"
    model = make_model(head).bfloat16()
    plugin = GradUtilsPlugin(accumulate_in_float32=True)
    with pytest.raises(KeyboardInterrupt):
        train(head, 4, model=model, trainer_class=Interrupted, grad_plugin=plugin)
    assert {p.grad_dtype for p in model.parameters()} == {torch.bfloat16}
    model.zero_grad()
    train(head, 1, model=model, trainer_class=Trainer, arguments={"optim": "adamw_torch"})


class Interrupted(GradUtilsTrainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        assert {p.grad_dtype for p in self.model.parameters()} == {torch.float32}
        raise KeyboardInterrupt


def test_a_window_that_was_given_up_leaves_parameters_as_they_were():
    reset_accelerate()
    plugin = GradUtilsPlugin(num_steps=4, accumulate_in_float32=True)
    accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=plugin)
    layer = nn.Linear(3, 3).bfloat16()
    model = accelerator.prepare(layer)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 3).bfloat16()).sum(), num_targets=1)
    assert layer.weight.grad.dtype == torch.float32
    accelerator.discard_window(model)
    assert layer.weight.grad is None
    assert layer.weight.grad_dtype == torch.bfloat16


def test_parameters_in_float32_are_no_matter_of_it():
    half = HalfParameters.of(nn.Linear(3, 3))
    assert not half.averaged + half.sharded + half.others


# ---- The bounds of the matrix ----


def _row(error, scale, reference=Closeness(0.01, 1.0), is_right=True):  # noqa: B008
    def cell(closeness, right):
        return {(1, False): Cell(closeness, Closeness(0.01, 1.0), right)}

    return {
        ("head", "layout", "bf16"): {"ours": cell(Closeness(error, scale), False), "stock": cell(reference, is_right)}
    }


def test_a_cell_that_is_off_is_a_fault():
    assert half_bounds.faults(_row(0.0119, 1.01)) == []
    [error] = half_bounds.faults(_row(0.0121, 1.0))
    assert error == "head, layout, bf16, accumulation 1: error 1.2e-02, stock 1.0e-02"
    [scale] = half_bounds.faults(_row(0.01, 1.03))
    assert "scale 1.0300, stock 1.0000" in scale
    assert half_bounds.faults(_row(math.nan, math.nan))
    assert half_bounds.faults(_row(0.0149, 1.0, Closeness(3.0, 4.0), is_right=False)) == []
    assert half_bounds.faults(_row(0.0151, 1.0, Closeness(3.0, 4.0), is_right=False))
    scaled = Closeness(1000.0, 1024.0)  # stock, right in float32, has not unscaled
    assert half_bounds.faults(_row(0.0149, 1.0, scaled)) == []
    assert half_bounds.faults(_row(0.0151, 1.0, scaled))


def test_a_router_that_sends_a_token_elsewhere_is_no_fault_but_a_wrong_scale_is():
    [row] = _row(0.039, 0.99, Closeness(0.5, 1.4), is_right=False).values()
    assert half_bounds.faults({("qwen3 moe aux", "layout", "bf16"): row}) == []
    assert half_bounds.faults({("bert classes", "layout", "bf16"): row})
    [row] = _row(0.039, 0.97, Closeness(0.5, 1.4), is_right=False).values()
    assert half_bounds.faults({("qwen3 moe aux", "layout", "bf16"): row})


def test_a_cell_that_a_planted_scale_passes_is_a_fault(monkeypatch):
    monkeypatch.setitem(half_bounds.MOST_SCALE, "bf16", 0.1)
    [fault] = half_bounds.faults(_row(0.5, 1.0, Closeness(0.5, 1.0)))
    assert fault.endswith("a scale of 1.05 passes as well")


class Planted(half_exactness.ScaledOurs):
    """A gradient that is 1.05 times as long as it should be."""

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= half_bounds.PLANTED
        return norm


@pytest.mark.parametrize("precision", half_exactness.DTYPES)
def test_a_planted_scale_in_the_trainer_itself_is_found_in_every_cell(monkeypatch, precision):
    monkeypatch.setitem(half_exactness.TRAINERS, "ours", Planted)
    row = {name: half_exactness.measure("bert answers", "one_rank", precision, name, 1) for name in ("ours", "stock")}
    assert len(row["ours"]) == 4
    assert len(half_bounds.faults({("bert answers", "one_rank", precision): row})) == 4


def test_closeness_of_a_multiple_is_what_is_measured_of_it():
    want = {"w": torch.randn(50, dtype=torch.float64)}
    got = {"w": want["w"] + 0.1 * torch.randn(50, dtype=torch.float64)}
    times = half_exactness.closeness(got, want).times(1.05)
    measured = half_exactness.closeness({"w": 1.05 * got["w"]}, want)
    assert (times.error, times.scale) == pytest.approx((measured.error, measured.scale))
