"""Patterns of all keys that the ranks share; README.md in this folder has the writers, readers and life of each."""

CHANNEL_PREFIX = "hf_gradutils/{run_id}/{channel}"  # PrefixStore adds the slash
ATTEMPT_PREFIX = "{attempt}"
ATTEMPT = "attempt"

RANK_PROCESS = "rank/{rank}/process"
RANK_LEFT = "rank/{rank}/left"
RANK_ENV = "rank/{rank}/env"
NUM_RANKS = "num_ranks"

NODE_NUM_RESTARTS = "node/{node}/num_restarts"
NODE_COUNTED_BY = "node/{node}/counted_by"
NUM_NODES = "num_nodes"
NODE_FIRST_RANK = "node/{node}/first_rank"
NUM_FIRST_RANKS = "num_first_ranks"
FIRST_RANK = "first_rank/{index}"

TURN_BEGUN_AT = "block/{name}/{count}/{turn}/begun_at"
TURN_NUM_BEATS = "block/{name}/{count}/{turn}/num_beats"
TURN_REPORT = "block/{name}/{count}/{turn}/report"
BLOCK_NUM_NODES_DONE = "block/{name}/{count}/num_nodes_done"
BLOCK_END = "block/{name}/{count}/end"

DIRECTORY_FILE = "directory/{name}/file"
DIRECTORY_SEEN_BY = "directory/{name}/seen_by/{rank}"
DIRECTORY_VERDICT = "directory/{name}/verdict"

BARRIER_ARRIVED = "barrier/{name}/{count}/arrived/{rank}"
BARRIER_NUM_ARRIVED = "barrier/{name}/{count}/num_arrived"
BARRIER_END = "barrier/{name}/{count}/end"
