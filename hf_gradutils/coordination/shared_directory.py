"""Find out whether all nodes see one directory: global rank 0 puts a file into it, and the other nodes look for it."""

import contextlib
import logging
import uuid
from pathlib import Path

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.nodes import is_first_rank, read_nodes
from hf_gradutils.coordination.turn import Block
from hf_gradutils.coordination.waiting import Duty, await_verdict, poll
from hf_gradutils.errors import FirstRankError

logger = logging.getLogger("hf_gradutils.first_rank")

SHARED, SEPARATE = "shared", "separate"


def is_shared(block: Block, directory: Path) -> bool:
    """True if all nodes see the same ``directory``; found out once per block name, then remembered.

    Waits until the first rank of every node is here. The file is there for moments only. A directory that
    global rank 0 cannot write to counts as not shared, which is safe: every node then prepares its own.

    Collectives: none; all ranks come.

    Raises as :func:`await_verdict`, and FirstRankError when a rank ended meanwhile.
    """
    channel = block.channel
    if channel.ranks.are_on_one_node:
        return False
    if channel.ranks.global_rank == 0:
        verdict = channel.read(block.key(keys.DIRECTORY_VERDICT)) or _claim_verdict(block, directory)
    else:
        verdict = _answer_and_wait(block, directory)
    if verdict not in (SHARED, SEPARATE):
        raise FirstRankError(verdict)
    return verdict == SHARED


def _claim_verdict(block: Block, directory: Path) -> str:
    """Ask the other nodes, as global rank 0, and claim what follows from their answers."""
    channel, verdict_key = block.channel, block.key(keys.DIRECTORY_VERDICT)

    def other_first_ranks() -> list[int] | None:
        nodes, are_complete = read_nodes(channel)
        return [node.first_rank for node in nodes if node.first_rank != 0] if are_complete else None

    try:
        others = poll(other_first_ranks, lambda: _describe_wait(block, directory, "all nodes"), block.options)
        verdict = _collect_answers(block, directory, others) if others else channel.claim(verdict_key, SEPARATE)
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            channel.claim(verdict_key, f"rank 0 was stopped before it knew whether nodes share a directory: {error!r}")
        raise
    logger.info("the nodes' %s: %s", directory, verdict)
    return verdict


def _collect_answers(block: Block, directory: Path, others: list[int]) -> str:
    channel, verdict_key = block.channel, block.key(keys.DIRECTORY_VERDICT)
    seen_by_keys = [block.key(keys.DIRECTORY_SEEN_BY, rank=rank) for rank in others]
    duties = [Duty(rank, key, f"had looked into {directory}") for rank, key in zip(others, seen_by_keys, strict=True)]

    def claim_if_all_answered() -> str | None:
        answers = [channel.read(key) for key in seen_by_keys]
        return None if None in answers else channel.claim(verdict_key, SEPARATE if "False" in answers else SHARED)

    path = directory / f".hf_gradutils-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        logger.info("%s cannot be written to: %s", directory, error)
        return channel.claim(verdict_key, SEPARATE)
    try:
        channel.write(block.key(keys.DIRECTORY_FILE), path.name)
        return await_verdict(
            channel,
            verdict_key,
            lambda: duties,
            lambda: _describe_wait(block, directory, f"the first ranks {others}"),
            block.options,
            contribute=claim_if_all_answered,
        )
    finally:
        path.unlink(missing_ok=True)


def _answer_and_wait(block: Block, directory: Path) -> str:
    """Wait for the verdict of global rank 0, and answer its question as the first rank of another node."""
    channel, verdict_key = block.channel, block.key(keys.DIRECTORY_VERDICT)
    seen_by_key = block.key(keys.DIRECTORY_SEEN_BY, rank=channel.ranks.global_rank)
    must_answer = is_first_rank(channel)

    def write_answer() -> None:
        nonlocal must_answer
        if must_answer and (name := channel.read(block.key(keys.DIRECTORY_FILE))) is not None:
            channel.write(seen_by_key, str((directory / name).exists()))
            must_answer = False

    return await_verdict(
        channel,
        verdict_key,
        lambda: [Duty(0, verdict_key, "knew whether nodes share a directory")],
        lambda: _describe_wait(block, directory, "rank 0 and the other nodes"),
        block.options,
        contribute=write_answer,
    )


def _describe_wait(block: Block, directory: Path, awaited: str) -> str:
    rank = block.channel.ranks.global_rank
    return f"rank {rank} finds out whether the nodes share {directory} and waits for {awaited}"
