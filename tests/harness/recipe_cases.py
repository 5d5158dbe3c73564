"""Recipes as a user launches them, and in the ranks of a test: what was logged, and how the model was spread.

    accelerate launch … tests/harness/recipe_cases.py 1@5 recipes/finetune.py configs/causal_lm.yaml …

runs a recipe and ends rank 1 with SIGKILL where it is about to take its optimizer step 5.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from hf_gradutils import GradUtilsAccelerator, GradUtilsTrainerMixin
from tests.harness import deepspeed_cases
from tests.harness.ranks import run_ranks
from tests.harness.trainer_cases import fsdp_on_cpu

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
KILLING = [str(Path(__file__))]
"""Launched in place of a recipe, with ``<rank>@<step>``, or ``none@0``, and the recipe as its arguments."""

SMALL = ["--hidden_size", "32", "--num_heads", "2", "--num_layers", "2", "--vocab_size", "600", "--max_length", "48"]
SMALL += ["--max_examples", "120", "--max_eval_examples", "15", "--per_device_train_batch_size", "4"]
SMALL += ["--gradient_accumulation_steps", "2", "--logging_steps", "1", "--eval_strategy", "no"]
SMALL += ["--learning_rate", "1e-2", "--warmup_steps", "0"]

TWO_RANKS = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_RANKS += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]

CPU_OF_DEEPSPEED = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""What ``accelerate launch`` tells the ranks."""


def environment(home: Path) -> dict[str, str]:
    """Of a recipe that is launched: nothing of a launcher's, and prepared data in ``home``."""
    names = ("PATH", "HOME", "LANG", "HF_HUB_OFFLINE", "RES_OPTIONS", "TMPDIR")
    return {name: os.environ[name] for name in names if name in os.environ} | {
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),  # for this file, where it is launched
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",  # no look-up of the host name
    }


def launch(
    home: Path, *command: Any, timeout_s: float = 150, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(home) | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_in_ranks(
    home: Path,
    recipe: str,
    arguments: Sequence[Any],
    num_ranks: int,
    *,
    killed: str = "",
    env: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run a recipe in ranks that are forked with everything loaded; how each had spread the model."""
    own = [*map(str, arguments), "--cache_dir", str(home / "datasets")]
    return run_ranks(_run, num_ranks, recipe, own, killed, env=env or {}, init=False)


def skip_without_trl(recipe: str) -> None:
    if "trl" in recipe and find_spec("trl") is None:
        pytest.skip("trl is optional")


def skip_without_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is optional")


def log_of(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def steps_of(folder: Path) -> list[dict[str, float]]:
    """The log of a run's optimizer steps, without the times."""
    names = ("step", "loss", "grad_norm", "num_targets", "learning_rate")
    return [{name: entry[name] for name in names} for entry in log_of(folder) if "loss" in entry]


def _run(recipe: str, arguments: list[str], killed: str) -> dict[str, Any]:
    warnings.simplefilter("default")  # as when a user runs it
    layout: dict[str, Any] = {"reduced": set()}
    is_sharded = any(f"ACCELERATE_USE_{what}" in os.environ for what in ("FSDP", "PARALLELISM_CONFIG"))
    with fsdp_on_cpu() if is_sharded else contextlib.nullcontext(), _killed(killed), _watched(layout):
        run_recipe(recipe, arguments)
    return layout


def run_recipe(recipe: str, arguments: list[str]) -> None:
    script = str(RECIPES / recipe)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        deepspeed_cases.use_cpu()
    with (
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", [str(RECIPES), *sys.path]),
    ):
        runpy.run_path(script, run_name="__main__")


@contextlib.contextmanager
def _killed(when: str) -> Iterator[None]:
    """``1@5``: rank 1 dies where it is about to take its optimizer step 5; empty for never."""
    rank, _, step = when.partition("@")
    if rank != os.environ.get("RANK"):
        yield
        return
    steps, step_of_adamw = iter(range(1, int(step))), torch.optim.AdamW.step

    @functools.wraps(step_of_adamw)
    def step_or_die(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of_adamw(self, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", step_or_die):
        yield


@contextlib.contextmanager
def _watched(layout: dict[str, Any]) -> Iterator[None]:
    """Keep how the model is spread once it is prepared, and the dtypes in which gradients are reduce-scattered."""
    prepare, train = GradUtilsAccelerator.prepare, GradUtilsTrainerMixin.train
    reduce_scatter = DefaultReduceScatter.__call__

    def look(model: torch.nn.Module) -> None:
        layout["wrapper"] = "FSDP2" if isinstance(model, FSDPModule) else type(model).__name__
        layout["meshes"] = {tuple(p.device_mesh.shape) for p in model.parameters() if isinstance(p, DTensor)}

    def prepare_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, *args, **kwargs)
        for model in prepared if isinstance(prepared, tuple | list) else ():
            if isinstance(model, torch.nn.Module):
                look(model)
        return prepared

    def train_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = train(self, *args, **kwargs)
        look(self.model_wrapped)
        return output

    def reduce_scatter_and_look(self: Any, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        layout["reduced"].add(input_tensor.dtype)
        return reduce_scatter(self, output_tensor, input_tensor, *args, **kwargs)

    with (
        mock.patch.object(GradUtilsAccelerator, "prepare", prepare_and_look),
        mock.patch.object(GradUtilsTrainerMixin, "train", train_and_look),
        mock.patch.object(DefaultReduceScatter, "__call__", reduce_scatter_and_look),
    ):
        yield


if __name__ == "__main__":
    with _killed(sys.argv[1]):
        run_recipe(Path(sys.argv[2]).name, sys.argv[3:])
