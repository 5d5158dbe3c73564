"""Programs of users, which know nothing of hf_gradutils, and how tests run them."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

COMMON = """
import os, sys
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

ROWS = [{"input_ids": ids, "labels": ids[0] % 3} for ids in torch.randint(5, 64, (16, 8), generator=torch.Generator())]

def arguments(accumulation, **more):
    batch = 16 // accumulation // int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments("out", gradient_accumulation_steps=accumulation, per_device_train_batch_size=batch,
        train_sampling_strategy="sequential", report_to=[], use_cpu=True, max_steps=1, logging_steps=1,
        disable_tqdm=True, save_strategy="no", max_grad_norm=0.0, **more)

def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **sizes))

def norm(trainer):
    return f"norm {trainer.state.log_history[0]['grad_norm']:.6f} of {type(trainer).__name__}"
"""

TRAIN = """
from common import *
from transformers.trainer import Trainer as Stock

class Mine(Stock):  # a user's own, made before anything is hooked by name
    pass

def main():
    print("loading data")  # before the answer
    trainer = Mine(model(), arguments(int(sys.argv[1])), train_dataset=ROWS)
    try:
        trainer.train()
    finally:
        print("after", end=" ")
    print(norm(trainer))

if __name__ == "__main__":
    main()
"""
"""Its gradient is too long by the accumulation: the head of BERT ignores num_items_in_batch."""


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    code: int
    out: str
    err: str

    @property
    def norm(self) -> float:
        return float(re.search(r"norm ([\d.]+)", self.out)[1])


def write(folder: Path, **files: str) -> None:
    """Write the common module, and a file for each keyword."""
    (folder / "common.py").write_text(COMMON)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def run(folder: Path, *words: str, env: dict[str, str] | None = None, timeout_s: float = 240) -> Ended:
    """Run ``python -m hf_gradutils`` in a folder."""
    return run_python(folder, "-m", "hf_gradutils", *words, env=env, timeout_s=timeout_s)


def run_python(folder: Path, *words: str, env: dict[str, str] | None = None, timeout_s: float = 240) -> Ended:
    """Run Python in a folder."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)} | (env or {})
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def launch(*words: str) -> tuple[str, ...]:
    """The words that start two ranks."""
    options = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    return (*options, "--dynamo_backend", "no", "--main_process_port", "0", *words)


LOOP = """
import torch
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
layer(torch.ones(2)).sum().backward()
optimizer.step()
print("stepped")
"""


def answer(ended: Ended) -> str:
    """The first line of the report, which is printed last."""
    lines = ended.out.splitlines()
    return next(line for line in lines if line.startswith(("EXACT", "WRONG", "NOT COMPARED")))
