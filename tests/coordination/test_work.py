"""The work of a block, from the byte code of its body: which values count, and that ranks that skip agree."""

import contextlib
import enum
import functools
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_gradutils.coordination.place import Call, find_place


class Block:
    """Stands for FirstRankPerNode: keeps the place that it is entered at."""

    places: list = []  # noqa: RUF012 # emptied by each test

    def __enter__(self):
        self.places.append(find_place(sys._getframe(1)))
        return True

    def __exit__(self, *exc_info):
        return False


@pytest.fixture(autouse=True)
def places():
    Block.places = []
    return Block.places


def use(*args, **kwargs):
    """A body's function."""


def texts():
    return [place.work.text for place in Block.places]


def test_the_values_of_a_turn_count_and_results_do_not():
    results, num_made = {}, 0
    root = Path("/data")
    for i, name in enumerate(["a", "b", "c"]):
        path = root / name
        if name == "b":
            continue
        with Block() as is_first:
            results[name] = use(path, is_first)
            num_made += 1
            data = use(num_made)
        use(data, i)
        with Block():
            use(path)
    assert texts() == ["name='a', path='/data/a'", "path='/data/a'", "name='c', path='/data/c'", "path='/data/c'"]


def test_a_rank_that_skips_has_the_works_of_one_that_does_not():
    def loop(names):
        digests, made = {}, []
        for name in ("a", "b", "c"):
            if name in names:
                with Block() as is_first:
                    made.append(use(name, is_first))
                    last = made[-1]
                    use(last)
                digests[name] = Block.places[-1].work.digest
        return digests

    all_three, two = loop("abc"), loop("bc")
    assert len(set(all_three.values())) == 3
    assert two == {name: all_three[name] for name in "bc"}


class Split(enum.Enum):
    TRAIN = "train"
    TEST = "test"


@dataclass
class Source:
    name: str
    rank: int = 0
    options: dict = field(default_factory=dict)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "items",
    [
        [0, 1],
        [np.int64(0), np.int64(1)],
        [0.1, 0.2],
        [True, False],
        [b"a", b"b"],
        [Path("a"), Path("b")],
        list(Split),
        [Pair(1, 2), Pair(1, 3)],
        [["a"], ["a", "b"]],
        [{"name": "a"}, {"name": "b"}],
        [{"a", "c"}, {"a", "b"}],
        [Source("a"), Source("b")],
        [Source("a", options={"x": 1}), Source("a", options={"x": 2})],
        [datasets.Dataset.from_dict({"x": [1]}), datasets.Dataset.from_dict({"x": [2]})],
        [datasets.DatasetDict(a=datasets.Dataset.from_dict({"x": [i]})) for i in range(2)],
        [functools.partial(use, 1), functools.partial(use, 2)],
        [len, use],
    ],
    ids=lambda items: type(items[0]).__name__,  # the same in each of pytest's processes, as str is not
)
def test_kinds_of_values_tell_turns_apart(items):
    for item in items:
        with Block():
            use(item)
    first, second = (place.work for place in Block.places)
    assert first.digest != second.digest
    for item in items:
        with Block():
            use(item)
    assert [place.work for place in Block.places[2:]] == [first, second], "another time, the same"


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 1), ("local_rank", 1), ("device", "cuda:1"), ("attempt", 2), ("now", 1764300000.123456), ("now", 10**18)],
)
def test_what_differs_between_ranks_is_left_out(name, value):
    code = f"def run(item, {name}):\n    with Block():\n        use(item, {name})\n"
    exec(code, space := {"Block": Block, "use": use})
    space["run"]("a", value)
    assert texts() == ["its item"]


def test_methods_closures_and_own_contexts():
    class Preparer:
        def __init__(self, name):
            self.path, self.rank, self.num_made = Path(name), 3, 0

        def run(self):
            with Block():
                self.make()

        def run_path(self):
            with Block():
                use(self.path / "x")

        def make(self):
            self.num_made += 1

    @contextlib.contextmanager
    def wrapped():
        with Block():
            yield

    for name in "ab":
        Preparer(name).run()
        Preparer(name).run_path()
        with Block():
            use(lambda: name)  # noqa: B023 # called at once, if at all
        with wrapped():
            use(name)
    own, path, closure, wrapping = zip(texts()[:4], texts()[4:], strict=True)
    assert (own, path) == (("its self",) * 2, ("its self.path",) * 2)
    assert closure == wrapping == ("name='a'", "name='b'")
    digests = [place.work.digest for place in Block.places]
    assert len(set(digests)) == 8, "where an own context is entered counts as well"


def test_an_own_context_is_one_place_and_where_it_is_entered_is_the_work():
    @contextlib.contextmanager
    def wrapped():
        with Block():
            yield

    with wrapped():
        use()
    with wrapped():
        use()
    first, second = Block.places
    assert first.name == second.name
    assert first.work.digest != second.work.digest
    assert first.work.text.startswith("what is called in ")


def test_numbers_alone_are_not_certain():
    for number, item in enumerate("a"):
        with Block():
            use(number)
        with Block():
            use(number, item)
    assert [place.work.is_certain for place in Block.places] == [False, True]


def test_locals_of_a_function_that_asks_for_them_are_left_alone():
    def configured(rate):
        config = locals()
        config["rate"] = 2
        with Block():
            use(rate)
        return config

    assert configured(1) == {"rate": 2}
    assert texts() == [""]


def test_secrets_are_neither_told_nor_hashed():
    def load(name, hf_token="hf_secret", PASSWORD="p", **options):  # noqa: N803 # as environment variables are named
        with Block():
            use(name, hf_token, PASSWORD, options)

    load("a", api_key="k1", token="t1")
    load("a", "other", "words", api_key="k2", token="t2")
    load("a", size=1)
    first, second, third = Block.places
    assert first.work == second.work
    assert first.work.digest != third.work.digest
    assert first.work.text == "its name, its options"
    call = Call(load, ("a",), {"token": "hf_secret"})
    assert "hf_secret" not in find_place(sys._getframe(), call=call).work.text


def test_a_large_value_costs_nothing():
    text = "x" * 300_000_000
    start_s = time.monotonic()
    with Block():
        use(text)
    assert time.monotonic() - start_s < 0.1
    assert texts() == ["its text"]


def test_arguments_of_a_decorated_function():
    def prepare(path, *, size=3, rank=0):
        """With a rank of its own."""

    calls = [(("a",), {"rank": 1}), (("a",), {"rank": 2}), (("a",), {"size": 4}), ((), {})]
    places = [find_place(sys._getframe(), call=Call(prepare, args, kwargs)) for args, kwargs in calls]
    works = [place.work for place in places]
    assert places[0].name.startswith(f"{__name__}.test_arguments_of_a_decorated_function.<locals>.prepare, called in ")
    assert works[0] == works[1] != works[2]
    assert works[3].text == "", "the call itself raises what is wrong with it"


def test_nothing_of_the_users_is_called():
    class Fragile:
        def __getattr__(self, name):
            raise AssertionError(name)

        def __repr__(self):
            raise AssertionError

        @property
        def path(self):
            raise AssertionError

    for fragile in [Fragile(), Fragile()]:
        with Block():
            use(fragile, lambda fragile=fragile: fragile.path)
    assert texts() == ["", ""]


def test_a_body_that_reads_nothing_plain_has_no_work():
    tensor = np.zeros(3)
    with Block() as is_first:
        use(tensor, is_first)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Block())
    assert [place.work.digest for place in Block.places] == ["0", "0"]
