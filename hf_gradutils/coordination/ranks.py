"""The place of this process in the job: its ranks and its node.

Ranks come from the process group if there is one, else from one launcher, else there is a world of one.
"""

from dataclasses import dataclass

import torch.distributed as dist

from hf_gradutils import _environment
from hf_gradutils.coordination.process import host_node
from hf_gradutils.errors import LauncherError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process's place among all processes of the job."""

    global_rank: int
    world_size: int
    local_rank: int | None
    """Rank on its node; None when nothing says (a process group made without a launcher)."""

    node: str
    """Equal on the processes of one node, different between nodes. Two torchrun agents are two nodes."""

    local_size: int | None
    """Number of ranks on the node; None when nothing says."""

    @property
    def are_on_one_node(self) -> bool:
        """True where all ranks are known to be on one node."""
        return self.local_size == self.world_size


def current_ranks() -> Ranks:
    """The ranks of this process as they are now.

    The launcher's local rank and node are believed only while the launcher agrees with the process group
    about rank and world size: processes that one task of SLURM spawned all inherit SLURM_LOCALID=0.

    Raises:
        LauncherError: the launcher's variables contradict themselves and there is no process group.
    """
    if not dist.is_initialized():
        launched = _environment.read_launched_rank()
        place = None if launched is None else (launched.global_rank, launched.world_size)
    elif dist.get_backend() == "fake":  # its world exists in one process only
        launched = place = None
    else:
        place = dist.get_rank(), dist.get_world_size()
        launched = _launched_as(*place)
    if place is None:
        return Ranks(global_rank=0, world_size=1, local_rank=0, node=host_node(), local_size=1)
    node = None if launched is None else launched.node_rank
    return Ranks(
        global_rank=place[0],
        world_size=place[1],
        local_rank=None if launched is None else launched.local_rank,
        node=host_node() if node is None else str(node),
        local_size=None if launched is None else launched.local_size,
    )


def _launched_as(global_rank: int, world_size: int) -> _environment.LaunchedRank | None:
    try:
        launched = _environment.read_launched_rank()
    except LauncherError:
        return None  # the process group knows better
    if launched is None or (launched.global_rank, launched.world_size) != (global_rank, world_size):
        return None
    return launched
