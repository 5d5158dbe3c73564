"""When gradients are communicated while a window of micro-batches accumulates."""

from hf_gradutils.sync._auto import SYNCS, PolicyChoice, Sync, check_sync, free_bytes
from hf_gradutils.sync._context import (
    Communicates,
    SyncContext,
    SyncPolicy,
    communicates,
    discard_deferred,
    find_wrappers,
    reduces_gradients,
    reduces_in_one_dtype,
    shard_again,
)

__all__ = [
    "SYNCS",
    "Communicates",
    "PolicyChoice",
    "Sync",
    "SyncContext",
    "SyncPolicy",
    "check_sync",
    "communicates",
    "discard_deferred",
    "find_wrappers",
    "free_bytes",
    "reduces_gradients",
    "reduces_in_one_dtype",
    "shard_again",
]
