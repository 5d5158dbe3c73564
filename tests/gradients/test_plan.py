"""The plan of a norm: false replicas are an error, and declared shards are summed."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hf_gradutils import clip_gradients, get_grad_norm
from hf_gradutils._collectives import domain_of
from hf_gradutils.errors import InvalidArgumentError, ReplicaMismatchError
from tests.harness.ranks import ranks
from tests.harness.tiny_net import make_net, parallelize


@ranks(2)
def test_replicas_that_differ_are_an_error_that_names_the_parameter():
    model = make_net()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.up.weight += 0.1
    with pytest.raises(ReplicaMismatchError, match=r"'up.weight' should be the same on ranks 0 and 1, .* ownership="):
        clip_gradients(model, 1.0)


@ranks(2)
def test_declared_shards_are_summed():
    model = nn.ModuleDict({"expert": nn.Linear(3, 1, bias=False), "dense": nn.Linear(3, 1, bias=False)})
    with torch.no_grad():
        model.expert.weight.fill_(dist.get_rank())
        model.dense.weight.fill_(1)
    model.expert.weight.grad = torch.full((1, 3), 1.0 + dist.get_rank())
    model.dense.weight.grad = torch.full((1, 3), 5.0)
    want = (3 * (1 + 4) + 3 * 25) ** 0.5
    norm = clip_gradients(model, 1.0, ownership={"expert.*": "sharded"})
    assert norm.item() == pytest.approx(want, rel=1e-12)


@ranks(2)
def test_the_mark_of_megatron_and_deepspeed_on_experts_is_believed():
    model = nn.ModuleDict({"expert": nn.Linear(3, 1, bias=False), "dense": nn.Linear(3, 1, bias=False)})
    with torch.no_grad():
        model.expert.weight.fill_(dist.get_rank())
        model.dense.weight.fill_(1)
    model.expert.weight.allreduce = False
    model.expert.weight.grad = torch.full((1, 3), 1.0 + dist.get_rank())
    model.dense.weight.grad = torch.full((1, 3), 5.0)
    assert clip_gradients(model, 1e9).item() == pytest.approx((3 * (1 + 4) + 3 * 25) ** 0.5, rel=1e-12)


@ranks(4, dp=2, ep=2)
def test_parts_that_other_groups_hold_copies_of_are_counted_once(mesh):
    part = mesh.get_local_rank("ep")
    model = nn.ModuleDict({"expert": nn.Linear(3, 1, bias=False)})
    with torch.no_grad():
        model.expert.weight.fill_(part)
    model.expert.weight.grad = torch.full((1, 3), 1.0 + part)
    ownership = {"expert.*": mesh["ep"].get_group()}
    assert clip_gradients(model, 1e9, ownership=ownership).item() == pytest.approx((3 * (1 + 4)) ** 0.5, rel=1e-12)
    model.expert.weight.data += dist.get_rank() // 2  # the copies drift apart
    model.another = nn.Linear(1, 1)  # a plan anew
    with pytest.raises(ReplicaMismatchError, match=r"'expert.weight' should be the same on ranks 0 and 2"):
        clip_gradients(model, 1e9, ownership=ownership)


@ranks(2)
def test_the_flat_parameters_of_fsdp1_are_parts():
    model = make_net()
    want = make_net()
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    x = torch.randn(4, 5, dtype=torch.float64)
    (sharded(x).square().sum()).backward()
    want(x).square().sum().backward()
    norm = torch.cat([p.grad.flatten() for p in want.parameters()]).norm()
    assert clip_gradients(sharded, 1e9).item() == pytest.approx(norm.item(), rel=1e-12)


@ranks(2)
def test_a_replica_that_only_one_rank_has_a_gradient_of_is_counted_whole():
    model = make_net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    num_elements = sum(p.numel() for p in model.parameters())
    if dist.get_rank() == 1:
        model.up.weight.grad = None
        model.out.bias.grad = None
    assert clip_gradients(model, 1e9).item() == pytest.approx(num_elements**0.5, rel=1e-12)


@ranks(4)
def test_parameters_that_only_some_ranks_hold_are_counted_once():
    stage = dist.get_rank() // 2  # two pipeline stages with two replicas each
    model = nn.ModuleDict({f"stage{stage}": nn.Linear(2 + stage, 1, bias=False)})
    with torch.no_grad():
        model[f"stage{stage}"].weight.fill_(1)
    model[f"stage{stage}"].weight.grad = torch.full((1, 2 + stage), 1.0 + stage)
    assert clip_gradients(model, 1e9).item() == pytest.approx((2 * 1 + 3 * 4) ** 0.5, rel=1e-12)


@ranks(4, tp=2, dp=2)
def test_the_same_parameter_on_two_disjoint_meshes_is_counted_once(mesh):
    model = make_net()
    fully_shard(model, mesh=mesh["dp"])  # a mesh of two ranks for each of the two tensor-parallel ranks
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    num_elements = sum(p.numel() for p in make_net().parameters())
    assert clip_gradients(model, 1e9).item() == pytest.approx(num_elements**0.5, rel=1e-12)


@ranks(2, dp=2)
def test_a_parameter_sharded_on_one_rank_only_is_an_error(mesh):
    model = make_net()
    if dist.get_rank() == 0:
        model = parallelize(model, "fsdp2x2", mesh)
    else:
        fully_shard(nn.Linear(1, 1), mesh=mesh)
    with pytest.raises(ReplicaMismatchError, match="is a DTensor on rank 0 and a plain tensor on rank 1"):
        clip_gradients(model, 1.0)


def test_a_plan_is_made_anew_when_the_parameters_change():
    model = make_net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first = clip_gradients(model, 1e9)
    model.out = nn.Linear(6, 30).double()
    model.out.weight.grad = torch.ones_like(model.out.weight)
    assert clip_gradients(model, 1e9) > first


def test_the_norm_follows_a_model_that_changes_between_steps():
    model = nn.ModuleDict({"up": nn.Linear(3, 4), "down": nn.Linear(4, 2)})
    model.down.bias.requires_grad_(False)

    def check(changed):
        parameters = {id(p): p for p in model.parameters() if p.requires_grad}.values()  # a tied one once
        for number, p in enumerate(parameters, start=1):
            p.grad = torch.full_like(p, number)
        want = sum(number**2 * p.numel() for number, p in enumerate(parameters, start=1)) ** 0.5
        assert clip_gradients(model, math.inf).item() == pytest.approx(want, rel=1e-12), changed
        assert clip_gradients(model, math.inf).item() == pytest.approx(want, rel=1e-12), f"{changed}, once more"

    check("first")
    model.down.bias.requires_grad_(True)
    check("unfrozen")
    model.up.lora = nn.Linear(3, 5, bias=False)
    check("added deep inside")
    model.up.lora.weight.data = torch.zeros(7, 3)
    check("other data")
    model.up.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    check("another parameter of the same shape in another dtype")
    model.down.weight = model.up.lora.weight
    check("tied")
    model.up.register_parameter("bias", None)
    check("taken away")
    model.up._parameters = dict(model.up._parameters)
    model.up.extra = nn.Parameter(torch.zeros(2))
    check("in another dict")
    del model["down"]
    check("a module less")
    for p in model.parameters():
        p.grad = None
    assert clip_gradients(model, math.inf) == 0
    check("gradients again")


@ranks(2, dp=2)
def test_gradients_that_change_their_layout_between_steps_are_counted_right(mesh):
    model = nn.Linear(4, 2, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.zeros(2, 4), mesh, [Replicate()]))
    part = torch.ones(2, 4)
    layouts = {"replicated": (part, Replicate(), 8**0.5), "partial": (part, Partial(), 32**0.5)}
    layouts["sharded"] = (torch.ones(1, 4), Shard(0), 8**0.5)
    for name in ("replicated", "partial", "replicated", "sharded", "partial", "partial"):
        local, placement, want = layouts[name]
        model.weight.grad = DTensor.from_local(local.clone(), mesh, [placement], run_check=False)
        assert clip_gradients(model, math.inf).item() == pytest.approx(want, rel=1e-12), name


@ranks(2)
def test_gradients_of_alleged_replicas_that_differ_are_an_error():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 1.0 + dist.get_rank())
    with pytest.raises(ReplicaMismatchError, match="norms of their gradients differ"):
        get_grad_norm(parameter, dist.group.WORLD, None)


@ranks(4)
def test_groups_that_overlap_without_a_grid_are_refused():
    one = dist.new_group([0, 1, 2])
    other = dist.new_group([0, 1, 3])
    if dist.get_rank() in (0, 1):
        with pytest.raises(InvalidArgumentError, match="groups must meet in one rank"):
            domain_of([one, other])
    assert domain_of([None]).num_ranks == 1
    assert domain_of([dist.group.WORLD, one if dist.get_rank() != 3 else None]).num_ranks == 4
