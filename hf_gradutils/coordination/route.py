"""Route accelerate's and transformers' own ways to let one rank go first to :class:`FirstRankPerNode`.

For the code of others: example scripts that prepare data under ``training_args.main_process_first()``, and trainers of
trl, which tokenize under ``PartialState``'s.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments

from hf_gradutils.coordination.first_rank import FirstRankPerNode


def _node_first(self: Any) -> FirstRankPerNode:
    return FirstRankPerNode()


def _world_first(self: Any) -> FirstRankPerNode:
    return FirstRankPerNode(scope="world")


def _arguments_first(self: Any, local: bool = True, desc: str = "work") -> FirstRankPerNode:
    return FirstRankPerNode(scope="node" if local else "world")


@contextlib.contextmanager
def route_first_rank() -> Iterator[None]:
    """Let calls of accelerate and transformers that let one rank go first use :class:`FirstRankPerNode` inside.

        with route_first_rank():
            trainer = SFTTrainer(…)  # tokenizes under accelerate's PartialState

    ``local_main_process_first`` and ``main_process_first`` of accelerate's ``Accelerator`` and its states, and
    ``TrainingArguments.main_process_first``, of all objects and threads of the process; the prior methods are
    back at the end. Not thread-safe to enter.

    Collectives: none.
    """
    prior: list[tuple[type, str, Any]] = []
    try:
        for owner in (Accelerator, AcceleratorState, PartialState):
            for name, method in (("local_main_process_first", _node_first), ("main_process_first", _world_first)):
                prior.append((owner, name, owner.__dict__[name]))
                setattr(owner, name, method)
        prior.append((TrainingArguments, "main_process_first", TrainingArguments.__dict__["main_process_first"]))
        TrainingArguments.main_process_first = _arguments_first
        yield
    finally:
        for owner, name, method in reversed(prior):
            setattr(owner, name, method)
