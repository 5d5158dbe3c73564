"""Sync policies: the same gradient for the communication that each promises, and nothing left behind."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.sync import SyncContext, communicates, discard_deferred
from hf_gradutils.upstream.fsdp import fsdp1_sync_flag, fsdp2_sync_flags
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.layouts import on_layouts
from tests.harness.tiny_net import true_mean_gradient
from tests.sync.policy_cases import (
    ACCUMULATION,
    COUNTS,
    POLICIES,
    counted,
    error_of,
    ignores_deprecation,
    num_groups,
    run_window,
    times,
    wrap,
)

FORGETS = not hasattr(FSDPParamGroup, "_get_partial_reduce_grad")
"""Until torch 2.13 HSDP does not know whose shards wait for the all-reduce."""
PLAIN = [(layout, "") for layout in COUNTS]


@ignores_deprecation
@pytest.mark.parametrize(
    ("layout", "wrapping"),
    [*PLAIN, ("ddp2", "in a module"), ("fsdp2x2", "compiled"), ("fsdp2x2", "fsdp1"), ("hsdp2x2", "fsdp1")],
)
@on_layouts()
def test_each_policy_gives_the_same_gradient_for_the_communication_it_promises(layout, mesh, wrapping):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        want = true_mean_gradient(dtype)
        for policy in POLICIES:
            is_one_call = (layout, wrapping) == ("hsdp2x2", "fsdp1")  # reduce-scatter and all-reduce
            promised = COUNTS[layout]["every" if is_one_call and policy == "reduce_scatter" else policy]
            model = wrap(layout, mesh, wrapping, dtype)
            for is_first in (True, False):  # DDP arranges its buckets and FSDP sets itself up in the first window
                model.zero_grad()
                count = counted(run_window, model, policy)
                assert is_first or count == times(promised, num_groups(model)), policy
                assert error_of(model, want) < tolerance, policy


def test_the_policies_differ_before_the_last_micro_batch_only():
    before = {policy: tuple(communicates(policy, is_last=False)) for policy in POLICIES}
    assert before == {"defer": (False, False), "every": (True, True), "reduce_scatter": (True, False)}
    assert {tuple(communicates(policy, is_last=True)) for policy in POLICIES} == {(True, True)}


def test_a_wrong_policy_is_named_beside_the_right_ones():
    with pytest.raises(
        InvalidArgumentError, match="sync must be one of defer, every, reduce_scatter, auto, got 'sometimes'"
    ):
        GradUtilsPlugin(sync="sometimes")
    with pytest.raises(InvalidArgumentError, match="sync='reduce_scatter' and accelerate's sync_each_batch=True"):
        GradUtilsPlugin(sync="reduce_scatter", sync_each_batch=True)


class Branches(nn.Module):
    """Two branches of which a micro-batch may take one: experts, or a tower for images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.branches = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.shared = nn.Linear(4, 4, bias=False)
        self.double()

    def forward(self, x, branch):
        return self.shared(torch.tanh(self.branches[branch](x)))


@pytest.mark.parametrize("are_apart", [True, False], ids=["each its group", "in one group"])
@pytest.mark.parametrize("order", [(0, 1, 0, 1), (1, 0, 0, 0)], ids=str)
@on_layouts("hsdp2x2")
def test_a_parameter_without_a_gradient_in_some_micro_batches_loses_none(layout, mesh, order, are_apart):
    x = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = Branches()
    for part, branch in zip(x, order, strict=True):
        alone(part, branch).square().sum().backward()
    for policy in POLICIES:
        model = Branches()
        for child in (*model.branches, model) if are_apart else (model,):
            fully_shard(child, mesh=mesh)

        is_refused = FORGETS and policy == "reduce_scatter"
        message = r"took no part in a micro-batch; under HSDP before torch 2\.15"
        refusal = pytest.raises(InvalidArgumentError, match=message)
        with refusal if is_refused else contextlib.nullcontext():
            for i, (part, branch) in enumerate(zip(x, order, strict=True)):
                with SyncContext(model, policy, is_last=i == ACCUMULATION - 1):
                    model(part, branch).square().sum().backward()
        want = {name: p.grad for name, p in alone.named_parameters()}
        assert is_refused or relative_error(whole_gradients(model), want) < 1e-12, policy


# ---- State ----


def flags_of(model):
    flags = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            flags.append(module.require_backward_grad_sync)
        elif isinstance(module, FSDPModule):
            flags += [tuple(pair) for _, *pair in fsdp2_sync_flags(module)]
        elif isinstance(module, FullyShardedDataParallel):
            flags.append(fsdp1_sync_flag(module))
    return flags


@ignores_deprecation
@pytest.mark.parametrize(("layout", "wrapping"), [("ddp2", ""), ("hsdp2x2", ""), ("fsdp2x2", "fsdp1")])
@on_layouts()
def test_the_prior_state_comes_back_whatever_it_was(layout, mesh, wrapping):
    model = wrap(layout, mesh, wrapping)
    at_first = flags_of(model)
    assert at_first
    for policy in POLICIES:
        for outer in POLICIES:
            with SyncContext(model, outer, is_last=False):
                before = flags_of(model)
                with SyncContext(model, policy, is_last=True):
                    assert flags_of(model) == at_first, "everything is communicated on the last micro-batch"
                assert flags_of(model) == before
                with pytest.raises(RuntimeError, match="boom"), SyncContext(model, policy, is_last=False):
                    raise RuntimeError("boom")
                assert flags_of(model) == before
    assert flags_of(model) == at_first


@ignores_deprecation
@pytest.mark.parametrize(("layout", "wrapping"), [*PLAIN, ("fsdp2x2", "fsdp1")])
@on_layouts()
def test_a_window_that_was_given_up_leaves_nothing_for_the_next(layout, mesh, wrapping):
    want = true_mean_gradient()
    for policy in POLICIES:
        model = wrap(layout, mesh, wrapping)
        is_held_elsewhere = isinstance(model, FSDPModule) and (
            policy == "defer" or (policy == "reduce_scatter" and layout == "hsdp2x2")
        )
        for drop in (nn.Module.zero_grad, discard_deferred):
            with pytest.raises(RuntimeError, match="boom"):
                run_window(model, policy, stop_before=2)
            drop(model)
            run_window(model, policy)
            is_control = drop is nn.Module.zero_grad and is_held_elsewhere
            error = error_of(model, want)
            assert error > 0.1 if is_control else error < 1e-12, (policy, drop, error)
            discard_deferred(model)
        # FSDP2 of torch 2.11 and FSDP1 have no way back from the middle of a forward.
        if wrapping != "fsdp1" and (hasattr(model, "reset_iter_state") or not isinstance(model, FSDPModule)):
            for place in ("forward", "backward"):
                fail_in(place, model)
                discard_deferred(model)
                run_window(model, policy)
                assert error_of(model, want) < 1e-12, (policy, place)
                discard_deferred(model)


def fail_in(place, model):
    """Run half a micro-batch of a deferred window."""

    def fail(*_):
        raise RuntimeError("boom")

    [layer] = [module for name, module in model.named_modules() if name.endswith("up")]
    handle = (layer.register_forward_hook if place == "forward" else layer.register_full_backward_hook)(fail)
    with pytest.raises(RuntimeError, match="boom"), SyncContext(model, "defer", is_last=False):
        model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    handle.remove()
