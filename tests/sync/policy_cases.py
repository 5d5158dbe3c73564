"""A window of four micro-batches under each sync policy, and what it communicates."""

import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradutils.sync import SyncContext
from hf_gradutils.sync import _auto as sync_auto
from hf_gradutils.upstream.fsdp import fsdp2_sync_flags
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.tiny_net import make_batch, make_net, parallelize, summed_loss

ignores_deprecation = pytest.mark.filterwarnings(
    "ignore:FSDP1:FutureWarning", "ignore:.*FullyShardedDataParallel:FutureWarning"
)
ACCUMULATION = 4
POLICIES = ("defer", "every", "reduce_scatter")
COUNTS = {
    "ddp2": {"defer": (0, 1), "every": (0, 4), "reduce_scatter": (0, 1)},
    "fsdp2x2": {"defer": (1, 0), "every": (4, 0), "reduce_scatter": (4, 0)},
    "hsdp2x2": {"defer": (1, 1), "every": (4, 4), "reduce_scatter": (4, 1)},
}
"""(reduce-scatters, all-reduces) of a window of four micro-batches: per bucket of DDP, per group of FSDP."""


def wrap(layout, mesh, wrapping="", dtype=torch.float64):
    """The tiny net in a layout; by FSDP1 instead, compiled, or inside of another module, if so asked."""
    net = make_net(dtype)
    if wrapping == "fsdp1":
        is_hybrid = layout == "hsdp2x2"
        return FullyShardedDataParallel(
            net,
            device_mesh=mesh if is_hybrid else None,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if is_hybrid else ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    model = parallelize(net, layout, mesh)
    if wrapping == "compiled":
        return torch.compile(model, backend="eager")
    return nn.Sequential(model) if wrapping == "in a module" else model


def num_groups(model):
    """Buckets or groups that have something to train; a group of several modules is one."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = {id(group): group for module in modules for group, *_ in fsdp2_sync_flags(module)}
    return sum(any(p.sharded_param.requires_grad for p in group.fsdp_params) for group in groups.values()) or 1


def micro_batches():
    """This rank's rows, in four parts; as (x, y, mask)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return zip(*(part[rank::size].tensor_split(ACCUMULATION) for part in make_batch()), strict=True)


def run_window(model, policy, *, stop_before=ACCUMULATION):
    """Gradients of the sum over this rank's rows, averaged over ranks."""
    for i, (x, y, mask) in enumerate(micro_batches()):
        if i == stop_before:
            raise RuntimeError("boom")
        with SyncContext(model, policy, is_last=i == ACCUMULATION - 1):
            summed_loss(model, x, y, mask).backward()


class Collectives(TorchDispatchMode):
    """Names of the collectives that this thread asks for; far cheaper than the profiler."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def counted(function, *args, **kwargs):
    """(reduce-scatters, all-reduces) of a call."""
    with Collectives() as collectives:
        function(*args, **kwargs)
    return collectives.names.count("_reduce_scatter_base_"), collectives.names.count("allreduce_")


def times(pair, factor):
    return pair[0] * factor, pair[1] * factor


def error_of(model, want):
    """Against Σ over all rows / ranks, which is what the window leaves for the rescaling."""
    factor = dist.get_world_size() / make_batch()[2].sum().item()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            gradients = {name: p.grad.detach().double().clone() for name, p in model.named_parameters()}
    else:
        gradients = whole_gradients(model)
    wrappers = re.compile(r"^(_orig_mod\.|0\.|module\.)*")
    return relative_error({wrappers.sub("", name): grad * factor for name, grad in gradients.items()}, want)


def lines_logged():
    """A list that grows with what the choice of a policy logs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    sync_auto.logger.addHandler(handler)
    sync_auto.logger.setLevel(logging.INFO)
    return lines
