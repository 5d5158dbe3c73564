"""The nodes of the job: the first rank of each, and how nodes wait for each other behind a block.

A rank that went on at once would soon wait in a collective for a node that is still preparing, under the time limit of
the process group. The wait here has none, and a failing node is reported to every rank.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.failure import error_of
from hf_gradutils.coordination.turn import Block, Turn
from hf_gradutils.coordination.waiting import OK, Duty, await_verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node whose first rank has come to some block."""

    name: str
    first_rank: int
    local_size: int | None
    """Number of its ranks; None when nothing says."""


def claim_first_rank(channel: Channel) -> int | None:
    """The first rank of this node, None until there is one.

    It is the rank with local rank 0, or the first to claim it where several say so or local ranks are unknown.
    """
    ranks = channel.ranks
    key = keys.NODE_FIRST_RANK.format(node=ranks.node)
    is_candidate = not ranks.local_rank  # 0, or unknown
    first = channel.claim(key, str(ranks.global_rank)) if is_candidate else channel.read(key)
    if first is None:
        return None
    if int(first) == ranks.global_rank and channel.next_count("first rank listed") == 0:
        node = Node(name=ranks.node, first_rank=ranks.global_rank, local_size=ranks.local_size)
        index = channel.add(keys.NUM_FIRST_RANKS, 1) - 1
        channel.write(keys.FIRST_RANK.format(index=index), json.dumps(asdict(node)))
    return int(first)


def is_first_rank(channel: Channel) -> bool:
    """True if this rank has become the first of its node; False also when the store is lost."""
    try:
        return channel.read(keys.NODE_FIRST_RANK.format(node=channel.ranks.node)) == str(channel.ranks.global_rank)
    except RuntimeError:
        return False


def read_nodes(channel: Channel) -> tuple[list[Node], bool]:
    """The nodes whose first ranks have come so far, and whether these are all nodes there are.

    They are all once their sizes add up to the world, or once all ranks have opened the channel and no node
    lacks its first. Where the launcher does not tell sizes and a rank never comes, it cannot be known.

    Raises LauncherError as :meth:`Channel.check_attempt`.
    """
    channel.check_attempt()
    # In this order: the counts may only have grown when the nodes are read.
    have_all_come = channel.count(keys.NUM_RANKS) == channel.ranks.world_size
    num_nodes = channel.count(keys.NUM_NODES)
    indices = range(channel.count(keys.NUM_FIRST_RANKS))
    records = [channel.read(keys.FIRST_RANK.format(index=index)) for index in indices]
    nodes = [Node(**json.loads(record)) for record in records if record is not None]
    fill_the_world = sum(node.local_size or 0 for node in nodes) == channel.ranks.world_size
    return nodes, fill_the_world or (have_all_come and len(nodes) == num_nodes)


def wait_for_nodes(block: Block) -> None:
    """Return once the first rank of every node has finished the block, or has come to a later one without it.

    Where nothing tells how many ranks a node has, only nodes whose first rank has come already are waited for.

    Raises as :func:`await_verdict`, and FirstRankError when a node's first rank failed or ended.
    """
    if block.channel.ranks.are_on_one_node:
        return
    nodes = _NodesInBlock(block)
    end = await_verdict(
        block.channel,
        block.key(keys.BLOCK_END),
        nodes.duties,
        nodes.describe_wait,
        block.options.started(),  # the limit of the entry does not count the block itself
        contribute=nodes.claim_end,
    )
    if end != OK:
        raise error_of(end)


class _NodesInBlock:
    """The nodes that a rank waits for behind a block, as far as they have come."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._nodes: list[Node] = []
        self._are_complete = False
        self._others: Iterator[Turn] = iter(())
        self._watched: Turn | None = None
        self._past: set[int] = set()

    def claim_end(self) -> str | None:
        """Claim the end of the block once all nodes have succeeded, or the one that is watched has not; None before."""
        channel = self._block.channel
        if not self._are_complete:
            self._read_nodes()
        if (watched := next(self._others, None)) is not None:
            self._watched = watched
            # Its own ranks claim the end too, but may all be killed before they do.
            report = watched.read_report()
            if report not in (None, OK):
                return channel.claim(self._block.key(keys.BLOCK_END), report)
            if report == OK or self._has_skipped(watched):
                self._past.add(watched.global_rank)
            if self._are_complete and len(self._past) == len(self._nodes) - 1:
                return channel.claim(self._block.key(keys.BLOCK_END), OK)
        # A node that has not come cannot be waited for if nothing says that there is another.
        may_conclude = self._are_complete or channel.ranks.local_size is None
        if not may_conclude or channel.count(self._block.key(keys.BLOCK_NUM_NODES_DONE)) < len(self._nodes):
            return None
        return channel.claim(self._block.key(keys.BLOCK_END), OK) if self._are_complete else OK

    def duties(self) -> list[Duty]:
        """The report of another node. A thousand ranks must not each look at a hundred nodes at every poll."""
        watched = self._watched
        return [] if watched is None or watched.global_rank in self._past else [watched.duty]

    def describe_wait(self) -> str:
        channel = self._block.channel
        done = f"rank {channel.ranks.global_rank} has finished {self._block.name}"
        for turn in map(self._turn_of, self._nodes):
            if turn.global_rank not in self._past and turn.read_report() is None:
                hint = "" if turn.is_running() else "; if its node skips the block, pass waits_for_nodes=False"
                return f"{done}: {turn.describe_wait()}{hint}"
        num_ranks = sum(node.local_size or 0 for node in self._nodes)
        names = ", ".join(node.name for node in self._nodes)
        return (
            f"{done}: waits for more nodes than {names}, which have {num_ranks} of {channel.ranks.world_size} ranks; "
            "their first ranks have not reached any block"
        )

    def _has_skipped(self, turn: Turn) -> bool:
        """True if the first rank of a node is at a passage that this rank has yet to come to."""
        channel, block = self._block.channel, self._block
        if (record := channel.read(keys.RANK_AT.format(rank=turn.global_rank))) is None:
            return False
        if turn.is_running():
            return False
        at = json.loads(record)
        if at["name"] == block.name:
            return bool(at["count"] > block.passage.count or at["holds"])
        return not channel.passages.have_begun(at["name"], at["count"])

    def _read_nodes(self) -> None:
        num_before, rank = len(self._nodes), self._block.channel.ranks.global_rank
        self._nodes, self._are_complete = read_nodes(self._block.channel)
        # Only first ranks watch the first ranks of other nodes, one at a time.
        if len(self._nodes) > num_before and rank in {node.first_rank for node in self._nodes}:
            self._others = cycle([self._turn_of(node) for node in self._nodes if node.first_rank != rank])

    def _turn_of(self, node: Node) -> Turn:
        return Turn(self._block, node.first_rank, node.name)
