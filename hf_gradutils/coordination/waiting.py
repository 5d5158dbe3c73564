"""Wait for other ranks: in Python, until a verdict stands or a rank that owes a part of it has ended.

Nothing waits inside the store. That would block every other call on the same client (torch 2.13) and defer Ctrl-C to
its end.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.heartbeat import Pulse
from hf_gradutils.coordination.process import has_ended

logger = logging.getLogger("hf_gradutils.channel")  # where the documentation says that waits are logged

T = TypeVar("T")

OK = "ok"
"""The verdict that all went well; any other is a result or the text of an error."""

POLL_S = 0.25
"""Longest pause between two polls by default: 1,000 ranks then ask a store for 7 % of what it can answer."""

DEATH_GRACE_S = 1.0
"""A dying process closes its connections a moment before it counts as ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitOptions:
    """Pace and limit of a wait."""

    poll_s: float = POLL_S
    """Longest pause between attempts; the first ones follow faster."""

    log_every_s: float = 60.0
    """Seconds between warnings that say what is waited for."""

    timeout_s: float | None = None
    """Seconds after which TimeoutError is raised; None waits for ever."""

    deadline: float | None = None
    """``time.monotonic()`` at which that is; None: ``timeout_s`` after the begin of a wait."""

    def started(self) -> "WaitOptions":
        """The same for several waits that share one limit, which begins now."""
        return self if self.timeout_s is None else replace(self, deadline=time.monotonic() + self.timeout_s)


class Duty(NamedTuple):
    """A key that a rank has to write before there can be a good verdict."""

    global_rank: int
    key: str
    task: str
    """Completes "the rank has ended before it …"."""

    pulse: Pulse | None = None
    """Its heartbeat, where it keeps one until it has written the key."""


def poll(attempt: Callable[[], T | None], describe: Callable[[], str], options: WaitOptions) -> T:
    """Call ``attempt``, which must not block, until it returns something; a signal ends the wait at once.

    ``describe`` says what is waited for. Raises TimeoutError at ``options.deadline``, else after ``options.timeout_s``.
    """
    start = time.monotonic()
    deadline = options.started().deadline if options.deadline is None else options.deadline
    next_log_s, pause_s = options.log_every_s, min(0.01, options.poll_s)
    while (found := attempt()) is None:
        now = time.monotonic()
        waited_s = now - start
        if deadline is not None and now >= deadline:
            raise TimeoutError(f"{describe()}; gave up after {options.timeout_s or waited_s:g} s")
        if waited_s >= next_log_s:
            logger.warning("%s", describe())
            next_log_s += options.log_every_s
        time.sleep(pause_s if deadline is None else min(pause_s, max(0.0, deadline - now)))
        pause_s = min(2 * pause_s, options.poll_s)
    return found


def await_verdict(
    channel: Channel,
    key: str,
    duties: Callable[[], Sequence[Duty]],
    describe: Callable[[], str],
    options: WaitOptions,
    *,
    contribute: Callable[[], str | None] = lambda: None,
) -> str:
    """Poll ``key`` until it holds a verdict; claim one if a rank has ended that has not done its duty.

    Args:
        channel: Holds the keys.
        key: The verdict's. It is claimed, so that one verdict stands for all ranks.
        duties: The ranks to watch, asked for at every poll; must not use the channel.
        describe: What is waited for.
        options: Pace and limit of the wait.
        contribute: This rank's own part, done at every poll; returns the verdict where that can be concluded.

    Raises:
        LauncherError: other nodes have begun another attempt.
        RuntimeError: the store is lost, and no rank with a duty can be seen to have ended.
        TimeoutError: ``options.timeout_s`` has passed.
    """

    def attempt() -> str | None:
        verdict = channel.read(key) or contribute()
        if verdict is not None:
            return verdict
        for duty in duties():
            is_open = duty.key == key or channel.read(duty.key) is None
            # Read again behind its end: it may have written meanwhile.
            if is_open and _has_ended(channel, duty) and channel.read(duty.key) is None:
                return channel.claim(key, _describe_death(channel, duty))
        return None

    try:
        return poll(attempt, describe, options)
    except RuntimeError:
        for duty in duties():  # one of them may have hosted the store: then its death is what ended both
            process = channel.cached_process_of(duty.global_rank)
            if process is not None and has_ended(process, grace_s=DEATH_GRACE_S):
                return _describe_death(channel, duty)
        raise


def _has_ended(channel: Channel, duty: Duty) -> bool:
    return channel.has_left(duty.global_rank) or (duty.pulse is not None and duty.pulse.has_stopped())


def _describe_death(channel: Channel, duty: Duty) -> str:
    return f"{channel.describe_rank(duty.global_rank)} has ended (killed, or left early) before it {duty.task}"
