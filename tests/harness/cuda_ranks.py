"""Ranks of `harness.ranks` that share the first GPU.

CUDA works in no process whose parent has started it. Ranks are forked, so that neither pytest nor what forks them may
have; a module may do so while it is imported, and `torch.cuda.is_available()` does unless it is told otherwise.
"""

import os

import torch

from tests.harness.ranks import RankFailure, forkserver, run_ranks


def one_gpu() -> dict[str, str]:
    """The environment of a process that is to see one GPU, the first of those that this one sees."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}


def let_ranks_start_cuda() -> None:
    """See to it that ranks can; if need be they import everything for themselves, which takes longer."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    forkserver.stop_forkserver()  # the next one has the variable from its start
    try:
        _start_cuda()
    except RankFailure:
        forkserver.stop_forkserver()
        forkserver.preloads = False
        _start_cuda()


def _start_cuda() -> None:
    run_ranks(torch.cuda.init, 1, init=False, agent=False, env=one_gpu())
