"""Which passages of two ranks through a block belong together: by work, else by count, with errors where neither."""

import contextlib
import gc
import os
import pickle
import time
import weakref

import datasets
import pytest
from datasets.fingerprint import Hasher

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination import turn
from hf_gradutils.errors import FirstRankError
from tests.harness.first_rank_cases import logged_lines, meet, rank, wait_for
from tests.harness.ranks import RankFailure, ranks, run_ranks

VALUES = {
    "each rank's own": ["a0", "b0", "c0", "d0"],
    "the same": ["a", "b", "c", "d"],
    "the same once": ["a", "b1", "c1", "d1"],
    "of another turn": ["b", "a", "d", "c"],
    "of an earlier turn": ["x", "a", "y", "b"],
    "of a later turn": ["c", "d", "x", "y"],
}


@pytest.mark.parametrize("values", [VALUES[name] for name in VALUES], ids=list(VALUES))
def test_whatever_the_values_are_passages_of_one_count_belong_together(values, tmp_path):
    """A block in a loop of steps, which reads something of the rank's own, and one file that is written anew each time.

    There is one pause, where values differ first, and a warning.
    """
    (first, _, _), (second, waited_s, warnings) = run_ranks(_read_in_steps, 2, tmp_path, values, init=False)
    assert first == second == ["whole 0", "whole 1", "whole 2", "whole 3"]
    assert len(warnings) == (values != VALUES["the same"])
    assert waited_s < turn.HOLD_S + 2.0


def _read_in_steps(folder, values):
    turn.HOLD_IN_LOOP_S = 1.0
    meet(folder, 2)
    warnings = logged_lines("hf_gradutils.first_rank")
    seen, waited_s = [], 0.0
    for step, value in enumerate("abcd" if rank() == 0 else values):
        start_s = time.monotonic()
        with FirstRankPerNode() as is_first:
            waited_s += time.monotonic() - start_s
            if is_first:
                (folder / "data").write_text("half")
                time.sleep(0.1)
                (folder / "data").write_text(f"whole {step}")
            seen.append((folder / "data").read_text() if value else "")
        (folder / f"seen-{step}-{rank()}").touch()
        wait_for([folder / f"seen-{step}-{other}" for other in range(2)])
    return seen, waited_s, warnings


def test_a_rank_far_ahead_of_its_first_enters_with_a_warning(tmp_path):
    """Rank 1 finds "a" made, and comes to "b" long before rank 0, of which nothing says that it will come, too."""
    warnings = run_ranks(_ahead, 2, tmp_path, init=False)[1]
    assert len(warnings) == 1
    assert "rank 1 enters" in warnings[0]
    assert "with item='b'" in warnings[0]
    assert "behind rank 0, which was there last with item='a'" in warnings[0]
    assert "name the block" in warnings[0]


def _ahead(folder):
    turn.HOLD_IN_LOOP_S = 0.3
    warnings = logged_lines("hf_gradutils.first_rank")
    meet(folder, 2)
    for item in ("a", "b"):
        if rank() == 1 and item == "a":
            continue
        if rank() == 0 and item == "b":
            wait_for([folder / "entered"])
        with FirstRankPerNode() as is_first:
            if item == "b" and not is_first:
                (folder / "entered").touch()
    return warnings


def test_named_by_the_work_a_rank_ahead_waits(tmp_path):
    assert run_ranks(_ahead_with_names, 2, tmp_path, init=False) == [["a", "b"], ["b"]]


def _ahead_with_names(folder):
    turn.HOLD_IN_LOOP_S = 0.1
    meet(folder, 2)
    entered = []
    for item in ("a", "b"):
        if rank() == 1 and item == "a":
            continue
        if rank() == 0 and item == "b":
            time.sleep(1.0)  # longer than it would wait without names
        with FirstRankPerNode(name=f"make {item}") as is_first:
            assert is_first == (rank() == 0)
            entered.append(item)
            if rank() == 1:
                assert (folder / item).exists()
            (folder / item).touch()
    return entered


@ranks(2, init=False)
def test_a_rank_ahead_waits_for_a_first_that_comes_soon(tmp_path):
    for item in ("a", "b"):
        if rank() == 1 and item == "a":
            continue
        if rank() == 0 and item == "b":
            time.sleep(0.7)
        with FirstRankPerNode() as is_first:
            if is_first:
                time.sleep(0.2)
                (tmp_path / item).touch()
            assert (tmp_path / item).exists()


def test_a_rank_that_has_failed_by_itself_and_tries_again_is_told(tmp_path):
    """The first rank is done and does not come again: waiting for it would take for ever."""
    first, second = run_ranks(_try_again, 2, tmp_path, init=False)
    assert first == ["whole"]
    assert second[0] == "a file server that is slow"
    assert second[1].startswith("rank 1 failed by itself in ")
    assert second[1].endswith("does not within 0.5 s; try again inside of the block, not around it")


