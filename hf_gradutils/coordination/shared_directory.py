"""Find out whether nodes share a directory: global rank 0 puts a file into each, and the other nodes look for them."""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from hf_gradutils.coordination import keys
from hf_gradutils.coordination.failure import error_of
from hf_gradutils.coordination.nodes import is_first_rank, read_nodes
from hf_gradutils.coordination.turn import Block, tell_where
from hf_gradutils.coordination.waiting import OK, Duty, await_verdict, poll

logger = logging.getLogger("hf_gradutils.first_rank")

NOT_ASKED = "not asked"
"""Instead of a file's name: rank 0 has come to this passage and knows its directories already."""

FILE_PREFIX = ".hf_gradutils-"


def share_any(block: Block, directories: Sequence[Path]) -> bool:
    """True if this node takes its turn behind global rank 0's: it has seen one of that rank's directories.

    Always True on global rank 0, whose turn any node may wait for, and False on ranks that wait for the first of their
    node, which knows. Rank 0 asks when it comes to the block with directories that it has not been there with; every
    other first rank answers when it is asked, and waits to be asked when its own directories are new. Neither waits for
    one that has decided on that passage already, or is at another block, so nodes may skip passages and need not
    agree. A node that was not asked keeps to what it has last seen.

    The files are there for moments only. A directory that global rank 0 cannot write to counts as not shared.

    Collectives: none; the first ranks of all nodes come.

    Raises as :func:`await_verdict`, and FirstRankError when a rank ended meanwhile.
    """
    channel = block.channel
    rank, seen = channel.ranks.global_rank, channel.seen_directories
    if channel.ranks.are_on_one_node or not (rank == 0 or is_first_rank(channel)):
        return False
    tell_where(block)
    known = (block.name, *map(str, directories))
    try:
        if rank == 0:
            if known not in seen:
                _ask(block, directories)
            seen[known] = True
        elif (file := _next_file(block, directories, must_wait=known not in seen)) != NOT_ASKED:
            seen[known] = seen[block.name,] = any(os.path.exists(directory / file) for directory in directories)
            logger.info("rank %d sees rank 0's files in %s: %s", rank, _names(directories), seen[known])
            key = block.key(keys.DIRECTORY_SEEN_BY, index=channel.num_asked[block.name], rank=rank)
            channel.num_asked[block.name] += 1
            channel.write(key, str(seen[known]))
    finally:
        with contextlib.suppress(RuntimeError):
            channel.write(block.key(keys.DIRECTORY_DECIDED, rank=rank), str(block.passage.count))
    return seen.get(known, seen.get((block.name,), False))


def _ask(block: Block, directories: Sequence[Path]) -> None:
    """As global rank 0: put a file into each directory until the first ranks of all other nodes have looked."""
    channel, index = block.channel, block.channel.num_asked[block.name]
    end_key = block.key(keys.DIRECTORY_END, index=index)

    def other_first_ranks() -> list[int] | None:
        nodes, are_complete = read_nodes(channel)
        return [node.first_rank for node in nodes if node.first_rank != 0] if are_complete else None

    others = poll(other_first_ranks, lambda: _describe_wait(block, directories, "all nodes"), block.options)
    duties = {
        rank: Duty(
            rank, block.key(keys.DIRECTORY_SEEN_BY, index=index, rank=rank), f"had looked into {_names(directories)}"
        )
        for rank in others
    }

    def end_if_all_have_looked() -> str | None:
        for rank, duty in list(duties.items()):
            if _is_past(block, rank) or channel.read(duty.key) is not None:
                del duties[rank]
        return None if duties else channel.claim(end_key, OK)

    file, written = f"{FILE_PREFIX}{uuid.uuid4().hex}", list[Path]()
    try:
        for directory in directories:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / file).touch()
                written.append(directory / file)
            except OSError as error:
                logger.info("%s cannot be written to: %s", directory, error)
        channel.num_asked[block.name] += 1
        channel.write(block.key(keys.DIRECTORY_FILE, index=index), file)
        end = await_verdict(
            channel,
            end_key,
            lambda: list(duties.values()),
            lambda: _describe_wait(block, directories, f"the first ranks {list(duties)}"),
            block.options,
            contribute=end_if_all_have_looked,
        )
    finally:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
    if end != OK:
        raise error_of(end)


def _next_file(block: Block, directories: Sequence[Path], *, must_wait: bool) -> str:
    """The file of the next question of global rank 0, or NOT_ASKED once it is known that none is to be waited for."""
    channel, num_asked = block.channel, block.channel.num_asked
    while channel.read(block.key(keys.DIRECTORY_END, index=num_asked[block.name])) is not None:
        num_asked[block.name] += 1  # it did not wait for this rank
    index = num_asked[block.name]
    file_key = block.key(keys.DIRECTORY_FILE, index=index)

    def end_without_one() -> str | None:
        if must_wait and not _is_past(block, 0):
            return None
        return channel.read(file_key) or NOT_ASKED  # read again: it may have asked and gone on meanwhile

    file = await_verdict(
        channel,
        file_key,
        lambda: [Duty(0, file_key, "asked whether nodes share a directory")],
        lambda: _describe_wait(block, directories, "rank 0"),
        block.options,
        contribute=end_without_one,
    )
    if file != NOT_ASKED and not file.startswith(FILE_PREFIX):
        raise error_of(file)
    return file


def _is_past(block: Block, rank: int) -> bool:
    """True if that rank has decided on this passage, or is at a block that this rank has yet to come to."""
    channel = block.channel
    decided = channel.read(block.key(keys.DIRECTORY_DECIDED, rank=rank))
    if decided is not None and int(decided) >= block.passage.count:
        return True
    at = json.loads(channel.read(keys.RANK_AT.format(rank=rank)) or "null")
    return bool(at and at["name"] != block.name and not channel.passages.have_begun(at["name"], at["count"]))


def _describe_wait(block: Block, directories: Sequence[Path], awaited: str) -> str:
    rank = block.channel.ranks.global_rank
    return f"rank {rank} finds out whether the nodes share {_names(directories)} and waits for {awaited}"


def _names(directories: Sequence[Path]) -> str:
    return " or ".join(map(str, directories))
