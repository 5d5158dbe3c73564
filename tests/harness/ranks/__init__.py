"""`@ranks(4)`: a plain test function, run by four real gloo processes.

    @ranks(4, dp=2, tp=2)
    def test_each_rank_has_its_place(mesh):
        assert mesh.get_coordinate() == [dist.get_rank() // 2, dist.get_rank() % 2]

The ranks are forked from a forkserver that has torch loaded, so they start in milliseconds. The
store they meet at lives in the pytest process. A rank that raises, hangs or dies fails the test
with that rank's traceback; the others are ended and nothing is left behind.

The forkserver has loaded the collected test modules, and what they import at their top (transformers);
what a test imports inside, every rank pays for. A module's state after its import is therefore the same
in all ranks; nothing that one rank changes reaches another test.
"""

from tests.harness.ranks.decorator import ranks, run_ranks
from tests.harness.ranks.reports import RankFailure

__all__ = ["RankFailure", "ranks", "run_ranks"]
