"""await_verdict on the store of one process: another rank ends between two looks."""

import pytest
from torch.distributed import HashStore

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.nodes import claim_first_rank, wait_for_nodes
from hf_gradutils.coordination.passages import Passage
from hf_gradutils.coordination.ranks import Ranks
from hf_gradutils.coordination.turn import Block, Turn
from hf_gradutils.coordination.waiting import OK, Duty, WaitOptions, await_verdict
from hf_gradutils.errors import FirstRankError

RANKS = Ranks(global_rank=0, world_size=2, local_rank=0, node="0", local_size=2)


@pytest.mark.parametrize("key", ["verdict", "part"])
@pytest.mark.parametrize("last_words", [OK, None])
def test_what_a_rank_writes_at_its_end_counts(key, last_words):
    class EndsUnderTheLook(Channel):
        def has_left(self, global_rank):
            if last_words is not None:
                self.write(key, last_words)
            self.write(keys.RANK_LEFT.format(rank=1), "left")
            return super().has_left(global_rank)

    channel = EndsUnderTheLook(HashStore(), ranks=RANKS, origin="here", server=None, num_restarts="0")
    duties, options = [Duty(1, key, "was done")], WaitOptions(poll_s=0.01, timeout_s=5)
    verdict = await_verdict(
        channel, "verdict", lambda: duties, lambda: "waits", options, contribute=lambda: channel.read("part")
    )
    assert verdict == (last_words or channel.read("verdict"))
    assert last_words or "rank 1 of 2 on a host unknown so far has ended" in verdict


def test_nodes_learn_of_a_failure_that_only_its_own_node_has_written_down():
    """All of that node may be killed before one of its ranks has claimed the end for the others."""
    here, there = (Ranks(global_rank=i, world_size=2, local_rank=0, node=str(i), local_size=1) for i in range(2))
    store = HashStore()
    channel, other = (Channel(store, ranks=r, origin="here", server=None, num_restarts="0") for r in (here, there))
    for each in (channel, other):
        each.write_identity()
        claim_first_rank(each)
    options = WaitOptions(poll_s=0.01, timeout_s=5)
    block = Block(channel=channel, name="a block", options=options, passage=Passage(count=0))
    other.write(Turn(block, 1, "1").report_key, "rank 1 failed")
    with pytest.raises(FirstRankError, match="rank 1 failed"):
        wait_for_nodes(block)
