"""The device, ranks that share one GPU, and where tensors have to be, for the tests on a GPU."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import run_ranks

DEVICE = os.environ.get("HF_GRADUTILS_TEST_DEVICE", "cuda")
"""``cpu`` tries out all that does not need CUDA. Read by pytest only; ranks get it as an argument."""

SHARED = ["ddp2", "fsdp2x2"]
"""Layouts of two ranks, of ``trainer_cases``, that one GPU can run.

NCCL refuses two ranks on one device; gloo takes CUDA tensors and carries them through the host. All that DDP and FSDP2
ask for is there: all-reduce, all-gather, broadcast and scatter, a reduce-scatter made of an all-reduce, and AVG, which
FSDP2 asks for in float32 and bfloat16, as a sum and a division.

Source: ``ProcessGroupGloo.cpp``, ``ProcessGroupGlooCuda.cpp`` and ``ProcessGroupGlooDetail.hpp`` of torch 2.8 on.
"""

DEADLINE_S = 240
_WITHOUT_LAUNCHER = dict.fromkeys(
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR")
)


def on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, init: bool = True) -> list[Any]:
    """Call ``function(*args)`` in processes of their own, one as a plain script, or several that share the GPU.

    Several are nodes of one rank each: on local rank 1 accelerate would want a second GPU.
    """
    if num_ranks == 1:
        options: dict[str, Any] = {"init": False, "agent": False, "env": _WITHOUT_LAUNCHER}
    else:
        options = {"nodes": num_ranks, "init": init}
    return run_ranks(function, num_ranks, *args, deadline_s=DEADLINE_S, **options)


def run(function: Callable[..., Any], layout: str, *args: Any) -> list[Any]:
    """Call ``function(layout, device, *args)`` on every rank of a layout of ``trainer_cases``."""
    return on_ranks(function, LAYOUTS[layout].num_ranks, layout, DEVICE, *args)


def arguments_for(device: str, layout: str) -> dict[str, Any]:
    """Arguments of ``TrainingArguments`` for the device."""
    if device == "cpu":
        return {}
    return {"use_cpu": False} | ({"ddp_backend": "gloo"} if LAYOUTS[layout].num_ranks > 1 else {})


def assert_on(model: nn.Module, device: str) -> None:
    assert {p.device.type for p in model.parameters()} == {device}
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} <= {device}


def exact_attention() -> contextlib.AbstractContextManager[None]:
    """The plain formula: fused kernels have an accuracy of their own."""
    return sdpa_kernel(SDPBackend.MATH)


@contextlib.contextmanager
def sync_debug(device: str, mode: str) -> Iterator[None]:
    """Let torch ``warn`` or raise an ``error`` where the host waits for the device. Nothing on CPU.

    It sees ATen's calls to CUDA: copies, also of Python's numbers, and reads; neither events nor process groups.
    """
    if device == "cpu":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, and says so
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def num_waits(device: str, function: Callable[[], Any]) -> int:
    """How often the host waited for the device; 0 on CPU."""
    with warnings.catch_warnings(record=True) as caught, sync_debug(device, "warn"):
        warnings.simplefilter("always")
        function()
    return sum("synchronizing" in str(warning.message) for warning in caught)
