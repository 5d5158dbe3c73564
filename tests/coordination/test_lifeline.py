"""A first rank of another node is killed or holds the GIL: the kernel of its host tells which."""

import ctypes
import os
import signal
import socket
import threading
import time

import pytest

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination import heartbeat, keys, lifeline
from hf_gradutils.coordination.process import is_alive
from hf_gradutils.coordination.store import current_channel, open_channel
from hf_gradutils.errors import FirstRankError
from tests.harness.first_rank_cases import on_a_host_of_its_own, rank, wait_for
from tests.harness.ranks import RankFailure, ranks, run_ranks

pytestmark = pytest.mark.slow

OTHER_HOST = "127.0.0.2"
"""Connected from 127.0.0.1: an address that is not the rank's own, as another host's."""


def hold_the_gil(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def on_two_hosts(*, addresses=(OTHER_HOST,), unreachable_s=60.0, silence_s=60.0) -> None:
    """Each node is a host, and seconds pass 20 times as fast."""
    on_a_host_of_its_own()
    heartbeat.BEAT_S, heartbeat.LOOK_AFTER_S, heartbeat.ENDED_AFTER_S = 0.25, 0.5, 0.75
    heartbeat.UNREACHABLE_S, heartbeat.SILENCE_S = unreachable_s, silence_s
    lifeline.published_addresses = lambda **_: list(addresses)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_it_holds_the_gil():
    if os.fork() == 0:
        time.sleep(1.0)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    hold_the_gil(20)


def killed_while_its_workers_live():
    for _ in range(2):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
    killed()


def stopped_and_killed():
    if os.fork() == 0:
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    time.sleep(20)


ENDS = [killed, killed_while_it_holds_the_gil, killed_while_its_workers_live, stopped_and_killed]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_the_end_of_a_rank_alone_on_its_node_is_noticed_soon(end, tmp_path):
    with pytest.raises(RankFailure, match="rank 1 of 2 died"):
        run_ranks(_ends_alone, 2, tmp_path, end, nodes=2, init=False, grace_s=6)
    after_s, error = (tmp_path / "error").read_text().split(" ", 1)
    assert "rank 1 of 2 on host" in error
    assert float(after_s) < 4.0, "control: silence alone takes a minute"


def _ends_alone(folder, end):
    on_two_hosts()
    start = time.monotonic()
    try:
        with FirstRankPerNode():
            if rank() == 1:
                wait_for([folder / "reached"])
                end()
            else:
                _say_when_reached(folder)
    except FirstRankError as error:
        assert is_alive(current_channel().process_of(1)) is None, "control: its end cannot be seen from here"
        (folder / "error").write_text(f"{time.monotonic() - start:.3f} {error}")


def _say_when_reached(folder):
    """In a thread: this rank waits for rank 1 meanwhile."""
    channel = current_channel()
    threading.Thread(target=lambda: (_wait_until_reached(channel), (folder / "reached").touch()), daemon=True).start()


def _wait_until_reached(channel):
    until_s = time.monotonic() + 20.0
    while 1 not in channel.reached and time.monotonic() < until_s:
        time.sleep(0.01)


@pytest.mark.parametrize("starts_at_once", [True, False])
def test_a_rank_that_holds_the_gil_is_not_given_up_however_long(starts_at_once):
    """Longer than all limits: the rank has been reached before, or only while it is silent."""
    waited_s, silent_s = run_ranks(_holds_the_gil, 2, starts_at_once, nodes=2, init=False)
    assert waited_s > 1.5
    assert silent_s > 1.5, "control: longer than silence alone is allowed"


def _holds_the_gil(starts_at_once):
    on_two_hosts(unreachable_s=1.2, silence_s=1.2)
    open_channel()
    start = time.monotonic()
    with FirstRankPerNode() as is_first:
        assert is_first
        begun = time.monotonic()
        if rank() == 1:
            time.sleep(0 if starts_at_once else 0.4)
            hold_the_gil(2.0)
            return time.monotonic() - begun
        time.sleep(0.6 if starts_at_once else 0.0)
    return time.monotonic() - start


def test_an_end_before_the_other_node_waits_for_it_is_noticed_soon(tmp_path):
    """The other first rank is in the block itself then: its heartbeat has reached the one that ends."""
    with pytest.raises(RankFailure, match="rank 1 of 2 died"):
        run_ranks(_ends_while_both_prepare, 2, tmp_path, nodes=2, init=False, grace_s=8)
    assert float((tmp_path / "silent_s").read_text()) < 4.0, "control: a refusal alone is not believed for a minute"


def _ends_while_both_prepare(folder):
    on_two_hosts()
    _write_seconds_until_the_error(folder, lambda: (time.sleep(0.7), killed()), lambda: time.sleep(2.0))


def test_the_end_of_a_whole_node_is_noticed_soon(tmp_path):
    """All its ranks are killed at once, as a batch system does it: no rank is left there that could see it."""
    with pytest.raises(RankFailure, match=r"rank [23] of 4 died"):
        run_ranks(_node_ends, 4, tmp_path, nodes=2, init=False, grace_s=6)
    errors = [(tmp_path / str(other)).read_text() for other in (0, 1)]
    assert all("rank 2 of 4 on host" in error for error in errors)


def _node_ends(folder):
    on_two_hosts()
    (folder / f"pid-{rank()}").write_text(str(os.getpid()))
    try:
        with FirstRankPerNode():
            if rank() == 2:
                wait_for([folder / "pid-3"])
                time.sleep(0.7)
                for other in (3, 2):
                    os.kill(int((folder / f"pid-{other}").read_text()), signal.SIGKILL)
    except FirstRankError as error:
        (folder / str(rank())).write_text(str(error))


def test_a_host_that_does_not_answer_any_more_is_given_up_sooner_than_one_that_never_did(tmp_path):
    with pytest.raises(RankFailure, match="rank 1 of 2 died"):
        run_ranks(_host_is_gone, 2, tmp_path, nodes=2, init=False, grace_s=8)
    assert 1.5 < float((tmp_path / "silent_s").read_text()) < 5.0


def _host_is_gone(folder):
    on_two_hosts(unreachable_s=1.5)
    _write_seconds_until_the_error(folder, lambda: (time.sleep(0.6), _move_to("192.0.2.1"), killed()))


def _move_to(address):
    """Let the others look for this rank somewhere else than where they have reached it."""
    key = keys.RANK_LIFELINE.format(rank=rank())
    current_channel().write(key, current_channel().read(key).replace(OTHER_HOST, address))


def _write_seconds_until_the_error(folder, end, meanwhile=lambda: None):
    start = time.monotonic()
    try:
        with FirstRankPerNode():
            (meanwhile, end)[rank()]()
    except FirstRankError:
        (folder / "silent_s").write_text(str(time.monotonic() - start))


@ranks(4, nodes=2, init=False)
def test_no_rank_behind_it_gives_up_a_rank_that_holds_the_gil(tmp_path):
    """All ranks of the other node wait for rank 0, whose node's other rank sees its process."""
    on_two_hosts(unreachable_s=1.2, silence_s=1.2)
    with FirstRankPerNode(scope="world"):
        if rank() == 0:
            hold_the_gil(2.2)
            (tmp_path / "prepared").touch()
        assert (tmp_path / "prepared").exists()


@pytest.mark.parametrize("addresses", [(), ("192.0.2.1",)], ids=["none", "no answer"])
def test_an_address_that_says_nothing_leaves_the_long_silence(addresses, tmp_path):
    """None is published; it is one that nothing answers at (RFC 5737)."""
    with pytest.raises(RankFailure, match="rank 1 of 2 died"):
        run_ranks(_silent_at, 2, tmp_path, addresses, nodes=2, init=False, grace_s=8)
    silent_s = float((tmp_path / "silent_s").read_text())
    assert 1.5 < silent_s < 4.0


def _silent_at(folder, addresses):
    on_two_hosts(addresses=addresses, silence_s=1.5)
    _write_seconds_until_the_error(folder, killed)


def test_a_refusal_where_the_rank_never_answered_is_not_believed():
    """A firewall refuses, as does another machine with that address: here, a port at which nothing listens."""
    run_ranks(_is_refused, 2, nodes=2, init=False)


def _is_refused():
    on_two_hosts(silence_s=20.0)
    with FirstRankPerNode():
        if rank() == 1:
            channel, key = current_channel(), keys.RANK_LIFELINE.format(rank=1)
            with socket.socket() as closed:
                closed.bind((OTHER_HOST, 0))
                port = closed.getsockname()[1]
            channel.write(key, f'{{"port": {port}, "addresses": ["{OTHER_HOST}"], "network": "there"}}')
            hold_the_gil(1.4)  # longer than a refusal needs
