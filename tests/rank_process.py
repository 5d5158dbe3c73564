"""What runs in a rank's process; see ranks.py."""

import faulthandler
import os
import pickle
import random
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch._dynamo",
    "accelerate",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "hf_gradutils.trainer",
    "pytest",
]
"""Loaded once, in the server that ranks are forked from."""


@dataclass
class Task:
    """What a rank is to do."""

    module: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    environment: dict[str, str | None]
    init: bool
    mesh_dims: dict[str, int]
    log: str


def main(pickled: bytes, results: Connection) -> None:
    """Run the task and send ``(kind, payload)``."""
    os.setsid()  # what this rank starts can be ended with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    task: Task = pickle.loads(pickled)
    log = os.open(task.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    stack = open(os.path.splitext(task.log)[0] + ".stack", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    for name, value in task.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    import pytest

    try:
        outcome = ("returned", pickle.dumps(_call(task)))
    except pytest.skip.Exception as skip:
        outcome = ("skipped", str(skip))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    results.send_bytes(pickle.dumps(outcome))
    _leave()


def _call(task: Task) -> Any:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    from ranks import rank_function

    function = rank_function(task.module, task.name)
    kwargs = dict(task.kwargs)
    if task.init:
        dist.init_process_group("gloo")
    if task.mesh_dims:
        from torch.distributed.device_mesh import init_device_mesh

        sizes, names = tuple(task.mesh_dims.values()), tuple(task.mesh_dims)
        kwargs["mesh"] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return function(*task.args, **kwargs)


def _leave() -> None:
    """End in order, so that C++ threads of a group do not outlive the interpreter."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
