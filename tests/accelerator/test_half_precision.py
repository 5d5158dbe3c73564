"""bfloat16 and float16 under FSDP2: what is widened, when it is communicated, and the bounds of the matrix."""

import math

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from benchmarks.exactness import half as half_exactness
from benchmarks.exactness import half_bounds
from benchmarks.exactness.half_bounds import Cell, Closeness
from benchmarks.exactness.memory import MIB, model_of_benchmark, peaks_of
from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.sync import PolicyChoice
from hf_gradutils.sync._auto import sparing_policy
from hf_gradutils.upstream.fsdp import _fsdp2_groups, fsdp2_adds_shards_by_position
from tests.harness.half_cases import dtypes_in
from tests.harness.layouts import on_layouts
from tests.harness.tiny_net import make_net, parallelize
from tests.harness.trainer_cases import train


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
@on_layouts("fsdp2x2")
def test_layers_hand_out_what_they_do_without_us_and_losses_keep_their_digits(layout, head, precision):
    half, seen = half_exactness.DTYPES[precision], []
    for trainer_class in (half_exactness.ScaledOurs, half_exactness.ScaledStock):
        outputs, arguments = Outputs(), {precision: True}
        trainer, _ = train(head, 2, layout=layout, trainer_class=trainer_class, arguments=arguments, callback=outputs)
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        modules = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        reduced = {group._reduce_dtype for module in modules for group in _fsdp2_groups(module)}
        seen.append((outputs, reduced | {policy.reduce_dtype}))
    (ours, reduced), (stock, reduced_by_stock) = seen
    assert half in reduced_by_stock, "control: stock accelerate reduces in it"
    assert stock.loss_dtypes == {half}, "control: stock hands out a rounded loss"
    assert ours.dtypes == stock.dtypes
    assert set.union(*ours.dtypes.values()) == {half}
    assert ours.loss_dtypes == {torch.float32 if head == "llama causal" else half}, "the first is wide by itself"
    assert reduced == {torch.float32}, "only what is reduced is wider"


@on_layouts("fsdp2x2")
def test_a_second_accelerator_on_the_same_state_widens_as_the_first_did(layout):
    trainer, _ = train("bert classes", 2, layout=layout, arguments={"bf16": True})
    assert GradUtilsAccelerator.adopt(trainer.accelerator, GradUtilsPlugin()).windows.widens_gradients


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


# ---- When gradients are communicated by default ----


def test_where_deferring_takes_more_than_stock_the_default_asks_the_memory():
    assert GradUtilsPlugin().effective_sync(each_batch=False) == "defer"
    assert GradUtilsPlugin().effective_sync(each_batch=False, widens_gradients=True) == "auto"
    assert GradUtilsPlugin(sync="defer").effective_sync(each_batch=False, widens_gradients=True) == "defer"
    assert GradUtilsPlugin().effective_sync(each_batch=True, widens_gradients=True) == "every"


@pytest.mark.parametrize(
    ("layout", "bf16", "sync"), [("fsdp2x2", True, "auto"), ("fsdp2x2", False, "defer"), ("ddp2", True, "defer")]
)
@on_layouts()
def test_the_trainer_asks_the_memory_under_bf16_and_fsdp2_alone(layout, bf16, sync):
    trainer, _ = train("bert classes", 2, layout=layout, arguments={"bf16": bf16})
    assert trainer.accelerator.windows._policy._sync == sync


@on_layouts("hsdp2x2", "fsdp2x4")
def test_until_it_is_decided_no_parameter_has_to_take_part_every_time(layout, mesh):
    model = parallelize(make_net(), layout, mesh)
    needs_every_parameter = layout == "hsdp2x2" and fsdp2_adds_shards_by_position()  # before torch 2.15
    assert sparing_policy(model) == ("every" if needs_every_parameter else "reduce_scatter")
    assert PolicyChoice("auto", torch.device("cpu")).policy(model, is_last=False) == sparing_policy(model)


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