def _try_again(folder):
    turn.AGAIN_S = 0.5
    seen, path = [], folder / "data"
    for attempt in range(2):
        try:
            with FirstRankPerNode() as is_first:
                if is_first:
                    path.write_text("whole")
                elif attempt == 0:
                    raise OSError("a file server that is slow")
                seen.append(path.read_text())
            break
        except (OSError, FirstRankError) as error:
            seen.append(str(error))
    return seen


@ranks(2, init=False)
def test_an_error_of_ones_own_that_is_left_alone_does_not_shift_what_follows(tmp_path):
    """Each epoch makes the file anew, and rank 1 comes before rank 0."""
    for epoch in range(3):
        with contextlib.suppress(KeyError), FirstRankPerNode() as is_first:
            if is_first:
                (tmp_path / "data").write_text(f"whole {epoch}")
            assert (tmp_path / "data").read_text() == f"whole {epoch}", rank()
            if rank() == 1 and epoch == 0:
                raise KeyError
        if rank() == 0:
            time.sleep(0.5)


@ranks(3, init=False)
def test_all_try_again_where_the_first_has_failed(tmp_path):
    for attempt in range(3):
        try:
            with FirstRankPerNode() as is_first:
                if is_first:
                    time.sleep(0.1)
                    if attempt < 2:
                        raise OSError("disk full")
                    (tmp_path / "data").touch()
                assert (tmp_path / "data").exists()
            break
        except (OSError, FirstRankError):
            assert not (tmp_path / "data").exists()
    assert attempt == 2


def test_a_rank_that_enters_once_more_than_the_first_is_told(tmp_path):
    with pytest.raises(RankFailure):
        run_ranks(_once_more, 2, tmp_path, init=False, grace_s=4)
    assert "rank 0 of 2 on host" in (tmp_path / "told").read_text()


def _once_more(folder):
    for item in ("a", "b")[: 1 + rank()]:
        try:
            with FirstRankPerNode():
                (folder / item).touch()
        except FirstRankError as error:
            (folder / "told").write_text(str(error))
            raise
    if rank() == 0:
        os._exit(0)


class Mapper:
    def __init__(self):
        self.context = FirstRankPerNode(name="tokens", scope="node")
        self.is_first = None

    def double(self, row):
        return {"x": 2 * row["x"]}


def test_what_holds_an_entered_context_is_hashed_and_pickled_without_what_is_live(tmp_path):
    outcomes = run_ranks(_map_inside, 2, tmp_path, init=False)
    (first, rows), (other, same_rows) = outcomes
    assert first == other, "one fingerprint on all ranks, before, in and behind the block"
    assert rows == same_rows == [2, 4]


def _map_inside(folder):
    mapper, hashes = Mapper(), []
    hashes.append(Hasher.hash(mapper.double))
    data = datasets.Dataset.from_dict({"x": [1, 2]})
    with mapper.context:
        hashes.append(Hasher.hash(mapper.double))
        copy = pickle.loads(pickle.dumps(mapper))
        assert copy.context._entries == {}
        rows = data.map(mapper.double, num_proc=2)["x"]
    hashes.append(Hasher.hash(mapper.double))
    assert len(set(hashes)) == 1
    with copy.context as is_first:
        assert is_first == (rank() == 0)
    return hashes, list(rows)


@ranks(2, init=False)
def test_a_decorated_function_is_hashed_alike_on_all_ranks(tmp_path):
    @FirstRankPerNode()
    def double(row):
        return {"x": 2 * row["x"]}

    before = Hasher.hash(double)
    assert double({"x": 1}) == {"x": 2}
    assert Hasher.hash(double) == before


class Anything:
    """Stands for a model."""


@ranks(2, init=False)
def test_nothing_that_the_caller_deletes_is_kept_alive():
    def plain():
        model, name = Anything(), "a name"
        with FirstRankPerNode():
            assert name
        is_alive = weakref.ref(model)
        del model
        gc.collect()
        return is_alive()

    @FirstRankPerNode()
    def decorated(name):
        """Called where a model is."""

    def calls_it():
        model = Anything()
        decorated("a name")
        is_alive = weakref.ref(model)
        del model
        gc.collect()
        return is_alive()

    def has_its_locals():
        name = "a name"
        mine = locals()
        with FirstRankPerNode():
            assert name
        return mine

    assert plain() is None
    assert calls_it() is None
    assert has_its_locals() == {"name": "a name"}


@pytest.mark.parametrize("kind", ["__class__", "__dict__", "__fspath__", "__len__", "__getattribute__"])
def test_values_that_raise_where_they_are_looked_at_do_no_harm(kind):
    assert run_ranks(_read_a_fragile_value, 2, kind, init=False) == [True, False]


def _read_a_fragile_value(kind):
    def fail(*args):
        raise AssertionError("looked at")

    bases = {"__fspath__": (os.PathLike,), "__len__": (list,)}.get(kind, ())
    member = property(fail) if kind in ("__class__", "__dict__") else fail
    for value in (type("Fragile", bases, {kind: member})(),):
        with FirstRankPerNode() as is_first:
            assert (lambda value=value: True)()  # it is read, and not looked at
    return is_first
