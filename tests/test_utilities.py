"""The documented utilities against one process in float64, in every layout."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.profiler import profile

from hf_gradutils import (
    clip_grad_by_total_norm_,
    clip_gradients,
    get_grad_norm,
    get_sync_ctx,
    reduce_loss,
    rescale_gradients,
)
from tests.harness.gradients import norm_of, relative_error, whole_gradients
from tests.harness.layouts import NET_LAYOUTS, on_layouts
from tests.harness.ranks import ranks
from tests.harness.tiny_net import (
    data_group,
    data_rank,
    make_batch,
    make_net,
    parallelize,
    summed_loss,
    sync_plain_gradients,
    true_mean_gradient,
)

NUM_MICRO_BATCHES = 3


def accumulate(layout, mesh):
    """A window of micro-batches of the batch's own ragged rows; returns (model, losses, tokens)."""
    model = parallelize(make_net(), layout, mesh)
    index, size = data_rank(mesh)
    x, y, mask = make_batch()
    losses, num_tokens = [], torch.zeros((), dtype=torch.int64)
    for micro in range(NUM_MICRO_BATCHES):
        rows = slice(micro * size + index, None, NUM_MICRO_BATCHES * size)
        with get_sync_ctx(model, is_optim_step=micro == NUM_MICRO_BATCHES - 1):
            loss = summed_loss(model, x[rows], y[rows], mask[rows])
            loss.backward()
        losses.append(loss.detach())
        num_tokens += mask[rows].sum()
    sync_plain_gradients(model, layout, mesh)
    return model, losses, num_tokens


@on_layouts(*NET_LAYOUTS)
def test_a_step_written_from_the_utilities_is_exact(layout, mesh):
    model, losses, num_tokens = accumulate(layout, mesh)
    want = true_mean_gradient()
    x, y, mask = make_batch()
    group = data_group(layout, mesh)

    tokens_before = num_tokens.clone()
    rescale_gradients(model, num_tokens, group)
    assert torch.equal(num_tokens, tokens_before)
    assert relative_error(whole_gradients(model), want) < 1e-12

    # Without a group, tensor-parallel copies count in both numbers and cancel.
    loss, denominator = reduce_loss(losses, num_tokens, dp_group=group)
    assert denominator.item() == mask.sum().item() * (2 if layout == "tp2" else 1)
    assert denominator.dtype == torch.int64
    mean = summed_loss(make_net(), x, y, mask) / mask.sum()
    assert (loss / denominator).item() == pytest.approx(mean.item(), rel=1e-12)

    norm = norm_of(want)
    assert clip_gradients(model, math.inf).item() == pytest.approx(norm, rel=1e-12)
    assert relative_error(whole_gradients(model), want) < 1e-12, "inf measures only"
    clip_norm = norm / 3
    assert clip_gradients(model, clip_norm).item() == pytest.approx(norm, rel=1e-12)
    clipped = {name: g * clip_norm / (norm + 1e-6) for name, g in want.items()}
    assert relative_error(whole_gradients(model), clipped) < 1e-12
    assert clip_gradients(model, 10 * norm).item() == pytest.approx(clip_norm, rel=1e-5), "already short enough"
    assert relative_error(whole_gradients(model), clipped) < 1e-12


def test_control_the_mean_of_means_is_another_gradient():
    model = make_net()
    x, y, mask = make_batch()
    for micro in range(NUM_MICRO_BATCHES):
        rows = slice(micro, None, NUM_MICRO_BATCHES)
        (summed_loss(model, x[rows], y[rows], mask[rows]) / mask[rows].sum() / NUM_MICRO_BATCHES).backward()
    assert relative_error(whole_gradients(model), true_mean_gradient()) > 1e-2


@on_layouts(*NET_LAYOUTS)
def test_every_norm_type_and_dtype_counts_each_element_once(layout, mesh):
    groups = groups_of(mesh)
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
    for dtype, tolerance in tolerances.items():
        model = parallelize(make_net(dtype), layout, mesh)
        for p in model.parameters():
            p.grad = torch.ones_like(p) * 0.1 + p.detach()
        gradients = whole_gradients(model)
        for p in (1, 2, 3, math.inf):
            want = norm_of(gradients, p)
            for foreach in (True, False):
                norm = clip_gradients(model, math.inf, norm_type=p, foreach=foreach)
                assert norm.item() == pytest.approx(want, rel=tolerance)
            got = get_grad_norm(list(model.parameters()), *groups, norm_type=p, dtype=torch.float64)
            assert got == pytest.approx(want, rel=tolerance)
            assert isinstance(got, float)
        if dist.is_initialized() and layout.startswith(("fsdp", "hsdp", "tp2_fsdp")):
            local = torch.cat([p.grad.to_local().flatten().double() for p in model.parameters()])
            assert float(local.norm()) != pytest.approx(norm_of(gradients), rel=1e-3), "control: this rank's part alone"


