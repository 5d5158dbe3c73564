"""The only reader of ``os.environ``: the variables of launchers and of the package, as typed values.

An empty variable counts as unset. Nothing is cached: tests, notebooks and accelerate set variables after import.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_gradutils.errors import LauncherError


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """Names of the variables in which a launcher describes a process."""

    title: str
    global_rank: str
    world_size: str
    local_rank: str
    node_rank: str | None
    """Number of the node; None if the launcher has none (OMPI_COMM_WORLD_NODE_RANK is a local rank)."""
    local_size: str
    """Number of ranks on the node."""


LAUNCHERS = (
    Launcher(
        title="torchrun",  # and accelerate launch, which runs torchrun
        global_rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        node_rank="GROUP_RANK",
        local_size="LOCAL_WORLD_SIZE",
    ),
    Launcher(
        title="SLURM",
        global_rank="SLURM_PROCID",
        # Not SLURM_NTASKS: a batch script that runs on one task only sees it too.
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        node_rank="SLURM_NODEID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
    ),
    Launcher(
        title="Open MPI",
        global_rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        node_rank=None,
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        title="Intel MPI or MPICH",
        global_rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        node_rank=None,
        local_size="MPI_LOCALNRANKS",
    ),
)
"""The supported launchers; the first one whose rank and world size are both set counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchedRank:
    """Place of this process in the job, by one launcher."""

    launcher: str
    global_rank: int
    world_size: int
    local_rank: int | None
    node_rank: int | None
    local_size: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Address of the store of a job's ranks."""

    host: str
    port: int
    is_agent_store: bool
    """True when the launcher's agent hosts it (torchrun); False when global rank 0 is to host it."""


def read_launched_rank() -> LaunchedRank | None:
    """Rank and world size, both from the same launcher; None when no launcher set both.

    ``MASTER_ADDR`` plays no part: ``accelerate launch --cpu`` sets it for a single process.

    Raises:
        LauncherError: only one of RANK and WORLD_SIZE is set (``WORLD_SIZE=1`` alone is fine), a value is not an
            integer, or the rank is not below the world size. Half a pair of another launcher is ignored: SLURM sets
            SLURM_PROCID in batch scripts that are not a step.
    """
    for launcher in LAUNCHERS:
        global_rank, world_size = _integer(launcher.global_rank), _integer(launcher.world_size)
        if global_rank is None or world_size is None:
            continue
        if not 0 <= global_rank < world_size:
            raise LauncherError(
                f"{launcher.global_rank} must be at least 0 and below {launcher.world_size}, "
                f"got {launcher.global_rank}={global_rank} and {launcher.world_size}={world_size}"
            )
        node_rank = None if launcher.node_rank is None else _integer(launcher.node_rank)
        return LaunchedRank(
            launcher=launcher.title,
            global_rank=global_rank,
            world_size=world_size,
            local_rank=_integer(launcher.local_rank),
            node_rank=node_rank,
            local_size=_local_size(launcher.local_size, node_rank),
        )
    rank, world = _integer("RANK"), _integer("WORLD_SIZE")
    if rank is not None or (world is not None and world > 1):
        present, missing = ("RANK", "WORLD_SIZE") if world is None else ("WORLD_SIZE", "RANK")
        raise LauncherError(
            f"{present}={_text(present)} is set but {missing} is not: set both, as torchrun does, or neither "
            "for a single process"
        )
    return None


def describe_world() -> str:
    """The variables that say how many processes there are, for errors about missing ones; "" if none do."""
    launched = read_launched_rank()
    if launched is None or launched.world_size == 1:
        return ""
    (launcher,) = (launcher for launcher in LAUNCHERS if launcher.title == launched.launcher)
    return (
        f"{launcher.global_rank}={launched.global_rank} and {launcher.world_size}={launched.world_size} say that this "
        f"is one of {launched.world_size} processes: if it is the only one, unset both"
    )


