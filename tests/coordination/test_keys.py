"""The keys on the store are those of keys.py, and the page in the package describes each."""

import re
from pathlib import Path

from hf_gradutils import FirstRankPerNode, barrier_and_log, cli
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.store import open_channel
from hf_gradutils.coordination.tcp_store import tcp_store_beneath
from tests.harness.ranks import run_ranks

PAGE = Path(keys.__file__).with_name("README.md").read_text()
PATTERNS = {value for name, value in vars(keys).items() if name.isupper() and not name.endswith("_PREFIX")}


def test_the_page_has_every_key_and_no_other():
    rows = re.findall(r"^\| `(\S+)` \|", PAGE, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == PATTERNS
    assert f"`{keys.CHANNEL_PREFIX}`" in PAGE
    assert f"`{keys.ATTEMPT_PREFIX}`" in PAGE


def test_the_store_gets_every_key_and_no_other(tmp_path):
    """Two nodes with one rank each: their first ranks have heartbeats. Rank 0 hosts, whose store has a job."""
    found = run_ranks(_use_all, 2, tmp_path, nodes=2, init=False, agent=False)
    on_store = {key.removeprefix("hf_gradutils/none/0/").removeprefix("0/") for keys in found for key in keys}
    patterns = {p: re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(p).replace(r"\{rank\}", r"\d+"))) for p in PATTERNS}
    assert {key for key in on_store if not any(p.fullmatch(key) for p in patterns.values())} == set()
    assert {name for name, p in patterns.items() if not any(map(p.fullmatch, on_store))} == set()


def _use_all(folder):
    channel = open_channel()
    with FirstRankPerNode(scope="auto", cache_dir=folder):
        assert folder.exists()
    barrier_and_log("here")
    assert cli.main(["env"]) == 0  # which leaves the channel
    return tcp_store_beneath(channel._attempts).list_keys()
