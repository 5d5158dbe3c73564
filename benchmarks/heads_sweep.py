"""Every head of the installed transformers, ours beside the stock Trainer, against one batch in float64.

    python -m benchmarks.heads_sweep [--heads Bert,ForCTC] [--seed 1] [--out docs/heads.md] [--json sweep.json]

What is in the JSON file already, and was measured with the same seed, is not measured again. Losses of detectors need
scipy, which nothing else here does: ``pip install scipy``.

Each head is built tiny and trained for one optimizer step of 4 micro-batches of 4 rows with ragged targets. The truth
is the gradient of the head's own loss for all 16 rows at once. Nothing is random and batch normalisation is in
evaluation mode. Each head has its own process, so that none disturbs another.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.heads_report import Measured, Outcome, broken_promises, report
from benchmarks.tiny_batches import MakeRow, NoBatchError, NoLossError, collate, find_rows
from benchmarks.tiny_models import NUM_CLASSES, TooLargeError, build, head_classes, tiny_config
from hf_gradutils import GradUtilsTrainer
from hf_gradutils.errors import LossUnitError, TargetCountError
from tests.harness.gradients import relative_error
from tests.harness.trainer_cases import GradientTap, reset_accelerate

ACCUMULATION, ROWS_PER_MICRO_BATCH = 4, 4
WRONG = 1e-5
TRAINERS: dict[str, type[Trainer]] = {"ours": GradUtilsTrainer, "stock": Trainer}
LIMIT_S = 60
MEMORY = 16 << 30
Gradients = dict[str, Tensor]


_REASONS = {NoLossError: "no loss", MemoryError: "memory"}

# ---- One head ----


def measure(head_class: type[PreTrainedModel], seed: int) -> Measured:
    """Build a head, make data for it, and train it with each Trainer."""
    measured = Measured(head_class.__name__)
    stage = "config"
    try:
        config = _config_of(head_class)
        stage = "model"
        model = build(head_class, config)
        stage = "inputs"
        make_row, measured.inputs = find_rows(model)
    except TooLargeError as error:
        measured.not_built, measured.why = "too large", str(error)
        return measured
    except (MemoryError, NoBatchError) as error:
        measured.not_built = _REASONS.get(type(error), "inputs")
        measured.why = str(error)
        if measured.why.startswith("ImportError"):
            measured.not_built = "missing package"
        return measured
    except Exception as error:
        measured.not_built, measured.why = stage, f"{type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            measured.not_built = "missing package"
        return measured
    try:
        _measure(measured, model, make_row, seed)
    except Exception as error:  # the head itself cannot be trained on one batch
        measured.not_built, measured.why = "inputs", f"{type(error).__name__}: {error}"
    return measured


def _config_of(head_class: Any) -> Any:
    name = head_class.__name__
    if re.search(r"(Sequence|Token|Image|Video|Audio|Frame)Classification|XVector|Segmentation|Detection", name):
        return tiny_config(head_class.config_class, num_labels=NUM_CLASSES)
    return tiny_config(head_class.config_class)


def _measure(measured: Measured, model: nn.Module, make_row: MakeRow, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [make_row(generator) for _ in range(ACCUMULATION * ROWS_PER_MICRO_BATCH)]
    if is_random(model, rows):
        measured.why = "random in every forward"
    try:
        want = gradient_of_one_batch(model, rows, torch.float64)
    except Exception:
        measured.precision = "float32"
        want = gradient_of_one_batch(model, rows, torch.float32)
    finally:
        model.float()
    if not 0 < squared_norm(want) < math.inf:
        measured.precision = "float32"
        want = gradient_of_one_batch(model, rows, torch.float32)
    if not 0 < squared_norm(want) < math.inf:
        measured.not_built, measured.why = "no gradient", f"its squared norm is {squared_norm(want)}"
        return
    is_noisy = bool(measured.why)
    measured.outcomes = {name: train(trainer, model, rows, want) for name, trainer in TRAINERS.items()}
    ours = measured.outcomes["ours"]
    if ours.status == "wrong" and not is_noisy and measured.precision == "float64":
        # A gradient that float32 cannot resolve, or a matching that it decides otherwise: is float64 exact?
        measured.error_in_float32 = ours.error
        rows = [_cast(row, torch.float64) for row in rows]
        model.double()
        measured.outcomes = {name: train(trainer, model, rows, want) for name, trainer in TRAINERS.items()}
        ours = measured.outcomes["ours"]
    if is_noisy and ours.status != "refused":
        measured.not_built = "random"


def is_random(model: nn.Module, rows: list[Any]) -> bool:
    """Whether two forwards of the same batch differ."""
    losses = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(float(loss_of(model, collate(rows))))
    return abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0])


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    outputs = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss.sum() if loss.dim() else loss


def gradient_of_one_batch(model: nn.Module, rows: list[Any], dtype: torch.dtype) -> Gradients:
    """What the head's own loss gives for all rows at once."""
    model.to(dtype).zero_grad()
    loss_of(model, _cast(collate(rows), dtype)).backward()
    gradients = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def squared_norm(gradients: Gradients) -> float:
    return sum(float(grad.square().sum()) for grad in gradients.values())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(part, dtype) for name, part in value.items()}
    return [_cast(part, dtype) for part in value] if isinstance(value, list) else value


