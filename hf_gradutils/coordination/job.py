"""The job to which a store belongs that global rank 0 hosts.

Two jobs may have been given one MASTER_ADDR and MASTER_PORT. The ranks of the second would take the places of the first
one's, so the host writes down its job, and who connects compares before it writes anything.
"""

import json
import math
import time
from dataclasses import asdict, replace
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined] # documented there

from hf_gradutils import _environment
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.process import ProcessIdentity, current_process
from hf_gradutils.coordination.ranks import Ranks
from hf_gradutils.coordination.waiting import WaitOptions, poll
from hf_gradutils.errors import LauncherError

HOST_IS_SLOW_S = 5.0
"""Seconds that a rank waits for the host's record: one hosted by ``init_process_group`` may have none yet."""


def claim_store(store: Store, origin: str, ranks: Ranks) -> None:
    """Write down, as the host, whose store this is.

    Raises LauncherError when MASTER_ADDR leads to another job's store after all.
    """
    own = _record(ranks)
    standing = json.loads(store.compare_set(keys.STORE_JOB, "", json.dumps(own)))
    if standing["process"] == own["process"]:
        store.set(keys.STORE_JOB, json.dumps(own))  # this process has left a channel on it, perhaps of another world
    else:
        _compare(own, standing, origin, ranks)


def check_store(store: Store, origin: str, ranks: Ranks, options: WaitOptions) -> None:
    """Compare the job of the store, if its host has written that down, with this process's; writes nothing.

    Only what both sides know is compared: a container may hide some variables.

    Raises LauncherError when the store belongs to another job.
    """

    def read_record() -> dict[str, Any] | None:
        return json.loads(store.get(keys.STORE_JOB)) if store.check([keys.STORE_JOB]) else None

    limit = min(time.monotonic() + HOST_IS_SLOW_S, options.deadline or math.inf)
    try:
        standing = poll(read_record, lambda: "", replace(options, deadline=limit))
    except TimeoutError:
        return
    _compare(_record(ranks), standing, origin, ranks)


def _record(ranks: Ranks) -> dict[str, Any]:
    ids = _environment.read_job_ids()
    return {"ids": ids, "world_size": ranks.world_size, "process": asdict(current_process())}


def _compare(own: dict[str, Any], standing: dict[str, Any], origin: str, ranks: Ranks) -> None:
    kinds = [kind for kind in own["ids"] if standing["ids"].get(kind, own["ids"][kind]) != own["ids"][kind]]
    if not kinds and own["world_size"] == standing["world_size"]:
        return
    here, there = (
        ", ".join([*(f"{kind} {record['ids'][kind]}" for kind in kinds), f"{record['world_size']} ranks"])
        for record in (own, standing)
    )
    way_in = "; if both are to be one, call torch.distributed.init_process_group before this" if kinds else ""
    raise LauncherError(
        f"{origin} belongs to another job ({there}; {ProcessIdentity(**standing['process'])}), and this is rank "
        f"{ranks.global_rank} of a job with {here}: "
        f"choose another MASTER_PORT for one of them{way_in}"
    )