def read_job_ids() -> dict[str, str]:
    """Kind → id of the job to which this process belongs, of those kinds that its launcher and batch system tell.

    Ids of one kind are equal on all ranks of a job. A launcher's step is one only where it has numbered the ranks:
    a job may start each of its ranks in a step of its own and number them by hand.
    """
    launched = read_launched_rank()
    launcher = None if launched is None else launched.launcher
    # The components of a heterogeneous job have ids of their own, and the first one's in common.
    in_common = _text("SLURM_HET_JOB_ID") or _text("SLURM_PACK_JOB_ID")
    slurm, slurm_step = in_common or _text("SLURM_JOB_ID") or _text("SLURM_JOBID"), _text("SLURM_STEP_ID")
    index = _text("LSB_JOBINDEX")  # elements of an array have one id
    run_id, is_mpi = _text("TORCHELASTIC_RUN_ID"), launcher in ("Open MPI", "Intel MPI or MPICH")
    ids = {
        "SLURM job": slurm,
        "SLURM step": slurm_step if launcher == "SLURM" and in_common is None else None,
        "PMIx namespace": _text("PMIX_NAMESPACE") if is_mpi else None,
        "Flux job": _text("FLUX_JOB_ID") if is_mpi else None,
        "PBS job": _text("PBS_JOBID"),
        "LSF job": _text("LSB_JOBID"),
        "LSF array index": None if index == "0" else index,
        "torchrun run": None if run_id == "none" else run_id,
    }
    return {kind: value for kind, value in ids.items() if value is not None}


def read_rendezvous() -> Rendezvous | None:
    """MASTER_ADDR and MASTER_PORT; None unless both are set. Raises LauncherError for a port out of range."""
    host, port = _text("MASTER_ADDR"), _integer("MASTER_PORT")
    if host is None or port is None:
        return None
    if not 0 < port < 2**16:
        raise LauncherError(f"MASTER_PORT must be from 1 to 65535, got {port}")
    return Rendezvous(host=host, port=port, is_agent_store=_text("TORCHELASTIC_USE_AGENT_STORE") == str(True))


def read_run_attempt() -> tuple[str, str]:
    """Run id and restart count of torchrun, counted per node; its agent's store outlives a restart of the ranks."""
    return _text("TORCHELASTIC_RUN_ID") or "none", _text("TORCHELASTIC_RESTART_COUNT") or "0"


def read_cache_directories() -> list[Path]:
    """The directories that preparing data fills: the cache of datasets and that of the hub.

    As the two packages have them now where they have been imported, since programs set them after that; else by the
    variables that they read, else in the home directory.
    """
    cache = Path(_text("XDG_CACHE_HOME") or "~/.cache")
    home = Path(_text("HF_HOME") or cache / "huggingface")
    datasets_cache = _text("HF_DATASETS_CACHE") or home / "datasets"
    hub_cache = _text("HF_HUB_CACHE") or _text("HUGGINGFACE_HUB_CACHE") or home / "hub"
    found = (
        getattr(sys.modules.get("datasets.config"), "HF_DATASETS_CACHE", datasets_cache),
        getattr(sys.modules.get("huggingface_hub.constants"), "HF_HUB_CACHE", hub_cache),
    )
    return [Path(os.path.expandvars(path)).expanduser() for path in found]


def read_accumulation_steps() -> int | None:
    """The value of ``accelerate launch --gradient_accumulation_steps``."""
    return _integer("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")


SETTING = "HF_GRADUTILS_"
"""Prefix of variables that set a field of ``GradUtilsPlugin``: HF_GRADUTILS_SYNC."""


def read_settings() -> dict[str, str]:
    """Field of ``GradUtilsPlugin`` → the text in its variable."""
    return {
        name.removeprefix(SETTING).lower(): text
        for name, text in os.environ.items()
        if name.startswith(SETTING) and text
    }


def _local_size(name: str, node_rank: int | None) -> int | None:
    """Ranks of this node: a number, or SLURM's list over the nodes of a step, where ``4(x2),3`` is 4, 4, 3."""
    text = _text(name)
    if text is None or node_rank is None or ("(" not in text and "," not in text):
        return _integer(name)
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    sizes = [int(size) for size, times in parts for _ in range(int(times or 1))]
    return sizes[node_rank] if node_rank < len(sizes) else None


def _text(name: str) -> str | None:
    return os.environ.get(name) or None


def _integer(name: str) -> int | None:
    text = _text(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise LauncherError(f"{name} must be an integer, got {text!r}") from None
