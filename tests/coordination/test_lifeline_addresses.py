"""Which addresses a lifeline is published at, and which answers are believed."""

import errno
import json
import socket
import struct
import threading
import time
from dataclasses import asdict, replace

import pytest
from torch.distributed import HashStore

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination import heartbeat, keys, lifeline
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.heartbeat import Pulse
from hf_gradutils.coordination.lifeline import ANYWHERE, Answer, Line, published_addresses
from hf_gradutils.coordination.ranks import Ranks
from hf_gradutils.errors import LauncherError
from tests.harness.first_rank_cases import on_a_host_of_its_own, rank
from tests.harness.ranks import run_ranks


def _channel(store=None, *, global_rank=0, local_rank=0):
    """On node 0, as if there were two."""
    ranks = Ranks(global_rank=global_rank, world_size=4, local_rank=local_rank, node="0", local_size=2)
    return Channel(store or HashStore(), ranks=ranks, origin="here", server=None, num_restarts="0")


def _line_to(addresses, port, network="another"):
    channel = _channel()
    record = {"port": port, "addresses": addresses, "network": network}
    channel.write(keys.RANK_LIFELINE.format(rank=1), json.dumps(record))
    return Line(channel, 1)


@pytest.mark.parametrize(
    ("addresses", "network", "answer"),
    [
        (["127.0.0.2"], "another", Answer.LIVES),  # reached from 127.0.0.1, as another host
        (["127.0.0.1"], "another", Answer.NONE),
        (["::1"], "another", Answer.NONE),
        (["localhost"], "another", Answer.NONE),
        (["no-such-host.invalid"], "another", Answer.NONE),
        ([], "another", Answer.NONE),
        ([], "this one", Answer.LIVES),
        (["192.0.2.1", "127.0.0.2"], "another", Answer.LIVES),
    ],
)
def test_an_address_of_this_host_itself_is_not_believed(addresses, network, answer, monkeypatch):
    monkeypatch.setattr(lifeline, "host_network", lambda: "this one")
    with lifeline._listen() as listener:
        assert _line_to(addresses, listener.getsockname()[1], network).look(wait_s=0.2) is answer


def test_a_refusal_counts_where_there_has_been_an_answer():
    line = _line_to(["127.0.0.2"], 0)
    with lifeline._listen() as listener:
        line._channel.write(
            keys.RANK_LIFELINE.format(rank=1),
            json.dumps({"port": listener.getsockname()[1], "addresses": ["127.0.0.2"], "network": ""}),
        )
        assert line.look(wait_s=0.2) is Answer.LIVES
    until = time.monotonic() + 2.0
    while (answer := line.look(wait_s=0.05)) is Answer.NONE and time.monotonic() < until:
        pass
    assert answer is Answer.HAS_ENDED


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "127.0.1.1", "::1"])
def test_where_the_store_has_an_address_of_this_host_alone_that_of_its_way_out_is_published(host, monkeypatch):
    """A name may lead to this host itself by its own file of names only."""
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", "29500")
    own = lifeline._address_towards
    monkeypatch.setattr(lifeline, "_address_towards", lambda *to: "10.1.2.3" if to[1] == ANYWHERE else own(*to))
    assert published_addresses(is_store_host=True) == ["10.1.2.3"]
    assert published_addresses(is_store_host=False) == ["10.1.2.3"]


@pytest.mark.parametrize("is_store_host", [True, False])
def test_the_host_of_the_store_is_published_by_the_number_that_others_use(is_store_host, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-0.cluster")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("10.9.9.9", 29500))]
    )
    monkeypatch.setattr(lifeline, "_address_towards", lambda *_: "10.1.2.3")
    assert published_addresses(is_store_host=is_store_host) == ["10.1.2.3", "10.9.9.9"][: 1 + is_store_host]


def test_without_an_address_of_the_store_that_of_the_host_name_is_published_unless_it_is_local(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    names = {"10.1.2.3": True, "127.0.1.1": False, "fe80::1": False, "2001:db8::7": True}
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (name, 0)) for name in names]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    lifeline._addresses_of_host_name.cache_clear()
    assert published_addresses(is_store_host=False) == [name for name, is_usable in names.items() if is_usable]
    lifeline._addresses_of_host_name.cache_clear()


def test_a_rank_that_cannot_listen_any_more_is_not_taken_for_ended(monkeypatch):
    """In its second turn it has no file descriptors left; the port of the first has been reached, and is closed."""
    monkeypatch.setattr(lifeline, "published_addresses", lambda **_: ["127.0.0.2"])
    store = HashStore()
    owner, watcher = _channel(store, global_rank=1), _channel(store)
    lifeline.open_lifeline(owner)
    assert Line(watcher, 1).look(wait_s=1.0) is Answer.LIVES
    lifeline.close_lifeline()
    monkeypatch.setattr(lifeline, "_listen", lambda: None)
    lifeline.open_lifeline(owner)
    try:
        line = Line(watcher, 1)
        assert line.look(wait_s=0.2) is Answer.NONE
        assert not line.has_been_reached, "silence alone tells now"
    finally:
        lifeline.close_lifeline()


