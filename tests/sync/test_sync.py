"""get_sync_ctx: no communication before the last micro-batch, through every wrapper, state restored."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

from hf_gradutils import get_sync_ctx
from hf_gradutils.upstream.fsdp import fsdp2_sync_flags
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.tiny_net import make_net, parallelize


def state_of(model):
    flags = [m.require_backward_grad_sync for m in model.modules() if isinstance(m, DistributedDataParallel)]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            flags += [flag for _, *pair in fsdp2_sync_flags(module) for flag in pair]
    return flags


def backward(model, *, is_optim_step):
    """One forward and backward; the collectives that FSDP2 reduced gradients with."""
    with get_sync_ctx(model, is_optim_step), profile() as profiler:
        model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    return [e.name for e in profiler.events() if e.name.startswith(("gloo:all_reduce", "gloo:reduce"))]


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2")
def test_gradients_are_communicated_on_the_last_micro_batch_only(layout, mesh):
    model = parallelize(make_net(), layout, mesh)
    if layout == "ddp2":  # reduces in threads that the profiler may miss: ask its own hook
        buckets = []

        def count_and_reduce(state, bucket):
            buckets.append(bucket.index())
            return allreduce_hook(state, bucket)

        model.register_comm_hook(None, count_and_reduce)
        for is_optim_step, num_buckets in ((True, 1), (False, 1), (False, 1), (True, 2)):
            backward(model, is_optim_step=is_optim_step)
            assert len(buckets) == num_buckets
    else:
        backward(model, is_optim_step=True)  # FSDP2 sets itself up
        assert backward(model, is_optim_step=False) == []
        assert backward(model, is_optim_step=True) != []


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2")
def test_the_prior_state_comes_back_also_after_an_exception(layout, mesh):
    model = parallelize(make_net(), layout, mesh)
    before = state_of(model)
    assert before
    context = get_sync_ctx(model, False)
    assert state_of(model) == before, "nothing happens before it is entered"
    with context:
        assert not any(state_of(model))
        with get_sync_ctx(model, True):
            assert all(state_of(model))
        assert not any(state_of(model)), "what was there before, not what is usual"
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="boom"), get_sync_ctx(model, False):
        raise RuntimeError("boom")
    assert state_of(model) == before
    with context:
        assert not any(state_of(model)), "the context can be used again"
    assert state_of(model) == before


@ranks(2)
def test_wrappers_around_the_wrapper_are_seen_through():
    model = DistributedDataParallel(make_net())
    compiled = torch.compile(model, backend="eager")
    around = nn.ModuleDict({"inner": model})  # as PEFT and others keep it
    for outer in (compiled, around):
        with get_sync_ctx(outer, False):
            assert model.require_backward_grad_sync is False
        assert model.require_backward_grad_sync is True


@pytest.mark.filterwarnings("ignore")  # FSDP1 warns of its own deprecation
@ranks(2)
def test_fsdp1_does_not_communicate_either():
    model = FullyShardedDataParallel(make_net(), device_id=torch.device("cpu"), use_orig_params=True)
    with get_sync_ctx(model, False):
        assert model._sync_gradients is False
    assert model._sync_gradients is True


def test_a_plain_module_needs_nothing():
    model = make_net()
    with get_sync_ctx(model, False):
        model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    assert model.inp.weight.grad is not None
    assert not dist.is_initialized()


def test_one_context_is_not_entered_twice_at_once():
    context = get_sync_ctx(make_net(), True)
    with context, pytest.raises(RuntimeError, match="call get_sync_ctx once per micro-batch"):
        context.__enter__()
