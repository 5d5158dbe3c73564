"""Behind a block the nodes wait for each other, on the store.

A rank that went on at once would soon wait in a collective for a node that is still preparing, under the
time limit of the process group. Here there is none, and what fails a node is told to all.
"""

from collections.abc import Iterator
from itertools import cycle

from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.nodes import Node, known_nodes, may_have_other_nodes
from hf_gradutils.coordination.turn import OK, Block, Patience, Turn, describe_loss
from hf_gradutils.errors import FirstRankError


class NodeTurn(Turn):
    """The turn of a node's first rank, which the other ranks of the node wait for."""

    def __init__(self, block: Block, node: str, first_rank: int) -> None:
        super().__init__(block, f"node/{node}", first_rank)

    def publish(self, report: str) -> str:
        """As in :class:`Turn`; success is counted too, and only the first rank itself reports that."""
        standing = super().publish(report)
        if report == standing == OK and may_have_other_nodes(self.block.channel):
            self.block.channel.add(f"{self.block.key}/num_nodes_done", 1)
        return standing


def wait_for_nodes(block: Block, patience: Patience) -> None:
    """Return once the first rank of every node has finished the block.

    Where nothing tells how many ranks a node has, only nodes whose first rank has come already are waited for.

    Raises:
        FirstRankError: on some node it failed or ended, or patience has ended.
    """
    if not may_have_other_nodes(block.channel):
        return
    meeting = _Meeting(block)
    try:
        report = patience.wait(meeting.look, meeting.describe)
    except RuntimeError as lost:
        raise FirstRankError(describe_loss(block)) from lost
    if report != OK:
        raise FirstRankError(report)


class _Meeting:
    def __init__(self, block: Block) -> None:
        self._block = block
        self._nodes: list[Node] = []
        self._are_all_known = False
        self._others: Iterator[Turn] = iter(())

    def look(self) -> str | None:
        channel, key = self._block.channel, self._block.key
        end = channel.read(f"{key}/end")
        if end is not None:
            return end
        if not self._are_all_known:
            self._find_nodes()
        # Who has not come yet cannot be waited for if nothing says that there is more to come.
        may_go = self._are_all_known or channel.ranks.local_size is None
        if may_go and channel.count(f"{key}/num_nodes_done") >= len(self._nodes):
            return channel.claim(f"{key}/end", OK) if self._are_all_known else OK
        # A thousand ranks must not each look at a hundred nodes: the first rank of a node looks at one at a time.
        turn = next(self._others, None)
        report = None if turn is None else turn.look()
        return None if report == OK else report

    def _find_nodes(self) -> None:
        channel = self._block.channel
        num_known = len(self._nodes)
        self._nodes, self._are_all_known = known_nodes(channel)
        if len(self._nodes) > num_known and channel.ranks.global_rank in {node.first_rank for node in self._nodes}:
            others = (node for node in self._nodes if node.first_rank != channel.ranks.global_rank)
            self._others = cycle([NodeTurn(self._block, node.name, node.first_rank) for node in others])

    def describe(self) -> str:
        channel = self._block.channel
        lines = [f"rank {channel.ranks.global_rank} has finished {self._block.name}"]
        for node in self._nodes:
            turn = NodeTurn(self._block, node.name, node.first_rank)
            if channel.read(f"{turn.key}/done") is None:
                lines.append(turn.describe_wait())
                break
        else:
            lines.append(_describe_missing(channel, self._nodes))
        return ": ".join(lines)


def _describe_missing(channel: Channel, nodes: list[Node]) -> str:
    num_here = sum(node.local_size or 0 for node in nodes)
    names = ", ".join(node.name for node in nodes)
    return (
        f"waits for more nodes than {names}, which have {num_here} of {channel.ranks.world_size} ranks; their first "
        "ranks have not reached any block"
    )
