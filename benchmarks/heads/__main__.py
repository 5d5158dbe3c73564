"""Every head of the installed transformers, ours beside the stock Trainer, against one batch in float64.

    python -m benchmarks.heads [--heads Bert,ForCTC] [--seed 1] [--out docs/heads.md]

Each head has its own process, so that none disturbs another. Losses of detectors need scipy, which nothing else here
does: ``pip install scipy``.
"""

import argparse
import contextlib
import io
import logging
import multiprocessing
import random
import resource
import sys
import time
import warnings
from multiprocessing import connection
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks import page
from benchmarks.heads.classes import head_classes
from benchmarks.heads.measure import measure
from benchmarks.heads.render import record, render
from benchmarks.heads.results import Measured
from benchmarks.trainings import silence

LIMIT_S = 60
MEMORY = 16 << 30


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", help="comma-separated parts of class names (default: all)")
    parser.add_argument("--seed", type=int, help="of the data (default: drawn)")
    parser.add_argument("--processes", type=int, default=2, help="heads measured at a time")
    page.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.render:
        page.publish(options.out, page.load(options.out), render)
        return 0
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    parts = options.heads.split(",") if options.heads else [""]
    heads = {name: head for name, head in head_classes().items() if any(part in name for part in parts)}
    print(f"seed {options.seed}: {len(heads)} heads", flush=True)

    started, measured = time.monotonic(), page.provenance("benchmarks.heads", options)
    results = sorted(sweep(heads, options.seed, options.processes), key=lambda one: one.head)
    data = {"measured": measured} | record(results)
    page.publish(options.out, data, render)
    print(render(data).partition("## By kind")[0])
    print("\n".join([f"{time.monotonic() - started:.0f} s, {len(data['broken'])} faults", *data["broken"]]))
    return 1 if data["broken"] else 0


def sweep(heads: dict[str, type[PreTrainedModel]], seed: int, num_processes: int) -> list[Measured]:
    """Every head in a process of its own, that many at a time."""
    context = multiprocessing.get_context("fork")
    with silence():
        measure(transformers.BertForMaskedLM, seed)  # what a first training imports is there in every fork
    waiting, running, done = list(reversed(heads)), {}, []
    while waiting or running:
        while waiting and len(running) < num_processes:
            head = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure_apart, args=(heads[head], seed, sender))
            process.start()
            sender.close()
            running[head] = (process, receiver, time.monotonic())
        connection.wait([receiver for _, receiver, _ in running.values()], timeout=1)
        for head, (process, receiver, started) in list(running.items()):
            is_late = time.monotonic() - started > LIMIT_S
            if not receiver.poll() and not is_late:
                continue
            try:
                measured = receiver.recv() if receiver.poll() else Measured(head, "time", f"more than {LIMIT_S} s")
            except EOFError:
                process.join()
                measured = Measured(head, "memory", f"its process ended with {process.exitcode}")
            process.kill()
            process.join()
            receiver.close()
            del running[head]
            done.append(measured)
            print(_line(measured, len(done), len(heads)), flush=True)
    return done


def _measure_apart(head: type[PreTrainedModel], seed: int, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with silence(), contextlib.redirect_stderr(io.StringIO()):
        measured = measure(head, seed)
    sender.send(measured)


def _line(measured: Measured, number: int, total: int) -> str:
    if measured.not_built:
        return f"{number}/{total} {measured.head}: not built, {measured.not_built}: {measured.why[:160]!r}"
    outcomes = (
        f"{name} {outcome.status}"
        + (f" {outcome.error:.1e}" if outcome.error is not None else f" {outcome.why[:200]!r}")
        for name, outcome in measured.outcomes.items()
    )
    return f"{number}/{total} {measured.head}: {'; '.join(outcomes)}"


if __name__ == "__main__":
    sys.exit(main())
