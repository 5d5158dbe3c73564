"""Sync policies: the same gradient, the communication and the memory that each promises, and nothing left behind."""

import ctypes
import logging
import math
import os

import peft
import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsAccelerator
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.sync import PolicyChoice, SyncContext, communicates, discard_deferred, free_bytes
from hf_gradutils.sync import _auto as sync_auto
from hf_gradutils.sync._auto import decide, deferred_bytes
from hf_gradutils.upstream.fsdp import fsdp1_sync_flag, fsdp2_sync_flags
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.heads import HEADS
from tests.harness.ranks import ranks, run_ranks
from tests.harness.tiny_net import (
    data_rank,
    make_batch,
    make_mesh,
    make_net,
    parallelize,
    summed_loss,
    true_mean_gradient,
)
from tests.harness.trainer_cases import IS_OLD, make_data, make_model, train, truth

ACCUMULATION = 4
POLICIES = ("defer", "every", "reduce_scatter")

COUNTS = {
    "ddp2": {"defer": (0, 1), "every": (0, 4), "reduce_scatter": (0, 1)},
    "fsdp2x2": {"defer": (1, 0), "every": (4, 0), "reduce_scatter": (4, 0)},
    "hsdp2x2": {"defer": (1, 1), "every": (4, 4), "reduce_scatter": (4, 1)},
    "fsdp1x2": {"defer": (1, 0), "every": (4, 0), "reduce_scatter": (4, 0)},
    "hybrid_fsdp1_2x2": {"defer": (1, 1), "every": (4, 4), "reduce_scatter": (4, 4)},
}
"""(reduce-scatters, all-reduces) of a window of four micro-batches: per bucket of DDP, per group of FSDP."""

WRAPPED = {"ddp2_in_a_module": "ddp2", "compiled_fsdp2x2": "fsdp2x2"}
"""Layout with something around it → the layout that it communicates like."""

FORGETS = not hasattr(FSDPParamGroup, "_get_partial_reduce_grad")
"""Until torch 2.13 HSDP does not know whose shards wait for the all-reduce."""


class Holder(nn.Module):
    """A module around the wrapper, as PEFT's."""

    def __init__(self, module):
        super().__init__()
        self.base_model = module

    def forward(self, x):
        return self.base_model(x)