def groups_of(mesh):
    """dp_cp_group and tp_group as a user of the groups form would pass them."""
    if mesh is None:
        return None, None
    names = mesh.mesh_dim_names
    tp = mesh["tp"].get_group() if "tp" in names else None
    if "rep" in names:
        return dist.group.WORLD, tp
    return (mesh["dp"].get_group() if "dp" in names else None), tp


@on_layouts("one_rank", "ddp2", "fsdp2x4", "hsdp2x2", "tp2_fsdp2x2", "plain_beside_fsdp2x2")
def test_finite_gradients_that_overflow_their_dtype_have_a_finite_norm(layout, mesh):
    model = parallelize(make_net(torch.float32), layout, mesh)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    num_elements = sum(p.numel() for p in make_net().parameters())
    want = 1e25 * num_elements**0.5
    assert clip_gradients(model, 1.0).item() == pytest.approx(want, rel=1e-6)
    assert norm_of(whole_gradients(model)) == pytest.approx(1.0, rel=1e-4)


def test_fp16_at_three_million_elements():
    parameter = torch.nn.Parameter(torch.zeros(3_000_000, dtype=torch.float16))
    parameter.grad = torch.full_like(parameter, 300.0)
    assert not torch.nn.utils.get_total_norm([parameter.grad]).isfinite(), "control"
    assert get_grad_norm(parameter, None, None) == pytest.approx(300 * 3e6**0.5, rel=1e-6)


@on_layouts("ddp2", "fsdp2x2", "plain_beside_fsdp2x2")
def test_a_rank_without_gradients_takes_part(layout, mesh):
    model = parallelize(make_net(), layout, mesh)
    if dist.get_rank() == 0:
        for p in model.parameters():
            p.grad = torch.ones_like(p) if not isinstance(p, DTensor) else filled(p, 1.0)
    want = 0.0
    for p in model.parameters():  # plain ones are whole on rank 0; of sharded ones, rank 0's shard is all there is
        want += p.numel() if not isinstance(p, DTensor) else numel_on_rank_0(p)
    assert clip_gradients(model, math.inf).item() == pytest.approx(want**0.5, rel=1e-12)
    assert get_grad_norm(list(model.parameters()), *groups_of(mesh)) == pytest.approx(want**0.5, rel=1e-6)
    clip_gradients(model, 0.1)
    assert dist.get_rank() == 0 or all(p.grad is None for p in model.parameters())


def filled(p, value):
    local = torch.full_like(p.to_local(), value)
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def numel_on_rank_0(p):
    count = torch.tensor(p.to_local().numel() if dist.get_rank() == 0 else 0)
    dist.all_reduce(count)
    return count.item()


@on_layouts("one_rank", "ddp2", "fsdp2x4")
def test_no_gradients_at_all_have_norm_zero(layout, mesh):
    model = parallelize(make_net(), layout, mesh)
    assert clip_gradients(model, 1.0) == 0
    assert get_grad_norm(list(model.parameters()), *groups_of(mesh)) == 0.0
    assert get_grad_norm(list(model.parameters()), *groups_of(mesh), norm_type=math.inf) == 0.0
    clip_grad_by_total_norm_(list(model.parameters()), 1.0, 5.0)
    rescale_gradients(model, torch.tensor(0))


@ranks(2, tp=2)
def test_partial_gradients_are_summed_before_they_are_squared(mesh):
    model = torch.nn.Linear(2, 3, bias=False).double()
    model.weight = torch.nn.Parameter(DTensor.from_local(torch.ones(3, 2, dtype=torch.float64), mesh, [Replicate()]))
    local = torch.full((3, 2), float(dist.get_rank() + 1), dtype=torch.float64)
    model.weight.grad = DTensor.from_local(local.clone(), mesh, [Partial()])
    want = 3 * 6**0.5
    assert math.sqrt((1 + 4) * 6) != pytest.approx(want, rel=0.1), "control: squared as they are"
    assert get_grad_norm(model.weight, None, mesh.get_group()) == pytest.approx(want, rel=1e-6)
    assert clip_gradients(model, 1.0).item() == pytest.approx(want, rel=1e-12)
    assert norm_of(whole_gradients(model)) == pytest.approx(1.0, rel=1e-5)


@ranks(2, dp=2)
def test_a_bare_tensor_and_a_bare_dtensor_are_accepted(mesh):
    parameter = torch.nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Shard(0)]))
    parameter.grad = torch.ones_like(parameter) * 2
    assert get_grad_norm(parameter, mesh.get_group(), None) == pytest.approx(4.0)
    assert get_grad_norm(parameter, None, None) == pytest.approx(4.0), "a DTensor's own mesh is summed over anyway"
    clip_grad_by_total_norm_(parameter, 1.0, 4.0)
    assert get_grad_norm(parameter, None, None) == pytest.approx(1.0, rel=1e-5)


