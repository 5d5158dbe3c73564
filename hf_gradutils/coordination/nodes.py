"""The nodes of the job and the first rank of each, as the ranks themselves write them down."""

import json
from dataclasses import asdict, dataclass

from hf_gradutils.coordination.channel import Channel


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node whose first rank has come to some block."""

    name: str
    first_rank: int
    local_size: int | None
    """How many ranks it has; None when nothing says."""


def elect_first(channel: Channel) -> int | None:
    """The first rank of this node: the one of local rank 0, or whoever comes first where several say so.

    None while no candidate has come.
    """
    key, ranks = _first_key(channel), channel.ranks
    is_candidate = not ranks.local_rank  # 0, or unknown
    first = channel.claim(key, str(ranks.global_rank)) if is_candidate else channel.read(key)
    if first is None:
        return None
    if int(first) == ranks.global_rank and channel.next_count("node written down") == 0:
        node = Node(name=ranks.node, first_rank=ranks.global_rank, local_size=ranks.local_size)
        channel.write(f"nodes/{channel.add('num_nodes', 1) - 1}", json.dumps(asdict(node)))
    return int(first)


def is_known_first(channel: Channel) -> bool:
    """Whether this rank is known to be the first of its node; False also when the store is lost."""
    try:
        return channel.read(_first_key(channel)) == str(channel.ranks.global_rank)
    except RuntimeError:
        return False


def may_have_other_nodes(channel: Channel) -> bool:
    """False where all ranks are known to be on one node."""
    return channel.ranks.local_size != channel.ranks.world_size


def known_nodes(channel: Channel) -> tuple[list[Node], bool]:
    """The nodes whose first ranks have come so far, and whether these are all nodes there are.

    They are all once their sizes add up to the world, or once all ranks have opened the channel and no node
    lacks its first. Where the launcher does not tell sizes and a rank never comes, nobody can know.

    Raises LauncherError as :meth:`Channel.check_attempt`.
    """
    channel.check_attempt()
    # In this order: what is counted may only have grown when the nodes are read.
    have_all_come = channel.count("num_ranks_introduced") == channel.ranks.world_size
    num_named = channel.count("num_nodes_named")
    records = [channel.read(f"nodes/{index}") for index in range(channel.count("num_nodes"))]
    nodes = [Node(**json.loads(record)) for record in records if record is not None]
    fill_the_world = sum(node.local_size or 0 for node in nodes) == channel.ranks.world_size
    return nodes, fill_the_world or (have_all_come and len(nodes) == num_named)


def _first_key(channel: Channel) -> str:
    return f"first_of/{channel.ranks.node}"