def train(trainer_class: type[Trainer], model: nn.Module, rows: list[Any], want: Gradients) -> Outcome:
    """One optimizer step that changes nothing, for its gradient."""
    reset_accelerate()
    model.zero_grad()
    tap = GradientTap()
    arguments = TrainingArguments(
        output_dir=str(Path(tempfile.gettempdir()) / "hf_gradutils-sweep"),  # nothing is saved there
        use_cpu=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=ROWS_PER_MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=1,
        max_grad_norm=0.0,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    try:
        trainer_class(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[tap]).train()
    except (LossUnitError, TargetCountError) as error:
        return Outcome("refused", why=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("crashed", why=f"{type(error).__name__}: {error}")
    error = relative_error(tap.steps[0], want)
    return Outcome("exact" if error < WRONG else "wrong", error)


# ---- All heads ----


def sweep(heads: dict[str, type[PreTrainedModel]], seed: int, num_processes: int) -> list[Measured]:
    """Every head in a process of its own, that many at a time."""
    context = multiprocessing.get_context("fork")
    with contextlib.redirect_stdout(io.StringIO()):
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
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
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


def read(path: Path, seed: int) -> dict[str, Measured]:
    """What an earlier sweep with the same seed has measured."""
    content = json.loads(path.read_text())
    measured = {one["head"]: Measured(**one) for one in content["heads"] if content["seed"] == seed}
    for one in measured.values():
        one.outcomes = {name: Outcome(**outcome) for name, outcome in one.outcomes.items()}
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", help="comma-separated parts of class names (default: all)")
    parser.add_argument("--seed", type=int, default=None, help="of the data (default: drawn)")
    parser.add_argument("--processes", type=int, default=2, help="heads measured at a time")
    parser.add_argument("--out", type=Path, default=None, help="the Markdown file to write")
    parser.add_argument("--json", type=Path, default=None, help="the file of all that was measured")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    parts = options.heads.split(",") if options.heads else [""]
    heads = {name: head for name, head in head_classes().items() if any(part in name for part in parts)}
    print(f"seed {seed}: {len(heads)} heads", flush=True)

    started = time.monotonic()
    known = read(options.json, seed) if options.json and options.json.exists() else {}
    measured = sweep({name: head for name, head in heads.items() if name not in known}, seed, options.processes)
    results = sorted([*measured, *(known[name] for name in heads if name in known)], key=lambda one: one.head)
    print(f"{time.monotonic() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"seed": seed, "heads": [asdict(one) for one in results]}, indent=1))
    selection = f" --heads {options.heads}" if options.heads else ""
    text = report(results, seed, f"python -m benchmarks.heads_sweep --seed {seed}{selection}")
    if options.out:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(text)
    print(text.partition("## By kind")[0])
    broken = broken_promises(results)
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
