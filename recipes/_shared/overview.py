"""The overview before training: rows, targets, a sample with its masked part, and the time to go."""

import os
import time
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import Any

import datasets
import transformers
from tqdm import tqdm
from transformers import TrainerCallback

from _shared.classes import shorten
from _shared.counts import Counts, row_lines

NUM_TIMED_STEPS = 10
NUM_CLASSES_SHOWN = 6
SAMPLE_CHARS = 160
"""Longest part of the sample, masked or not; of a longer one the middle is left out."""


def print_overview(
    train: datasets.Dataset,
    counts: tuple[Counts, Counts],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    task: str = "causal-lm",
    classes: list[str] | None = None,
) -> None:
    """Print on rank 0 what was read and dropped, and the first row as the model gets it."""
    if os.environ.get("RANK", "0") != "0":
        return
    lines = row_lines(*counts)
    if classes:
        lines.append(class_line(train["labels"][:], classes))
    print("\n".join([*lines, sample_line(train[0], tokenizer, task, classes)]), flush=True)


def class_line(labels: list[int], classes: list[str]) -> str:
    """Say how many rows the classes have.

    Example:
        >>> class_line([0, 0, 1], ["spam", "ham"])
        "2 classes: 'spam' 2, 'ham' 1"
    """
    most = [
        f"{shorten([classes[label]])} {num_rows:,}"
        for label, num_rows in Counter(labels).most_common(NUM_CLASSES_SHOWN)
    ]
    more = ", …" if len(classes) > NUM_CLASSES_SHOWN else ""
    return f"{len(classes):,} classes: {', '.join(most)}{more}"


def sample_line(row: dict[str, Any], tokenizer: Any, task: str, classes: list[str] | None) -> str:
    """Show a row; the parts between ░ are read and not trained on."""
    ids, labels = row["input_ids"], row["labels"]
    if classes:
        return f"first row: {shown(tokenizer.decode(ids))} → class {shorten([classes[labels]])}"
    if task == "seq2seq":
        return f"first row, ░ not trained on ░: ░{shown(tokenizer.decode(ids))}░ → {shown(tokenizer.decode(labels))}"
    parts = []
    for is_masked, tokens in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] == -100):
        text = shown(tokenizer.decode([token for token, _ in tokens]))
        parts.append(f"░{text}░" if is_masked else text)
    return f"first row, ░ not trained on ░: {''.join(parts)}"


def shown(text: str) -> str:
    r"""Shorten a text to one line.

    Example:
        >>> shown("two\nlines")
        'two⏎lines'
    """
    text = text.replace("\r", "").replace("\n", "⏎")
    if len(text) <= SAMPLE_CHARS:
        return text
    return f"{text[: SAMPLE_CHARS // 2]} … {text[-SAMPLE_CHARS // 2 :]}"


class Pace:
    """Says how long the run will take, once the first ten optimizer steps are done.

    Args:
        num_steps: Optimizer steps at the end of the run.
        first_step: The step it starts or resumes from.
        write: Prints a line; None where another rank does.
    """

    def __init__(self, num_steps: int, first_step: int = 0, write: Callable[[str], Any] | None = tqdm.write) -> None:
        self.num_steps, self.first_step = num_steps, first_step
        self.write = write or (lambda line: None)
        self.start_s = 0.0
        self.write(
            f"{num_steps - first_step:,} optimizer steps" + (f", from step {first_step:,} on" if first_step else "")
        )

    def after_step(self, step: int) -> None:
        """Call it after each optimizer step; the first one, which warms up, is not timed."""
        if step == self.first_step + 1:
            self.start_s = time.monotonic()
        elif step == self.first_step + NUM_TIMED_STEPS:
            step_s = (time.monotonic() - self.start_s) / (NUM_TIMED_STEPS - 1)
            rest = duration(step_s * (self.num_steps - step))
            self.write(f"after {NUM_TIMED_STEPS} steps: {step_s:.2g} s a step, about {rest} to go")


class PaceCallback(TrainerCallback):
    """The same for a Trainer."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Print the number of steps."""
        self.pace = Pace(state.max_steps, state.global_step, tqdm.write if state.is_world_process_zero else None)

    def on_step_end(self, args, state, control, **kwargs):
        """Print the time to go after ten steps."""
        self.pace.after_step(state.global_step)


def duration(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> duration(42), duration(200), duration(9000)
        ('42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
