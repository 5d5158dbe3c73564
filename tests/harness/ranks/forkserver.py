"""The process that ranks are forked from: torch, and what else the session needs, is loaded in it once."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver, resource_tracker

ALWAYS_PRELOADED = (
    "pytest",
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch._dynamo",  # DistributedDataParallel and the optimizers import it: 0.7 s in every rank
    "tests.harness.ranks.server",
    "tests.harness.ranks.asserts",  # before the test modules
)
PRELOADED_IF_IMPORTED = (
    "accelerate",
    "datasets",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "peft",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "sentence_transformers",
    "sentence_transformers.sentence_transformer.losses",
    "trl",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "hf_gradutils",
    "hf_gradutils.accelerator",
    "hf_gradutils.trainer",
)
"""Loaded in the forkserver if the pytest process has them when the first ranks are wanted, as are its test modules."""
LATE = {
    "accelerate": "deepspeed",  # where it is installed, before the first training
    "deepspeed": "deepspeed.runtime.zero.muon.muon_optimizer",  # and with it torch's compiler
}
"""Module → another that it loads when it is used, in seconds."""

preloads = True
"""Whether anything is loaded in the forkserver; a rank whose test module is not there imports it."""

_is_started = False


def start_forkserver() -> None:
    """Start the forkserver, once per session, with the modules that this session needs."""
    global _is_started
    if _is_started:
        return
    multiprocessing.set_forkserver_preload(_preloaded() if preloads else [])
    prior = dict(os.environ)
    # One thread each: a pool of threads would not survive the fork.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # Python 3.11 does not hand sys.path to what it preloads.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(prior)
    _is_started = True


def _preloaded() -> list[str]:
    late = dict(LATE)
    if "DS_ACCELERATOR" not in os.environ:
        del late["accelerate"]  # DeepSpeed would look for a GPU, and ranks could not start CUDA any more
    return [
        *ALWAYS_PRELOADED,
        *(name for name in PRELOADED_IF_IMPORTED if name in sys.modules),
        *(name for trigger, name in late.items() if trigger in sys.modules),
        *(name for name in sys.modules if name.startswith("tests.") and not name.endswith(".conftest")),
    ]


def stop_forkserver() -> None:
    """End the forkserver and multiprocessing's resource tracker, if they run."""
    global _is_started
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()
    _is_started = False


def helper_pids() -> set[int]:
    """The processes that are there to stay until the session ends."""
    pids = (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)
    return {pid for pid in pids if pid is not None}