def test_a_connection_that_is_reset_while_it_is_looked_at_is_dropped(monkeypatch):
    with lifeline._listen() as listener:
        line = _line_to(["127.0.0.2"], listener.getsockname()[1])
        assert line.look(wait_s=1.0) is Answer.LIVES
        connection = listener.accept()[0]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        time.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(lifeline, "_error_of", lambda _: 0)  # as it was a moment before
            line.look()
        (connection,) = line._sockets.values()
        assert lifeline._error_of(connection) != 0, "control: it has been reset"


def test_what_hinders_publishing_leaves_nothing_open(monkeypatch):
    def fail(**_):
        raise LauncherError("MASTER_PORT must be an integer")

    listeners, listen = [], lifeline._listen
    monkeypatch.setattr(lifeline, "published_addresses", fail)
    monkeypatch.setattr(lifeline, "_listen", lambda: listeners.append(listen()) or listeners[-1])
    with pytest.raises(LauncherError):
        lifeline.open_lifeline(_channel())
    assert listeners[0].fileno() == -1, "closed"
    assert lifeline._num_users == 0


def _list_first_rank(channel, rank, *, index=0, port=None):
    """Rank ``rank`` is the first of a node on another machine; ``port``: of its lifeline at 127.0.0.2."""
    process = replace(channel.process, boot_id="of another machine")
    channel.write(keys.RANK_PROCESS.format(rank=rank), json.dumps(asdict(process)))
    channel.write(keys.FIRST_RANK.format(index=index), json.dumps({"first_rank": rank}))
    channel.add(keys.NUM_FIRST_RANKS, 1)
    if port is not None:
        record = {"port": port, "addresses": ["127.0.0.2"], "network": "another"}
        channel.write(keys.RANK_LIFELINE.format(rank=rank), json.dumps(record))


def test_the_beats_go_on_whatever_reaching_others_meets(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "too many open files")

    channel = _channel()
    _list_first_rank(channel, 2, port=9)
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(Line, "look", fail)
    stop = heartbeat.start_heartbeat(channel, "beats")
    time.sleep(0.3)
    stop()
    assert channel.count("beats") > 3


def test_a_rank_that_never_answers_is_tried_three_times_and_one_that_has_answered_once(monkeypatch):
    """The second one's turn begins later. The first one's answers are not believed: they come from this host."""
    tried = []
    look = Line.look
    monkeypatch.setattr(Line, "look", lambda line, **wait: tried.append(line._global_rank) or look(line, **wait))
    channel = _channel()
    others = heartbeat._FirstRanksToReach(channel)
    with lifeline._listen() as listener:
        port = listener.getsockname()[1]
        _list_first_rank(channel, 2, port=port)
        channel.write(keys.RANK_LIFELINE.format(rank=2), json.dumps({"port": port, "addresses": [], "network": ""}))
        _list_first_rank(channel, 3, index=1)
        for num_beats in range(8):
            others.reach_some(threading.Event())
            if num_beats == 5:
                assert tried == [2, 2, 2]
                _list_first_rank(channel, 3, index=1, port=port)
    assert tried == [2, 2, 2, 3]


def _pulse_of(channel, rank, monkeypatch):
    """Of a rank that has beaten once; its lifeline has been reached, and is closed now."""
    monkeypatch.setattr(heartbeat, "LOOK_AFTER_S", 0.05)
    monkeypatch.setattr(heartbeat, "ENDED_AFTER_S", 0.1)
    with lifeline._listen() as closed:
        _list_first_rank(channel, rank, port=closed.getsockname()[1])
    channel.reached[rank] = {"127.0.0.2"}
    pulse = Pulse(channel, rank, "beats")
    channel.add("beats", 1)
    assert not pulse.has_stopped()
    time.sleep(0.2)
    return pulse


def test_the_first_look_at_a_silent_rank_tells_its_end(monkeypatch):
    """A rank that watches a hundred nodes in turn comes back after half a minute only."""
    pulse = _pulse_of(_channel(), 2, monkeypatch)
    begun, error_of = time.monotonic(), lifeline._error_of
    is_on_its_way = lambda: time.monotonic() < begun + 0.05  # noqa: E731
    monkeypatch.setattr(lifeline, "_error_of", lambda c: errno.EINPROGRESS if is_on_its_way() else error_of(c))
    assert pulse.has_stopped()


@pytest.mark.parametrize(("watched", "has_stopped"), [(0, True), (2, False)])
def test_a_rank_asks_for_itself_where_it_cannot_see_the_first_of_its_own_node(watched, has_stopped, monkeypatch):
    """Each rank has a PID namespace of its own. Where the other is another node's, local rank 0 asks."""
    channel = _channel(global_rank=1, local_rank=1)
    channel.write(keys.NODE_FIRST_RANK.format(node="0"), "0")
    assert _pulse_of(channel, watched, monkeypatch).has_stopped() is has_stopped


def test_a_rank_that_beats_is_connected_to_once():
    assert run_ranks(_count_connections, 2, nodes=2, init=False)[1] in (1, 2)  # out of the block, and behind it


def _count_connections():
    on_a_host_of_its_own()
    heartbeat.BEAT_S = 0.1
    lifeline.published_addresses = lambda **_: ["127.0.0.2"]
    connections = []
    lifeline.drop_connections = heartbeat.drop_connections = lambda: connections.extend(_accepted())
    with FirstRankPerNode(poll_s=0.02):
        time.sleep(1.0 * rank())
    return len(connections)


def _accepted():
    try:
        while True:
            with lifeline._listener.accept()[0] as connection:
                yield connection.fileno()
    except BlockingIOError:
        return
