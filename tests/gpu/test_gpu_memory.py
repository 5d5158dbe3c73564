"""Memory held on the GPU: gradients under each sync policy, the estimate of ``auto``, and batches."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.sync import SyncContext, free_bytes
from hf_gradutils.sync._auto import deferred_bytes
from tests.gpu.cuda_cases import DEVICE, SHARED, arguments_for, assert_on, exact_attention, on_ranks, run
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.heads import collate
from tests.harness.tiny_net import (
    data_rank,
    make_batch,
    make_mesh,
    make_net,
    parallelize,
    summed_loss,
    true_mean_gradient,
)
from tests.harness.trainer_cases import make_data, train, truth

POLICIES = ("defer", "every", "reduce_scatter")
MIB = 2**20
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="asks CUDA's allocator")


# ---- The same gradients ----


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2"])
def test_every_policy_gives_the_same_gradient(layout):
    on_ranks(policies_agree, 2, DEVICE, layout)


def policies_agree(device, layout):
    mesh = make_mesh(layout, device)
    index, size = data_rank(mesh)
    x, y, mask = (part[index::size].to(device) for part in make_batch())
    factor = size / make_batch()[2].sum().item()
    for policy in POLICIES:
        model = parallelize(make_net().to(device), layout, mesh)
        assert_on(model, device)
        for _ in range(2):  # DDP arranges its buckets and FSDP2 sets itself up in the first window
            model.zero_grad()
            for i, rows in enumerate(torch.arange(len(x), device=device).chunk(4)):
                with SyncContext(model, policy, is_last=i == 3):
                    summed_loss(model, x[rows], y[rows], mask[rows]).backward()
            assert_on(model, device)
            got = {name: g * factor for name, g in whole_gradients(model).items()}
            assert relative_error(got, true_mean_gradient()) < 1e-12, policy


@pytest.mark.parametrize("layout", SHARED)
def test_the_trainer_is_exact_under_every_policy(layout):
    run(trainer_agrees, layout)


def trainer_agrees(layout, device):
    head = "llama causal"
    want, _ = truth(head, make_data(head))
    arguments = {"max_steps": 4, "learning_rate": 0.0} | arguments_for(device, layout)
    for sync in (*POLICIES, "auto"):  # auto decides in the third step
        plugin = GradUtilsPlugin(sync=sync)
        with exact_attention():
            trainer, tap = train(head, 4, layout=layout, grad_plugin=plugin, arguments=arguments)
        assert_on(trainer.model_wrapped, device)
        assert [relative_error(step, want) < 1e-5 for step in tap.steps] == [True] * 4, sync


# ---- Gradients that wait ----

SIZE, NUM_LAYERS = 1024, 24


@needs_cuda
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2"])
def test_the_estimate_of_deferred_memory_is_what_is_measured(layout):
    held, peak, estimate = on_ranks(memory_of_policies, 2, DEVICE, layout)[0]
    print(layout, "held", held, "peak", peak, "estimate", estimate)
    whole = NUM_LAYERS * SIZE * (SIZE + 1) * 4 / MIB
    if layout == "ddp2":
        assert estimate == 0
        assert max(held.values()) - min(held.values()) < 0.2 * whole, "gradients of DDP are whole under any policy"
        return
    assert estimate == pytest.approx(whole / 2, rel=0.01)
    assert held["defer"] - held["every"] == pytest.approx(estimate, rel=0.2)
    assert held["reduce_scatter"] == pytest.approx(whole / 2, rel=0.2), "each of two ranks its shards"
    assert 0.6 * estimate < peak["defer"] - peak["every"] < 1.2 * estimate


def memory_of_policies(device, layout):
    """MiB beyond what was there before the window, between its micro-batches and at its peak; and the estimate."""
    mesh, held, peak = make_mesh(layout, device), {}, {}
    x = torch.randn(2, SIZE, device=device)
    for policy in POLICIES:
        net = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(NUM_LAYERS))).to(device)
        if layout == "ddp2":
            model = DistributedDataParallel(net)
        else:
            for part in net:
                fully_shard(part, mesh=mesh)
            model = fully_shard(net, mesh=mesh)
        for _ in range(3):  # DDP moves its buckets in the second window
            start, during = _allocated_mib(), []
            torch.cuda.reset_peak_memory_stats()
            for i in range(4):
                with SyncContext(model, policy, is_last=i == 3):
                    model(x).sum().backward()
                during.append(_allocated_mib() - start)
            peak[policy] = torch.cuda.max_memory_allocated() / MIB - start
            model.zero_grad()
        held[policy] = min(during[:-1])
        estimate = deferred_bytes(model) / MIB
        del net, model
    return held, peak, estimate


def _allocated_mib():
    """Once all ranks are here and gloo's threads have let go of what they carried."""
    torch.cuda.synchronize()
    dist.barrier()
    time.sleep(0.05)
    return torch.cuda.memory_allocated() / MIB


@needs_cuda
def test_the_free_memory_is_what_is_left_at_the_peak():
    on_ranks(free_at_peak, 1, DEVICE)


def free_at_peak(device):
    size = 512 * MIB
    torch.zeros((), device=device)
    before = free_bytes(torch.device(device))
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0 < before <= total
    block = torch.empty(size, dtype=torch.uint8, device=device)
    assert before - free_bytes(torch.device(device)) == pytest.approx(size, rel=0.2)
    del block
    assert before - free_bytes(torch.device(device)) == pytest.approx(size, rel=0.2), "it was needed once"


# ---- Batches ----

NUM_FLOATS = MIB  # 4 MiB a batch
NUM_BATCHES = 32


class Wide(nn.Module):
    """Large rows for a small model."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, labels):
        prediction = x.mean(1) * self.weight
        return {"loss": (prediction - labels).square().mean(), "logits": prediction}


def test_a_window_of_many_micro_batches_does_not_hold_their_batches():
    [(ours, stock)] = run(peaks_of_batches, "one_rank")
    if DEVICE == "cuda":
        assert ours < 6 * 4 * MIB, "one that is trained, one ahead, and what is being copied"
        assert stock > 0.9 * NUM_BATCHES * 4 * MIB, "the control holds all of them"


def peaks_of_batches(layout, device):
    """Bytes at the peak of a training of the Trainer and of the stock Trainer, beyond what was there."""
    peaks = []
    for trainer_class in (GradUtilsTrainer, Trainer):
        generator = torch.Generator().manual_seed(1)
        shared = torch.randn(NUM_FLOATS, generator=generator)
        data = [{"x": shared, "labels": torch.tensor(float(i))} for i in range(NUM_BATCHES)]
        options = {"trainer_class": trainer_class, "data": data, "data_collator": collate, "layout": layout}
        if trainer_class is GradUtilsTrainer:
            options["grad_plugin"] = GradUtilsPlugin(loss_unit="rows", check_loss_unit=False)
        if device == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated() if device == "cuda" else 0
        train("plain module", NUM_BATCHES, model=Wide(), arguments=arguments_for(device, layout), **options)
        peaks.append(torch.cuda.max_memory_allocated() - start if device == "cuda" else 0)
    return tuple(peaks)
