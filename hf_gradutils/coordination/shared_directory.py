"""Whether all nodes see one directory: global rank 0 writes a file into it, and the other nodes look."""

import contextlib
import logging
import uuid
from pathlib import Path

from hf_gradutils.coordination.nodes import is_known_first, known_nodes, may_have_other_nodes
from hf_gradutils.coordination.turn import Block, Patience, describe_loss
from hf_gradutils.errors import FirstRankError

logger = logging.getLogger("hf_gradutils.first_rank")


def is_shared(block: Block, directory: Path, patience: Patience) -> bool:
    """Whether all nodes see the same ``directory``; found out once per block name, then remembered.

    Waits until the first rank of every node is here. The file is there for moments only. A directory that
    global rank 0 cannot write to counts as not shared, which is safe: every node then prepares its own.

    Collectives: none; all ranks come.

    Raises:
        FirstRankError: a rank ended meanwhile, or patience has.
    """
    channel = block.channel
    if not may_have_other_nodes(channel):
        return False
    probe = _Probe(block, directory)
    try:
        if channel.ranks.global_rank == 0:
            verdict = channel.read(f"{probe.key}/verdict") or probe.lead(patience)
        else:
            verdict = patience.wait(probe.follow, lambda: f"{probe.describe()} for rank 0 and the other nodes")
    except RuntimeError as lost:
        raise FirstRankError(describe_loss(block)) from lost
    if verdict not in ("shared", "separate"):
        raise FirstRankError(verdict)
    return verdict == "shared"


class _Probe:
    def __init__(self, block: Block, directory: Path) -> None:
        self.key = f"shared_directory/{block.name}"
        self._channel = block.channel
        self._directory = directory
        self._answers = is_known_first(self._channel)

    def describe(self) -> str:
        rank = self._channel.ranks.global_rank
        return f"rank {rank} finds out whether the nodes share {self._directory} and waits"

    def lead(self, patience: Patience) -> str:
        """Ask the other nodes, as global rank 0."""
        try:
            others = patience.wait(self._all_nodes, lambda: f"{self.describe()} for all nodes")
            verdict = self._ask(others, patience) if others else "separate"
        except BaseException as error:
            with contextlib.suppress(RuntimeError):
                self._channel.claim(f"{self.key}/verdict", f"rank 0 was stopped at it: {error!r}")
            raise
        logger.info("the nodes' %s: %s", self._directory, verdict)
        return self._channel.claim(f"{self.key}/verdict", verdict)

    def follow(self) -> str | None:
        """Answer, as the first rank of another node, and look for the verdict; None while there is none."""
        if self._answers and (name := self._channel.read(f"{self.key}/file")) is not None:
            sees_it = (self._directory / name).exists()
            self._channel.write(f"{self.key}/seen/{self._channel.ranks.global_rank}", str(sees_it))
            self._answers = False
        verdict = self._channel.read(f"{self.key}/verdict")
        if verdict is None and self._channel.has_left(0):
            end = f"rank 0 on {self._channel.process_of(0)} has ended before it knew whether nodes share a directory"
            verdict = self._channel.claim(f"{self.key}/verdict", end)
        return verdict

    def _all_nodes(self) -> list[int] | None:
        nodes, are_all = known_nodes(self._channel)
        return [node.first_rank for node in nodes if node.first_rank != 0] if are_all else None

    def _ask(self, others: list[int], patience: Patience) -> str:
        path = self._directory / f".hf_gradutils-{uuid.uuid4().hex}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            logger.info("%s cannot be written to: %s", self._directory, error)
            return "separate"
        try:
            self._channel.write(f"{self.key}/file", path.name)
            seen = patience.wait(
                lambda: self._answers_of(others), lambda: f"{self.describe()} for the first ranks {others}"
            )
        finally:
            path.unlink(missing_ok=True)
        return "shared" if all(seen) else "separate"

    def _answers_of(self, others: list[int]) -> list[bool] | None:
        answers = {rank: self._channel.read(f"{self.key}/seen/{rank}") for rank in others}
        for rank, answer in answers.items():
            if answer is None and self._channel.has_left(rank):
                raise FirstRankError(
                    f"rank {rank} on {self._channel.process_of(rank)} has ended before it had looked into "
                    f"{self._directory}"
                )
        return None if None in answers.values() else [answer == "True" for answer in answers.values()]