@ranks(4, dp=2, tp=2)
def test_plain_shards_are_summed_where_the_caller_says_so(mesh):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 1.0 + mesh.get_local_rank("tp"))
    groups = mesh["dp"].get_group(), mesh["tp"].get_group()
    got = get_grad_norm(parameter, *groups, plain_sharded_over=("tp",))
    assert got == pytest.approx((3 * (1 + 4)) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_clip_by_total_norm_scales_the_gradient_itself_whatever_its_dtype(dtype, as_tensor):
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    parameter.grad = torch.full_like(parameter, 2.0)
    clip_grad_by_total_norm_([parameter], 1, torch.tensor(4.0) if as_tensor else 4.0)
    assert parameter.grad.dtype == dtype
    assert parameter.grad.float().norm().item() == pytest.approx(1.0, rel=1e-3)
    clip_grad_by_total_norm_([parameter], 5, 1.0)
    assert parameter.grad.float().norm().item() == pytest.approx(1.0, rel=1e-3), "shorter already"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_with_a_norm_that_is_not_finite_are_left_alone(bad):
    model = make_net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.out.bias.grad[0] = bad
    assert not clip_gradients(model, 1.0).isfinite()
    clip_grad_by_total_norm_(list(model.parameters()), 1.0, bad)
    assert torch.equal(model.inp.weight.grad, torch.ones_like(model.inp.weight))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not torch.equal(model.inp.weight.grad, torch.ones_like(model.inp.weight)), "control: torch's clip"


@ranks(2)
def test_counts_beyond_two_to_the_31_keep_their_digits():
    count = torch.tensor([2**31 + 1])
    loss, denominator = reduce_loss([torch.tensor(1.0), torch.tensor([2.0])], count)
    assert denominator.item() == 2 * (2**31 + 1)
    assert loss.item() == 6.0
    assert (loss.shape, denominator.shape) == ((), ())


@ranks(2)
def test_reduce_loss_by_micro_batches():
    store = [torch.tensor(1.0), torch.tensor(2.0)] if dist.get_rank() == 0 else []
    loss, denominator = reduce_loss(store, torch.tensor(99), per_token_loss=False)
    assert (loss.item(), denominator.item()) == (3.0, 2)


def test_reduce_loss_with_an_empty_store():
    loss, denominator = reduce_loss([], torch.tensor(0))
    assert (loss.item(), denominator.item()) == (0.0, 0)


def test_zero_tokens_do_not_divide_by_zero():
    model = make_net()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rescale_gradients(model, torch.tensor(0))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: clip_gradients(m, 0.0), "max_norm must be > 0, got 0.0; to measure without clipping"),
        (lambda m: clip_gradients(m, -1.0), "max_norm must be > 0, got -1.0"),
        (lambda m: clip_gradients(m, math.nan), "max_norm must be > 0, got nan"),
        (lambda m: clip_gradients(m, 1.0, norm_type=0), "norm_type must be > 0"),
        (lambda m: clip_gradients(m, 1.0, ownership={"*": "split"}), "'sharded', 'replicated' or .*, got 'split'"),
        (lambda m: clip_gradients(list(m.parameters()), 1.0), "model must be an nn.Module, got list"),
        (lambda m: clip_grad_by_total_norm_(list(m.parameters()), -2, 1.0), "max_norm must be > 0, got -2"),
        (lambda m: get_grad_norm(list(m.parameters()), None, None, norm_type=-1), "norm_type must be > 0"),
        (lambda m: get_grad_norm(list(m.parameters()), None, None, dtype=torch.int64), "dtype must be a float dtype"),
        (lambda m: get_grad_norm(list(m.parameters()), None, None, plain_sharded_over=("pp",)), "got \\['pp'\\]"),
    ],
)
def test_bad_arguments_say_what_was_expected(call, message):
    model = make_net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters()), "nothing is lost"


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2", "tp2_fsdp2x2", "two_meshes2x2")
def test_a_clip_is_one_all_reduce(layout, mesh):
    model, _, num_tokens = accumulate(layout, mesh)
    clip_gradients(model, 1.0)  # builds the plan
    with profile() as profiler:
        clip_gradients(model, 1.0)
    names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
    assert names == ["gloo:all_reduce"]
    with profile() as profiler:
        rescale_gradients(model, num_tokens)
    assert [e.name for e in profiler.events() if e.name.startswith("gloo:")] == ["gloo:all_reduce"]
