"""FirstRankPerNode where ranks enter a place differently often: loops that skip, retries, lists of data sets.

Rank 1 comes late in each case, when rank 0 has made the first item and is in the middle of the second. Pairing ranks by
the number of their passages would let it in there at once.
"""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination import turn
from tests.harness.first_rank_cases import meet, rank, wait_for
from tests.harness.ranks import run_ranks

ITEMS = ("a", "b", "c")
MAKE_S = 0.3


def is_made(path: Path) -> bool:
    """True if the item is complete, as a user would check."""
    return path.with_suffix(".done").exists()


def make(path: Path) -> None:
    path.write_text("half")
    time.sleep(MAKE_S)
    path.write_text("whole")
    path.with_suffix(".done").touch()
    with path.with_suffix(".makers").open("a") as makers:
        makers.write(f"{rank()} ")


def in_a_for_loop(folder):
    for item in ITEMS:
        if not is_made(folder / item):
            with FirstRankPerNode() as is_first:
                if is_first:
                    make(folder / item)
        yield item


def by_continue_and_a_path(folder):
    for number, item in enumerate(ITEMS):
        path = folder / item
        if is_made(path):
            yield item
            continue
        with FirstRankPerNode(name="constant") as is_first:
            print("making", number)
            if is_first:
                make(path)
        yield item


def in_a_while_loop(folder):
    i = 0
    while i < len(ITEMS):
        if not is_made(folder / ITEMS[i]):
            with FirstRankPerNode() as is_first:
                if is_first:
                    make(folder / ITEMS[i])
        yield ITEMS[i]
        i += 1


def prepare(path):
    if is_made(path):
        return path.name
    with FirstRankPerNode() as is_first:
        if is_first:
            make(path)
    return path.name


def in_a_function(folder):
    for item in ITEMS:
        yield prepare(folder / item)


def in_a_function_that_is_mapped(folder):
    yield from map(prepare, [folder / item for item in ITEMS])


def in_a_thread(folder):
    with ThreadPoolExecutor(1) as pool:
        for done in [pool.submit(prepare, folder / item) for item in ITEMS]:
            yield done.result()


@FirstRankPerNode()
def prepare_first(path, *, is_first):
    if is_first:
        make(path)


def in_a_decorated_function(folder):
    for item in ITEMS:
        if not is_made(folder / item):
            prepare_first(folder / item, is_first=rank() == 0)
        yield item


@dataclass
class Source:
    path: Path
    rank: int

    def prepare(self):
        if not is_made(self.path):
            with FirstRankPerNode() as is_first:
                if is_first:
                    self.make()

    def make(self):
        make(self.path)


def in_a_method(folder):
    for source in [Source(folder / item, rank()) for item in ITEMS]:
        source.prepare()
        yield source.path.name


@contextlib.contextmanager
def first_of_all():
    with FirstRankPerNode() as is_first:
        yield is_first


def in_a_context_of_ones_own(folder):
    for item in ITEMS:
        if not is_made(folder / item):
            with first_of_all() as is_first:
                if is_first:
                    make(folder / item)
        yield item


def on_an_exit_stack(folder):
    for item in ITEMS:
        if not is_made(folder / item):
            with contextlib.ExitStack() as stack:
                if stack.enter_context(FirstRankPerNode()):
                    make(folder / item)
        yield item


def load(*args, **kwargs):
    with FirstRankPerNode() as is_first:
        if is_first:
            make(*args, **kwargs)


def by_arguments_that_are_passed_on(folder):
    for item in ITEMS:
        if not is_made(folder / item):
            load(path=folder / item)
        yield item


class Slotted:
    __slots__ = ("path",)

    def __init__(self, path):
        self.path = path

    def prepare(self, split):
        with FirstRankPerNode() as is_first:
            if is_first and split:
                make(self.path)


def of_objects_that_tell_nothing(folder):
    for item in ITEMS:
        source = Slotted(folder / item)
        if not is_made(source.path):
            source.prepare("train")
        yield item


def by_numbers_in_what_is_left_to_do(folder):
    left = [item for item in ITEMS if not is_made(folder / item)]
    for number, item in enumerate(left):
        with FirstRankPerNode() as is_first:
            print(f"{number + 1} of {len(left)}")
            if is_first:
                make(folder / item)
    yield from ITEMS


def with_a_folder_of_each_ranks_own(folder):
    own = f"{folder}/scratch/{rank()}-{time.time_ns()}"
    for item in ITEMS:
        if not is_made(folder / item):
            with FirstRankPerNode() as is_first:
                print(own)
                if is_first:
                    make(folder / item)
        yield item


def in_the_same_place_in_the_same_words(folder):
    items = iter(ITEMS)
    while item := next(items, None):
        if not is_made(folder / item):
            with FirstRankPerNode(name="data") as is_first:
                if is_first:
                    make(folder / item)
        yield item


LOOPS = [
    in_a_for_loop,
    by_continue_and_a_path,
    in_a_while_loop,
    in_a_function,
    in_a_function_that_is_mapped,
    in_a_thread,
    in_a_decorated_function,
    in_a_method,
    in_a_context_of_ones_own,
    on_an_exit_stack,
    by_arguments_that_are_passed_on,
    of_objects_that_tell_nothing,
    by_numbers_in_what_is_left_to_do,
    with_a_folder_of_each_ranks_own,
    in_the_same_place_in_the_same_words,
]


@pytest.mark.parametrize("loop", [loop.__name__ for loop in LOOPS])
@pytest.mark.slow
def test_a_rank_that_skips_what_is_made_never_reads_what_is_not(loop, tmp_path):
    seen = run_ranks(_come_late, 2, tmp_path, loop, init=False)
    assert seen == [["whole"] * 3, ["whole"] * 3]
    assert [path.read_text() for path in sorted(tmp_path.glob("*.makers"))] == ["0 "] * 3
    assert (tmp_path / "late").read_text() == "['a']", "control: rank 1 came when the first was made"


def _come_late(folder, loop):
    turn.HOLD_IN_LOOP_S = turn.HOLD_S = 1.0
    meet(folder, 2)
    if rank() == 1:
        wait_for([folder / "a.done", folder / "b"])
        (folder / "late").write_text(str([item for item in ITEMS if is_made(folder / item)]))
    return [(folder / item).read_text() for item in globals()[loop](folder)]


@pytest.mark.parametrize("scope", ["node", "world"])
def test_a_node_that_skips_what_is_made_neither_reads_what_is_not_nor_stops_the_others(scope, tmp_path):
    """Two nodes: the second finds the first item made, on its own disk, or on the one that both share."""
    seen = run_ranks(_skip_on_a_node, 4, tmp_path, scope, nodes=2, init=False)
    assert seen == [["whole"] * 3] * 4
    makers = [path.read_text() for path in sorted(tmp_path.rglob("*.makers"))]
    assert makers == (["0 "] * 3 if scope == "world" else ["0 ", "0 ", "0 ", "2 ", "2 "])


def _skip_on_a_node(folder, scope):
    disk = folder / (os.environ["GROUP_RANK"] if scope == "node" else "")
    disk.mkdir(exist_ok=True)
    os.chdir(disk)  # a path of the same name on each node
    meet(folder, 4)
    if os.environ["GROUP_RANK"] == "1":
        if scope == "node":
            Path("a").write_text("whole")
            Path("a.done").touch()
        else:
            wait_for([Path("a.done")])
    seen = []
    for item in ITEMS:
        if not is_made(Path(item)):
            with FirstRankPerNode(scope=scope) as is_first:
                if is_first:
                    make(Path(item))
        seen.append(Path(item).read_text())
    return seen
