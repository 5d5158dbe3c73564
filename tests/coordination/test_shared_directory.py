"""scope="auto" looks at the directories that a block fills."""

import os
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from hf_gradutils import FirstRankPerNode
from hf_gradutils._environment import read_cache_directories
from tests.harness.ranks import run_ranks


def in_auto() -> bool:
    with FirstRankPerNode(scope="auto") as is_first:
        return is_first


@pytest.mark.parametrize("shared", ["datasets", "hub", "both", "none"])
def test_auto_looks_where_the_two_packages_write_now(shared, tmp_path):
    """Set at run time, as recipes do for --cache_dir; the variables, read at import, say otherwise."""
    firsts = run_ranks(_packages_write_to, 2, tmp_path, shared, nodes=2, init=False)
    assert firsts == ([True, True] if shared == "none" else [True, False])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _packages_write_to(folder, shared):
    own = folder / os.environ["GROUP_RANK"]
    os.environ["HF_HOME"] = str(folder if shared == "none" else own)
    datasets.config.HF_DATASETS_CACHE = folder / "all" if shared in ("datasets", "both") else own / "datasets"
    huggingface_hub.constants.HF_HUB_CACHE = str(folder / "all" if shared in ("hub", "both") else own / "hub")
    return in_auto()


def test_a_node_that_does_not_share_goes_at_once(tmp_path):
    assert run_ranks(_first_two_share, 3, tmp_path, nodes=3, init=False) == [True, False, True]


def _first_two_share(folder):
    node = os.environ["GROUP_RANK"]
    with FirstRankPerNode(scope="auto", cache_dir=folder / ("2" if node == "2" else "0 and 1")) as is_first:
        return is_first


@pytest.mark.parametrize("order", [("own", "shared", "own"), ("shared", "own", "shared")])
def test_every_list_of_directories_has_a_verdict_of_its_own(order, tmp_path):
    rank_0, rank_1 = run_ranks(_passes, 2, tmp_path, [order, order], nodes=2, init=False)
    assert rank_0 == [True, True, True]
    assert rank_1 == [kind == "own" for kind in order]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


SKIPPED = {
    "by rank 0, its own": (["shared"], ["own", "shared"]),
    "by the other, its own": (["own", "shared"], ["shared"]),
    "by the other, what is shared": (["own", "shared", "own"], ["own", "own"]),
    "by rank 0, all but one": (["own"], ["own", "own", "own"]),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_passages_that_a_node_skips_stop_no_other(case, tmp_path):
    """Another block follows, as a rank that has gone on to a collective cannot be told from one that is late."""
    rank_0, rank_1 = run_ranks(_passes, 2, tmp_path, SKIPPED[case], nodes=2, init=False)
    assert all(rank_0)
    assert len(rank_1) == len(SKIPPED[case][1])


@pytest.mark.parametrize("orders", [(["own", "shared"], ["shared"] * 2), (["shared"] * 2, ["own", "shared"])])
def test_directories_that_change_on_one_node_only_stop_no_other(orders, tmp_path):
    rank_0, rank_1 = run_ranks(_passes, 2, tmp_path, orders, nodes=2, init=False)
    assert rank_0 == [True, True]
    assert len(rank_1) == 2


def _passes(folder, orders):
    node = os.environ["GROUP_RANK"]
    directories = {"own": folder / node, "shared": folder / "all"}
    firsts = []
    for kind in orders[int(node)]:
        with FirstRankPerNode(name="loop", scope="auto", cache_dir=directories[kind], timeout_s=20) as is_first:
            firsts.append(is_first)
    with FirstRankPerNode(scope="auto", cache_dir=folder / "next"):
        pass
    return firsts


def test_a_directory_that_cannot_be_made_leaves_the_other(tmp_path):
    (tmp_path / "file").touch()
    assert run_ranks(_hub_is_below_a_file, 2, tmp_path, nodes=2, init=False) == [True, False]


def _hub_is_below_a_file(folder):
    datasets.config.HF_DATASETS_CACHE = folder
    huggingface_hub.constants.HF_HUB_CACHE = str(folder / "file" / "hub")
    return in_auto()


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"HF_HOME": "/h"}, ["/h/datasets", "/h/hub"]),
        ({"XDG_CACHE_HOME": "/x"}, ["/x/huggingface/datasets", "/x/huggingface/hub"]),
        ({"HF_DATASETS_CACHE": "/d", "HF_HUB_CACHE": "/b", "HF_HOME": "/h"}, ["/d", "/b"]),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, ["~/.cache/huggingface/datasets", "/old"]),
    ],
)
def test_the_variables_count_before_the_packages_are_imported(variables, found, monkeypatch):
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.delitem(sys.modules, module)
    assert read_cache_directories() == [Path(path).expanduser() for path in found]
