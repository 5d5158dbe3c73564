"""Peak memory of a window under each sync policy: two ranks, on one GPU where there is one, over gloo.

NCCL refuses two ranks on one device. gloo carries CUDA tensors through the host: slowly, and so that nothing of it is
in the device's memory but one copy of what a reduce-scatter sends.
"""

import functools
import logging
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.performance.gpu import clock
from benchmarks.performance.gpu.clock import mib
from benchmarks.performance.gpu.part import Part
from benchmarks.trainings import silence
from hf_gradutils.sync import SYNCS, PolicyChoice, Sync, SyncContext
from hf_gradutils.sync._auto import deferred_bytes
from hf_gradutils.window import AccumulationWindow
from tests.harness.cuda_ranks import one_gpu
from tests.harness.ranks import run_ranks

WRAPPERS = ("ddp2", "fsdp2x2")
DEADLINE_S = 60
"""Of the ranks for one row."""
LARGEST_ERROR = 1e-5
"""Of a norm, relative to that of another wrapper or policy, which adds in another order."""


@dataclass(frozen=True)
class Layers:
    """The model: so many square matrices, each an FSDP2 group, and one more around all of them."""

    depth: int = 16
    width: int = 1024

    @property
    def num_bytes(self) -> int:
        """Of the parameters."""
        return self.depth * self.width**2 * 4

    def __str__(self) -> str:
        return f"{self.depth} linear layers of {self.width} × {self.width} in float32 ({mib(self.num_bytes)})"

    def make(self, wrapper: str, device: torch.device) -> nn.Module:
        """The same numbers each time, wrapped."""
        torch.manual_seed(5)
        model: nn.Module = nn.Sequential(*(nn.Linear(self.width, self.width, bias=False) for _ in range(self.depth)))
        model = model.to(device)
        if wrapper == "ddp2":
            return DistributedDataParallel(model)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
            module.set_force_sum_reduction_for_comms(True)  # not AVG, which is NCCL's
        return model


@dataclass(frozen=True)
class Peak:
    """Of one policy on one rank."""

    policy: str
    """Which one it was in the end."""
    peak_bytes: int
    estimate_bytes: int
    """Expected memory of deferring beyond ``every``."""
    grad_norm: float


def measure(device: torch.device, layers: Layers, accumulation: int, until: float) -> Part:
    """A table of the wrappers and policies; their values are peaks.

    Args:
        device: Its kind; on a GPU both ranks take the first one.
        layers: The model.
        accumulation: Micro-batches of a window.
        until: Time by ``time.monotonic`` after which no further one is begun.
    """
    found = Part("", "policy", "peak", "beyond every", "expected")
    for wrapper in WRAPPERS:
        for policy in sorted(SYNCS, key=lambda policy: policy != "every"):  # what others are compared with first
            if time.monotonic() > until:
                found.add(wrapper, policy, "not measured: no time left")
                continue
            of_ranks = functools.partial(_of_ranks, device, wrapper, policy, layers, accumulation)
            peak = clock.attempt(of_ranks, device)
            if isinstance(peak, str):
                found.add(wrapper, policy, peak)
                found.faults.append(f"{wrapper}, {policy}: {peak}")
                continue
            found.values[wrapper, policy] = peak
            every = found.values.get((wrapper, "every"))
            beyond = mib(peak.peak_bytes - every.peak_bytes) if every else ""
            expected = mib(peak.estimate_bytes if peak.policy == "defer" else 0)
            name = policy if policy == peak.policy else f"{policy}: {peak.policy}"
            found.add(wrapper, name, mib(peak.peak_bytes), beyond, expected)
            first = next(iter(found.values.values()))
            if not abs(peak.grad_norm / first.grad_norm - 1) <= LARGEST_ERROR:
                found.faults.append(f"{wrapper}, {policy}: the norm is {peak.grad_norm}, not {first.grad_norm}")
    return found


def _of_ranks(device: torch.device, wrapper: str, policy: Sync, layers: Layers, accumulation: int) -> Peak:
    """Of the rank that took most."""
    arguments = (device.type, wrapper, policy, layers, accumulation)
    with silence():
        peaks = run_ranks(_on_rank, 2, *arguments, env=one_gpu() | {"LOCAL_RANK": "0"}, deadline_s=DEADLINE_S)
    return max(peaks, key=lambda peak: peak.peak_bytes)


def _on_rank(device_type: str, wrapper: str, policy: Sync, layers: Layers, accumulation: int) -> Peak:
    logging.disable(logging.WARNING)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
    model = layers.make(wrapper, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    choice = PolicyChoice(policy, device)
    window = AccumulationWindow(device)
    for num_micro_batches in (2, 2, accumulation):  # the first makes the optimizer's state, the second shows the peak
        chosen = ""
        for index in range(num_micro_batches):
            is_last = index == num_micro_batches - 1
            chosen = choice.policy(model, is_last=is_last)
            if index == 0:  # after `auto` has looked at the peak of the window before
                clock.reset_peak(device)
            rows = torch.full((4, layers.width), 1.0 + index + dist.get_rank(), device=device)
            with SyncContext(model, chosen, is_last=is_last):
                loss = model(rows).square().mean()
                window.weigh(loss, torch.tensor(index + 1)).backward()
        choice.window_closed()
        report = window.close(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Peak(chosen, clock.peak_bytes(device), deferred_bytes(model), report.grad_norm.item())
