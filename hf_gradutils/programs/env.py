"""The output of ``hf-gradutils env``: versions, launcher, ranks and nodes."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from hf_gradutils import __version__, _environment
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.nodes import claim_first_rank
from hf_gradutils.coordination.ranks import current_ranks
from hf_gradutils.coordination.store import LEAVE_GRACE_S, leave, open_channel
from hf_gradutils.coordination.waiting import WaitOptions, poll
from hf_gradutils.errors import GradUtilsError, InvalidArgumentError

PACKAGES = (
    "torch",
    "accelerate",
    "transformers",
    "datasets",
    "trl",
    "peft",
    "sentence-transformers",
    "deepspeed",
    "matplotlib",
)


def print_env(timeout_s: float) -> None:
    """Print versions, launcher, ranks and nodes, on rank 0.

    Args:
        timeout_s: How long to wait for the other ranks.

    Raises:
        InvalidArgumentError: ranks are missing, or a setting is invalid.
    """
    ranks = current_ranks()
    wait = WaitOptions(timeout_s=timeout_s).started()
    channel = open_channel(timeout_s=wait.timeout_s) if ranks.world_size > 1 else None
    grace_s = LEAVE_GRACE_S
    try:
        lines = _ranks_of(channel, wait) if channel is not None else ["ranks        1, no launcher"]
        if ranks.global_rank == 0:
            print("\n".join([*_machine(), *_settings(), *lines]))
    except GradUtilsError:
        grace_s = 0.3  # the limit has passed
        raise
    finally:
        if channel is not None:
            leave(grace_s=grace_s)


def _machine() -> list[str]:
    lines = [
        f"python       {platform.python_version()} on {platform.platform()}",
        f"hf-gradutils {__version__}",
    ]
    for package in PACKAGES:
        try:
            lines.append(f"{package:<12} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:<12} not installed")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        lines.append(f"GPUs         {len(names)}: {', '.join(dict.fromkeys(names))}, CUDA {torch.version.cuda}")
    else:
        lines.append(f"GPUs         none that torch can see; {os.cpu_count()} CPUs")
    return lines


def _settings() -> list[str]:
    """Variables that set fields of the plugin, checked."""
    from hf_gradutils.accelerator import GradUtilsPlugin

    GradUtilsPlugin()  # raises if a value is invalid
    values = _environment.read_settings()
    return [f"{_environment.SETTING}{name.upper()}={value}" for name, value in values.items()]


def _ranks_of(channel: Channel, wait: WaitOptions) -> list[str]:
    """One line per rank, from the store."""
    world = channel.ranks.world_size
    env_keys = [keys.RANK_ENV.format(rank=rank) for rank in range(world)]

    def missing() -> list[int]:
        return [rank for rank, key in enumerate(env_keys) if channel.read(key) is None]

    try:
        claim_first_rank(channel)  # before this rank is complete: then all nodes have a first when all ranks are
        channel.write(env_keys[channel.ranks.global_rank], f"{channel.ranks.node} {channel.ranks.local_rank}")
        poll(lambda: None if missing() else True, lambda: f"ranks {missing()} of {world} are missing", wait)
    except TimeoutError as error:
        hint = _environment.describe_world()
        raise InvalidArgumentError(
            f"{error}; start all ranks, or raise --timeout_s" + (f". {hint}" if hint else "")
        ) from None
    except RuntimeError:
        raise InvalidArgumentError(f"lost {channel.origin}, whose host has ended, before all ranks had come") from None
    launched = _environment.read_launched_rank()
    lines = [
        f"launcher     {'none, a process group' if launched is None else launched.launcher}",
        f"store        {channel.origin}",
        f"ranks        {world}",
    ]
    for rank in range(world):
        node, local_rank = (channel.read(env_keys[rank]) or "").rsplit(" ", 1)
        is_first = channel.read(keys.NODE_FIRST_RANK.format(node=node)) == str(rank)
        first = " (first of its node)" if is_first else ""
        lines.append(f"  rank {rank}: {channel.process_of(rank)}, node {node}, local rank {local_rank}{first}")
    return lines
