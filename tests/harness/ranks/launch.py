"""What ranks are given: how many there are, their environment, the store they meet at, and warnings that are errors."""

import inspect
import math
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

GRACE_S = 0.5
"""After a first failure the other ranks have this long to report theirs."""

UPSTREAM_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("FSDP2-wrapped module .* returned a view tensor", UserWarning),  # torch 2.13, about layers of transformers
    ("Grad strides do not match bucket view strides", UserWarning),  # DDP, of 1 × 1 convolutions
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),  # torch.compile, of what DDP returns
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # peft 0.21, of transformers 5.23
    ("Slicing a flattened dim from root mesh will be deprecated", UserWarning),  # accelerate 1.15, of HSDP's meshes
    ("`torch.jit.script_method` is deprecated", DeprecationWarning),  # torch 2.13, of its own module that ZeRO imports
    ("`torch.distributed.* is deprecated", FutureWarning),  # torch 2.13, of what ZeRO calls
    ("`broadcast_buffers` is deprecated", FutureWarning),  # torch 2.13, of what sentence-transformers 6.2 passes to DDP
    ("torch.distributed.nn.functional.* is deprecated", FutureWarning),  # the same, of transformers' Ulysses
    (".*Profiler clears events at the end of each cycle", UserWarning),  # torch 2.11
)
"""`(message regex, category)` of warnings that are neither ours nor the test's to avoid; no colon in a message."""

_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "MPI_", "ACCELERATE_", "HF_GRADUTILS_")
_LAUNCHER_NAMES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)


@dataclass(kw_only=True, slots=True)
class Plan:
    """A checked request; see `ranks` for the fields."""

    world_size: int
    nodes: int = 1
    deadline_s: float = 60
    grace_s: float = GRACE_S
    init: bool = True
    agent: bool = True
    env: Mapping[str, str | None] = field(default_factory=dict)
    mesh_dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.nodes < 1 or self.world_size % self.nodes:
            raise ValueError(f"{self.world_size} ranks do not split evenly over {self.nodes} nodes")
        for name, size in self.mesh_dims.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh dims are sizes, got {name}={size!r}")
        product = math.prod(self.mesh_dims.values())
        if self.mesh_dims and product != self.world_size:
            dims = ", ".join(f"{name}={size}" for name, size in self.mesh_dims.items())
            raise ValueError(f"the mesh dims must multiply to the {self.world_size} ranks, got {dims}: {product}")

    def check_mesh(self, function: Callable[..., Any]) -> None:
        if "mesh" in inspect.signature(function).parameters and not (self.mesh_dims and self.init):
            raise ValueError(
                f"{function.__name__} wants a mesh: name its dims, as in @ranks(4, dp=2, tp=2), with init=True"
            )


@contextmanager
def meeting_point(agent: bool) -> Iterator[int]:
    """A port on the loopback interface: our own store listens there, or nothing.

    Without agent the port is bound, but not listened on, until the ranks are gone: no other
    process is given it, while rank 0 may listen there, since both sides set SO_REUSEADDR.
    """
    with socket.socket() as meeting:
        meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meeting.bind(("127.0.0.1", 0))
        port = meeting.getsockname()[1]
        if not agent:
            yield port
            return
        meeting.listen(1024)
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach()
        )
        yield port
        del store


def environment(plan: Plan, global_rank: int, port: int, scratch: str) -> dict[str, str]:
    """What torchrun (or, without agent, a plain launcher) would set, upon our own environment."""
    num_local = plan.world_size // plan.nodes
    env: dict[str, str | None] = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    env |= {
        "RANK": str(global_rank),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_RANK": str(global_rank % num_local),
        "LOCAL_WORLD_SIZE": str(num_local),
        "GROUP_RANK": str(global_rank // num_local),
        "GROUP_WORLD_SIZE": str(plan.nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": scratch,  # ranks end without cleaning up, so we do it for them
        "GLOO_SOCKET_IFNAME": "lo",  # no look-up of the host name, nothing visible outside
    }
    if plan.agent:
        env |= {
            "ROLE_NAME": "default",
            "ROLE_RANK": str(global_rank),
            "ROLE_WORLD_SIZE": str(plan.world_size),
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    env |= plan.env
    return {name: value for name, value in env.items() if value is not None}


def warning_filters() -> list[tuple[Any, ...]]:
    """The filters of the running test (its marks, the command line), then upstream's, then "error"."""
    own: list[tuple[Any, ...]] = []
    for entry in warnings.filters:
        _, message, category, module, lineno = entry
        if message is None and module is None and lineno == 0 and category is Warning:
            own += [] if entry[0] == "error" else [entry]
            break
        own.append(entry)
    else:
        own = []  # not under pytest: only Python's defaults
    upstream = [("ignore", re.compile(message), category, None, 0) for message, category in UPSTREAM_WARNINGS]
    return [*own, *upstream, ("error", None, Warning, None, 0)]
