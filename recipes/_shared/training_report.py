"""The end of a run: a plot, a table and a few samples; or the result of a check."""

import sys
import textwrap
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from _shared.arguments import LoopArguments
from _shared.models import num_positions
from hf_gradutils import InvarianceReport
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.plots import Run, plot_runs

NUM_SAMPLES = 3
NUM_NEW = 40
TEXT_WIDTH = 96

Sample = tuple[str, str, str]  # the input, the model's answer, the right answer


def sample_outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: datasets.Dataset, task: str
) -> list[Sample]:
    """Run the model on a few held-out rows; every rank must call it if the model is sharded."""
    sample = sample_predictions if task == "sequence-classification" else sample_completions
    return sample(model, tokenizer, held_out)


def sample_completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: datasets.Dataset
) -> list[Sample]:
    """Complete held-out prompts, greedily."""
    samples = []
    for row in evenly_spaced(held_out):
        targets = [token for token in row["labels"] if token >= 0]
        if model.config.is_encoder_decoder:
            prompt, start = row["input_ids"], 1
        else:
            first_target = next(i for i, label in enumerate(row["labels"]) if label >= 0)
            prompt = row["input_ids"][: max(first_target, min(8, len(row["input_ids"]) // 2))]
            targets = row["input_ids"][len(prompt) :]
            start = len(prompt)
        inputs = torch.tensor([prompt], device=model.device)
        model.eval()
        with torch.no_grad():
            output = model.generate(
                inputs=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens(model, start),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = (prompt, output[0, start:], targets)
        samples.append(tuple(tokenizer.decode(text, skip_special_tokens=True) for text in texts))
    return samples


def max_new_tokens(model: PreTrainedModel, num_tokens: int) -> int:
    """Return how many tokens to generate after these: few, and no more than the model has positions for."""
    limit = num_positions(model)
    return NUM_NEW if limit is None else min(NUM_NEW, limit - num_tokens)


def sample_predictions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: datasets.Dataset
) -> list[Sample]:
    """Classify held-out texts."""
    samples, names = [], model.config.id2label
    for row in evenly_spaced(held_out):
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        samples.append((text, names[int(logits.argmax())], names[row["labels"]]))
    return samples


def exit_with_check(report: InvarianceReport, *, is_first: bool) -> NoReturn:
    """Print the report of a check on the first rank; exit with code 1 if it failed."""
    if is_first:
        print(report, flush=True)
    sys.exit(0 if report.passed else 1)


def evenly_spaced(rows: datasets.Dataset) -> list[dict[str, Any]]:
    return [rows[i * len(rows) // NUM_SAMPLES] for i in range(min(NUM_SAMPLES, len(rows)))]


def report_run(
    training: TrainingArguments | LoopArguments,
    log_history: list[dict[str, float]],
    evaluation: dict[str, float],
    train_time_s: float,
    first_step: int,
    samples: list[Sample],
) -> None:
    """Plot the run, print its table and samples, and say where everything is."""
    plot = plot_training(log_history, training.max_grad_norm, Path(training.output_dir))
    print_report(log_history, evaluation, train_time_s, first_step, samples)
    print(f"Saved the model, its tokenizer, trainer_state.json and {plot} in {training.output_dir}", flush=True)


def plot_training(log_history: list[dict[str, float]], max_grad_norm: float, folder: Path) -> str:
    """Draw ``training.png`` as ``hf-gradutils plot`` does; returns its name."""
    run = Run(name=folder.name, log=log_history, max_grad_norm=max_grad_norm or None)
    try:
        return plot_runs([run], folder / "training.png").name
    except InvalidArgumentError as error:  # matplotlib is optional
        return f"(no plot: {error})"


def print_report(
    log_history: list[dict[str, float]],
    evaluation: dict[str, float],
    train_time_s: float,
    first_step: int,
    samples: list[Sample],
) -> None:
    """Print the table; rates cover only the steps after ``first_step``, where a resumed run started."""
    steps = [entry for entry in log_history if "loss" in entry]
    num_targets = sum(entry["num_targets"] for entry in steps)
    num_targets_now = sum(entry["num_targets"] for entry in steps if entry["step"] > first_step)
    rows = []
    if steps:
        rows.append(("first loss", f"{steps[0]['loss']:.4f}   (step {steps[0]['step']})"))
        rows.append(("last loss", f"{steps[-1]['loss']:.4f}   (step {steps[-1]['step']})"))
    rows.append(("evaluation loss", f"{evaluation['eval_loss']:.4f}   (held-out examples)"))
    if "eval_accuracy" in evaluation:
        rows.append(("evaluation accuracy", f"{evaluation['eval_accuracy']:.1%}"))
    if steps:  # a run shorter than logging_steps logs none
        rows.append(("targets trained on", f"{num_targets:,}"))
        rows.append(("targets per second", f"{num_targets_now / train_time_s:,.0f}"))
    rows.append(("wall time", f"{train_time_s:.1f} s   (evaluation included)"))
    print("\nResult")
    for name, value in rows:
        print(f"  {name:<20} {value}")
    print("\nHeld-out samples")
    for given, answer, right in samples:
        for name, text in (("given", given), ("model", answer), ("truth", right)):
            print(f"  {name}  {textwrap.shorten(text, TEXT_WIDTH, placeholder=' …')}")
        print()
