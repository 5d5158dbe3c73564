"""Ranks that wait for each other on a store: first ranks per node, and barriers.

``route`` is not imported here: it needs accelerate and transformers.
"""

from hf_gradutils.coordination.barrier import barrier_and_log
from hf_gradutils.coordination.first_rank import FirstRankPerNode

__all__ = ["FirstRankPerNode", "barrier_and_log"]