def make_wrapped(layout, dtype=torch.float64):
    net = make_net(dtype)
    if "fsdp1" in layout:
        hybrid = layout.startswith("hybrid")
        return FullyShardedDataParallel(
            net,
            device_mesh=init_device_mesh("cpu", (2, 2)) if hybrid else None,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    inner = WRAPPED.get(layout, layout)
    model = parallelize(net, inner, make_mesh(inner))
    if layout.startswith("compiled"):
        return torch.compile(model, backend="eager")
    return Holder(model) if layout in WRAPPED else model


def num_ranks_of(layout):
    return 4 if "hsdp" in layout or "hybrid" in layout else 2


def num_groups(model):
    """Buckets or groups that have something to train; a group of several modules is one."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = {id(group): group for module in modules for group, *_ in fsdp2_sync_flags(module)}
    return sum(any(p.sharded_param.requires_grad for p in group.fsdp_params) for group in groups.values()) or 1


def micro_batches():
    """This rank's rows, in four parts; as (x, y, mask)."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else data_rank(None)
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
    names = {name: name.removeprefix("_orig_mod.").removeprefix("base_model.module.") for name in gradients}
    gradients = {names[name].removeprefix("module."): grad * factor for name, grad in gradients.items()}
    return relative_error(gradients, want)


# ---- Gradients and communication ----


@pytest.mark.filterwarnings("ignore:FSDP1:FutureWarning", "ignore:.*FullyShardedDataParallel:FutureWarning")
@pytest.mark.parametrize("layout", [*COUNTS, *WRAPPED])
def test_each_policy_gives_the_same_gradient_for_the_communication_it_promises(layout):
    run_ranks(_promises, num_ranks_of(layout), layout)


def _promises(layout):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        want = true_mean_gradient(dtype)
        for policy in POLICIES:
            model = make_wrapped(layout, dtype)
            for is_first in (True, False):  # DDP arranges its buckets and FSDP sets itself up in the first window
                model.zero_grad()
                promised = COUNTS[WRAPPED.get(layout, layout)][policy]
                count = counted(run_window, model, policy)
                assert is_first or count == times(promised, num_groups(model)), policy
                assert error_of(model, want) < tolerance, policy


def test_the_policies_differ_before_the_last_micro_batch_only():
    before = {policy: tuple(communicates(policy, is_last=False)) for policy in POLICIES}
    assert before == {"defer": (False, False), "every": (True, True), "reduce_scatter": (True, False)}
    assert {tuple(communicates(policy, is_last=True)) for policy in POLICIES} == {(True, True)}


class Branches(nn.Module):
    """Two branches of which a micro-batch may take one: experts, or a tower for images."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.shared = nn.Linear(4, 4, bias=False)

    def forward(self, x, branch):
        return self.shared(torch.tanh(self.branches[branch](x)))


def make_branches():
    torch.manual_seed(1)
    return Branches().double()


@pytest.mark.parametrize("are_apart", [True, False], ids=["each its group", "in one group"])
@pytest.mark.parametrize("order", [(0, 1, 0, 1), (1, 0, 0, 0)], ids=str)
def test_a_parameter_without_a_gradient_in_some_micro_batches_loses_none(order, are_apart):
    run_ranks(_keeps_branches, 4, order, are_apart)


def _keeps_branches(order, are_apart):
    x = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = make_branches()
    for part, branch in zip(x, order, strict=True):
        alone(part, branch).square().sum().backward()
    for policy in POLICIES:
        model = make_branches()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "dp"))
        for child in (*model.branches, model) if are_apart else (model,):
            fully_shard(child, mesh=mesh)

        def run(model=model, policy=policy):
            for i, (part, branch) in enumerate(zip(x, order, strict=True)):
                with SyncContext(model, policy, is_last=i == ACCUMULATION - 1):
                    model(part, branch).square().sum().backward()

        if FORGETS and policy == "reduce_scatter":
            with pytest.raises(
                InvalidArgumentError, match=r"took no part in a micro-batch; under HSDP before torch 2\.15"
            ):
                run()
            continue
        run()
        want = {name: p.grad for name, p in alone.named_parameters()}
        assert relative_error(whole_gradients(model), want) < 1e-12, policy


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


@pytest.mark.filterwarnings("ignore:FSDP1:FutureWarning", "ignore:.*FullyShardedDataParallel:FutureWarning")
@pytest.mark.parametrize("layout", ["ddp2", "hsdp2x2", "fsdp1x2"])
def test_the_prior_state_comes_back_whatever_it_was(layout):
    run_ranks(_restores, num_ranks_of(layout), layout)


def _restores(layout):
    model = make_wrapped(layout)
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


@pytest.mark.filterwarnings("ignore:FSDP1:FutureWarning", "ignore:.*FullyShardedDataParallel:FutureWarning")
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2", "hsdp2x2", "fsdp1x2"])
def test_a_window_that_was_given_up_leaves_nothing_for_the_next(layout):
    run_ranks(_gives_up, num_ranks_of(layout), layout)


def _gives_up(layout):
    want = true_mean_gradient()
    for policy in POLICIES:
        model = make_wrapped(layout)
        is_held_elsewhere = isinstance(model, FSDPModule) and (
            policy == "defer" or (policy == "reduce_scatter" and layout.startswith("hsdp"))
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
        if layout != "fsdp1x2" and (hasattr(model, "reset_iter_state") or not isinstance(model, FSDPModule)):
            for place in ("forward", "backward"):
                _fail_in(place, model)
                discard_deferred(model)
                run_window(model, policy)
                assert error_of(model, want) < 1e-12, (policy, place)
                discard_deferred(model)


def _fail_in(place, model):
    """Half a micro-batch of a deferred window."""

    def fail(*_):
        raise RuntimeError("boom")

    [layer] = [module for name, module in model.named_modules() if name.endswith("up")]
    handle = (layer.register_forward_hook if place == "forward" else layer.register_full_backward_hook)(fail)
    with pytest.raises(RuntimeError, match="boom"), SyncContext(model, "defer", is_last=False):
        model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    handle.remove()


# ---- Memory ----

SIZE, NUM_LAYERS = 384, 16
MIB = 2**20


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2", "fsdp2x2 mixed", "fsdp2x2 bf16", "hsdp2x2"])
def test_the_estimate_of_deferred_memory_is_what_is_measured(layout):
    kept, estimate = run_ranks(_memory, num_ranks_of(layout), layout)[0]
    print(layout, {policy: f"{mib:.1f} MiB" for policy, mib in kept.items()}, f"estimate {estimate:.1f} MiB")
    whole = NUM_LAYERS * SIZE * (SIZE + 1) * 4 / MIB
    if layout == "ddp2":
        assert estimate == 0
        assert max(kept.values()) - min(kept.values()) < 0.2 * whole, "gradients of DDP are whole under any policy"
        return
    assert kept["defer"] - kept["every"] == pytest.approx(estimate, rel=0.2, abs=0.1 * whole if not estimate else 0)
    assert kept.get("reduce_scatter", kept["every"]) == pytest.approx(whole / 2, rel=0.2), (
        "each of two ranks its shards"
    )


def _memory(layout):
    """MiB that each policy keeps between micro-batches beyond what was there before the window, and the estimate."""
    mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32 if "mixed" in layout else None}
    policy = MixedPrecisionPolicy(**mixed if " " in layout else {})
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
    mesh = init_device_mesh(
        "cpu", (2, 2) if "hsdp" in layout else (2,), mesh_dim_names=("rep", "dp")[-2 if "hsdp" in layout else -1 :]
    )
    x, kept = torch.randn(2, SIZE), {}
    for sync in POLICIES[:2] if " " in layout else POLICIES:
        net = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(NUM_LAYERS)))
        if layout == "ddp2":
            model = DistributedDataParallel(net)
        else:
            *layers, norm, head = net
            for part in (*layers, [norm, head]):  # accelerate and torchtitan put the last two into one group
                fully_shard(part, mesh=mesh, mp_policy=policy)
            model = fully_shard(net, mesh=mesh, mp_policy=policy)
        for _ in range(4):  # the first ones take memory that stays: DDP moves its buckets in the second, say
            start, during = _resident_mib(), []
            for i in range(ACCUMULATION):
                with SyncContext(model, sync, is_last=i == ACCUMULATION - 1):
                    model(x).sum().backward()
                during.append(_resident_mib() - start)
            model.zero_grad()
        kept[sync] = min(during[:-1])
    return kept, deferred_bytes(model) / MIB


def _resident_mib():
    """Once all ranks are here and gloo's threads have let go of their buffers."""
    sizes = []
    for _ in range(3):
        dist.barrier()
        sizes.append(psutil.Process().memory_info().rss / MIB)
    return min(sizes)


@pytest.mark.filterwarnings("ignore:FSDP1:FutureWarning", "ignore:.*FullyShardedDataParallel:FutureWarning")
@ranks(2)
def test_deferring_under_fsdp1_takes_the_other_ranks_shards():
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    whole = sum(p.numel() * p.itemsize for p in net.parameters())
    inner = FullyShardedDataParallel(net[0], device_id=torch.device("cpu"), use_orig_params=True)
    model = FullyShardedDataParallel(
        nn.Sequential(inner, *net[1:]), device_id=torch.device("cpu"), use_orig_params=True
    )
    total = torch.tensor(float(deferred_bytes(model)))
    dist.all_reduce(total)
    assert total.item() == whole, "each rank what it lacks, and two ranks lack everything once"


# ---- auto ----


def test_all_ranks_choose_what_the_tightest_one_needs():
    chosen = run_ranks(_choose, 2)
    assert [policies for policies, _ in chosen] == [["defer", "defer", "reduce_scatter", "reduce_scatter"]] * 2
    logs = chosen[0][1]
    assert len(logs) == 4
    assert "'defer': deferring takes up to 2.00 GiB more per rank" in logs[0]
    assert "has 4.00 GiB free" in logs[0]
    assert "has 1.00 GiB free" in logs[2]
    assert chosen[1][1] == [], "one rank speaks for all"


def _choose():
    gib, cpu = 2**30, torch.device("cpu")
    is_first = dist.get_rank() == 0
    lines = _listen()
    cases = [(2, 4 if is_first else 8), (0, 0), (2, 8 if is_first else 1), (2, 0)]
    return [decide(needed * gib, free * gib, cpu) for needed, free in cases], lines


def _listen():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    sync_auto.logger.addHandler(handler)
    sync_auto.logger.setLevel(logging.INFO)
    return lines


@ranks(2)
def test_auto_is_careful_until_the_second_step_and_then_decides_once():
    lines, model = _listen(), make_wrapped("fsdp2x2")
    choice = PolicyChoice("auto", torch.device("cpu"))
    for _ in range(2):
        assert {choice.policy(model, is_last=is_last) for is_last in (False, True)} == {"reduce_scatter"}
        choice.window_closed()
    assert choice.policy(model, is_last=True) == "reduce_scatter", "nothing is decided where nothing accumulates"
    with Collectives() as collectives:
        assert [choice.policy(model, is_last=i == 3) for i in range(4)] == ["defer"] * 4
    choice.window_closed()
    assert choice.policy(model, is_last=False) == "defer"
    assert collectives.names == ["allgather_"]
    assert len(lines) == (dist.get_rank() == 0)


def test_auto_alone_needs_no_process_group():
    choice = PolicyChoice("auto", torch.device("cpu"))
    choice.window_closed()
    choice.window_closed()
    assert choice.policy(make_net(), is_last=False) == "defer", "nothing is sharded, so nothing is kept"


def test_the_free_memory_of_a_machine_is_that_which_psutil_sees():
    assert math.isclose(free_bytes(torch.device("cpu")), psutil.virtual_memory().free, rel_tol=0.3)
    assert os.sysconf("SC_AVPHYS_PAGES") > 0


# ---- The Trainer and the Accelerator ----


class Counting(GradUtilsTrainer):
    """Counts the collectives of every forward and backward."""

    def training_step(self, *args, **kwargs):
        losses = []
        pair = counted(lambda: losses.append(super(Counting, self).training_step(*args, **kwargs)))
        self.counts = [*getattr(self, "counts", []), pair]
        return losses[0]

    def per_step(self, accumulation=ACCUMULATION):
        starts = range(0, len(self.counts), accumulation)
        sums = [tuple(map(sum, zip(*self.counts[i : i + accumulation], strict=True))) for i in starts]
        return [times(pair, 1 / num_groups(self.model_wrapped)) for pair in sums]


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2", "hsdp2x2", *([] if IS_OLD else ["native_hsdp2x2"])])
def test_a_step_of_the_trainer_communicates_as_the_policy_says(layout):
    run_ranks(_trains, 4 if "hsdp" in layout else 2, layout)


def test_so_it_does_with_adapters():
    run_ranks(_trains, 2, "fsdp2x2", with_adapters=True)


def make_adapted(head):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(make_model(head), config)


def _trains(layout, with_adapters=False):
    head = "llama causal"
    if with_adapters:
        alone = make_adapted(head).double()
        alone(**HEADS[head].collate(make_data(head)))["loss"].backward()
        want = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    else:
        want, _ = truth(head, make_data(head))
    like = layout.removeprefix("native_")
    for sync in POLICIES:
        trainer, tap = train(
            head,
            ACCUMULATION,
            layout=layout,
            model=make_adapted(head) if with_adapters else None,
            trainer_class=Counting,
            grad_plugin=GradUtilsPlugin(sync=sync),
            arguments={"max_steps": 2, "ddp_find_unused_parameters": False},
        )
        # The first step also looks at the model: buckets, copies, the unit of the loss.
        assert trainer.per_step()[1] == COUNTS[like][sync], sync
        assert relative_error(tap.steps[0], want) < 1e-5, sync


def test_a_training_that_was_interrupted_starts_afresh():
    run_ranks(_interrupted, 2)


class Interrupted(GradUtilsTrainer):
    """Stops once, in the middle of its first window, and is started again."""

    num_steps = 0

    def training_step(self, *args, **kwargs):
        self.num_steps += 1
        loss = super().training_step(*args, **kwargs)
        if self.num_steps == 2:
            raise KeyboardInterrupt
        return loss

    def train(self, *args, **kwargs):
        if not self.num_steps:
            with pytest.raises(KeyboardInterrupt):
                super().train(*args, **kwargs)
        return super().train(*args, **kwargs)


def _interrupted():
    head = "llama causal"
    _, tap = train(head, ACCUMULATION, layout="native_fsdp2x2", trainer_class=Interrupted)
    assert relative_error(tap.steps[0], truth(head, make_data(head))[0]) < 1e-5


def test_auto_settles_in_the_third_step_of_the_trainer():
    run_ranks(_settles, 2)


def _settles():
    lines = _listen()
    trainer, _ = train(
        "llama causal",
        ACCUMULATION,
        layout="fsdp2x2",
        trainer_class=Counting,
        grad_plugin=GradUtilsPlugin(sync="auto"),
        arguments={"max_steps": 4},
    )
    assert [num_reduce_scatters for num_reduce_scatters, _ in trainer.per_step()] == [4, 4, 1, 1]
    assert len(lines) == (dist.get_rank() == 0)


def test_accelerates_own_option_means_every():
    run_ranks(_every_batch, 2)


def _every_batch():
    arguments = {"max_steps": 2, "ddp_find_unused_parameters": False}
    trainer, _ = train("llama causal", ACCUMULATION, trainer_class=Counting, arguments=arguments | _each_batch())
    assert trainer.per_step()[1] == COUNTS["ddp2"]["every"]
    with pytest.raises(InvalidArgumentError, match="sync='auto' and accelerate's sync_each_batch=True contradict"):
        train("llama causal", ACCUMULATION, grad_plugin=GradUtilsPlugin(sync="auto"), arguments=_each_batch())


def _each_batch():
    # A dict of its own each time: transformers writes into it.
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def test_the_loop_of_accelerate_communicates_as_the_policy_says():
    run_ranks(_accumulates, 2)


def _accumulates():
    plugin = GradientAccumulationPlugin(num_steps=ACCUMULATION, sync_with_dataloader=False)
    for sync in POLICIES:
        accelerator = GradUtilsAccelerator.adopt(
            Accelerator(cpu=True, gradient_accumulation_plugin=plugin), GradUtilsPlugin(sync=sync)
        )
        accelerator.step = 0
        model = accelerator.prepare(make_net())
        assert isinstance(model, DistributedDataParallel)

        def window(accelerator=accelerator, model=model):
            for x, y, mask in micro_batches():
                with accelerator.accumulate(model):
                    summed_loss(model, x, y, mask).backward()
            assert accelerator.sync_gradients

        window()
        model.zero_grad()
        assert counted(window) == COUNTS["ddp2"][sync], sync
        assert error_of(model, true_mean_gradient()) < 1e-12
        with accelerator.no_sync(model):
            assert model.require_backward_grad_sync is (sync == "every")


def test_a_wrong_policy_is_named_beside_the_right_ones():
    with pytest.raises(
        InvalidArgumentError, match="sync must be one of defer, every, reduce_scatter, auto, got 'sometimes'"
    ):
        GradUtilsPlugin(sync="sometimes")
    with pytest.raises(InvalidArgumentError, match="sync='reduce_scatter' and accelerate's sync_each_batch=True"):
        GradUtilsPlugin(sync="reduce_scatter", sync_each_batch=True)
