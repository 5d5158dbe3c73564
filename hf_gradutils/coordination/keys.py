"""Patterns of all keys that the ranks share; README.md in this folder has the writers, readers and life of each."""

CHANNEL_PREFIX = "hf_gradutils/{run_id}/{channel}"  # PrefixStore adds the slash
ATTEMPT_PREFIX = "{attempt}"
ATTEMPT = "attempt"
STORE_JOB = "hf_gradutils/job"  # before the prefixes: read by ranks of which nothing else may be written there

RANK_PROCESS = "rank/{rank}/process"
RANK_LEFT = "rank/{rank}/left"
RANK_AT = "rank/{rank}/at"
RANK_ENV = "rank/{rank}/env"
RANK_LIFELINE = "rank/{rank}/lifeline"
NUM_RANKS = "num_ranks"

NODE_NUM_RESTARTS = "node/{node}/num_restarts"
NODE_COUNTED_BY = "node/{node}/counted_by"
NUM_NODES = "num_nodes"
NODE_FIRST_RANK = "node/{node}/first_rank"
NUM_FIRST_RANKS = "num_first_ranks"
FIRST_RANK = "first_rank/{index}"

TURN_BEGUN = "block/{name}/{count}/{turn}/begun"
TURN_NUM_BEATS = "block/{name}/{count}/{turn}/num_beats"
TURN_REPORT = "block/{name}/{count}/{turn}/report"
TURN_LATEST = "block/{name}/{turn}/latest"
BLOCK_NUM_NODES_DONE = "block/{name}/{count}/num_nodes_done"
BLOCK_END = "block/{name}/{count}/end"

DIRECTORY_FILE = "directory/{name}/{index}/file"
DIRECTORY_SEEN_BY = "directory/{name}/{index}/seen_by/{rank}"
DIRECTORY_END = "directory/{name}/{index}/end"
DIRECTORY_DECIDED = "directory/{name}/decided/{rank}"

BARRIER_ARRIVED = "barrier/{name}/{count}/arrived/{rank}"
BARRIER_NUM_ARRIVED = "barrier/{name}/{count}/num_arrived"
BARRIER_END = "barrier/{name}/{count}/end"
