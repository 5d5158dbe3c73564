"""Programs of other frameworks: how each is started, unmodified, exact or to be checked, and what its step 1 was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.harness.framework_materials import BLOCK_SIZE, NUM_ROWS

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "frameworks"
HERE = "here"
"""The environment of this process."""
EXAMPLES = "examples"
STOCK, OURS, CHECK = "stock", "ours", "check"
MODES = (STOCK, OURS, CHECK)
PYTHON = "python"
"""Commands are found on the PATH, which has the program's environment first."""
EXACT = re.compile(r"\bexact\((\w+)\)")


@dataclass(frozen=True)
class Layout:
    """A split of the 16 rows of one optimizer step."""

    ranks: int
    accumulation: int

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return NUM_ROWS // (self.ranks * self.accumulation)

    def __str__(self) -> str:
        return f"{self.ranks} × {self.accumulation}"


TRUTH = Layout(1, 1)
LAYOUTS = (TRUTH, Layout(1, 4), Layout(2, 2))


@dataclass(frozen=True)
class Run:
    """One start of a program."""

    folder: Path
    """Of the materials."""
    layout: Layout
    is_exact: bool
    out: Path
    python: str
    examples: Path | None = None
    """The folder ``examples/pytorch`` of transformers."""

    def model(self, name: str) -> str:
        return str(self.folder / "models" / name)

    def data(self, name: str) -> str:
        return str(self.folder / "data" / name)

    def trainer_arguments(self) -> dict[str, Any]:
        """One optimizer step over all rows, and its log in a checkpoint."""
        return {
            "output_dir": str(self.out),
            "per_device_train_batch_size": self.layout.rows,
            "gradient_accumulation_steps": self.layout.accumulation,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "dataloader_pin_memory": False,
            "use_cpu": True,
        }

    def script(self, script: Path, arguments: dict[str, Any]) -> list[str]:
        """A script with flags, on the ranks of the layout."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.layout.ranks)]
        return [PYTHON, *(launcher if self.layout.ranks > 1 else []), str(script), *flags(arguments)]

    def yaml(self, recipe: str, changes: dict[str, Any]) -> str:
        """A copy of a recipe with other values; None takes a key out."""
        merged = yaml.safe_load((RECIPES / recipe).read_text()) | changes
        file = self.out.with_suffix(".yaml")
        file.write_text(yaml.safe_dump({key: value for key, value in merged.items() if value is not None}))
        return str(file)


def flags(arguments: dict[str, Any]) -> list[str]:
    """As ``--name value``; a list has several values, True none."""
    words = []
    for name, value in arguments.items():
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and the line that makes it exact."""

    name: str
    line: str
    command: Callable[[Run], list[str]]
    environment: str = HERE
    packages: tuple[str, ...] = ()
    """Whose versions count, besides torch, transformers and accelerate."""
    by_run: bool = True
    """Made exact by ``hf-gradutils run``; else by what ``command`` does for ``Run.is_exact``."""
    variables: Callable[[Run], dict[str, str]] = field(default=lambda run: {})


# ---- Recipes in Python ----


def _recipe(script: str, model: str, data: str, **more: Any) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        text = (RECIPES / script).read_text()
        if not run.is_exact:
            text, replaced = EXACT.subn(r"\1", text)
            assert replaced == 1
        file = run.out.with_suffix(".py")
        file.write_text(text)
        paths = {"model": run.model(model), "dataset": run.data(data)}
        return run.script(file, paths | run.trainer_arguments() | more)

    return command


# ---- Example scripts of transformers ----


def _example(script: str, **arguments: Any) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        assert run.examples is not None
        own = {name: value(run) if callable(value) else value for name, value in arguments.items()}
        own |= {"do_train": True, "cache_dir": str(run.folder / "cache")}
        return run.script(run.examples / script, own | run.trainer_arguments())

    return command


def _examples() -> dict[str, Program]:
    model, data = (lambda name: lambda run: run.model(name)), (lambda name: lambda run: run.data(name))
    scripts = {
        "classification": _example(
            "text-classification/run_classification.py", model_name_or_path=model("bert"),
            train_file=data("classes.json"), validation_file=data("classes.json"), text_column_names="sentence",
            label_column_name="label", metric_name="accuracy", pad_to_max_length="False",
        ),
        "summarization": _example(
            "summarization/run_summarization.py", model_name_or_path=model("t5"), train_file=data("summaries.json"),
            text_column="document", summary_column="summary", source_prefix="",
        ),
        "token classification": _example(
            "token-classification/run_ner.py", model_name_or_path=model("bert"), train_file=data("entities.json"),
        ),
        "causal LM": _example(
            "language-modeling/run_clm.py", model_name_or_path=model("qwen3"), train_file=data("blocks.txt"),
            validation_file=data("blocks.txt"),
            block_size=BLOCK_SIZE,
        ),
        "question answering": _example(
            "question-answering/run_qa.py", model_name_or_path=model("bert"), train_file=data("questions.json"),
            max_seq_length=128, doc_stride=32,
        ),
    }  # fmt: skip
    return {
        f"example {name}": Program(
            name=f"transformers' example, {name}",
            line="`hf-gradutils run` in front of the script",
            command=command,
            environment=EXAMPLES,
            packages=("datasets",),
        )
        for name, command in scripts.items()
    }


# ---- Command lines ----


def _trl(task: str, model: str, data: str) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        own = {"model_name_or_path": run.model(model), "dataset_name": run.data(data), "bf16": False}
        file = run.yaml("trl_cli.yaml", own | run.trainer_arguments())
        several = ["--multi_gpu", "--num_processes", str(run.layout.ranks), "--main_process_port", "0"]
        return ["trl", task, "--config", file, *(several if run.layout.ranks > 1 else [])]

    return command


def _axolotl(run: Run, **more: Any) -> list[str]:
    changes = {
        "base_model": run.model("qwen3"),
        "datasets": [{"path": run.data("chats/train.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "plugins": ["hf_gradutils.integrations.axolotl.ExactPlugin"] if run.is_exact else None,
        "output_dir": str(run.out),
        "dataset_prepared_path": f"{run.out}-prepared",
        "sequence_len": 256,
        "micro_batch_size": run.layout.rows,
        "gradient_accumulation_steps": run.layout.accumulation,
        "max_steps": 1,
        "num_epochs": None,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "pad_to_sequence_len": False,
        "sample_packing": False,
        "dataset_processes": 1,
        "shuffle_merged_datasets": False,
    } | more
    launcher = ["--launcher", "torchrun", "--", "--standalone", f"--nproc_per_node={run.layout.ranks}"]
    alone = ["--launcher", "python"]
    return ["axolotl", "train", run.yaml("axolotl.yaml", changes), *(launcher if run.layout.ranks > 1 else alone)]


def _axolotl_dpo(run: Run) -> list[str]:
    pairs = {"path": run.data("pairs.jsonl"), "ds_type": "json", "type": "chatml.prompt_pairs"}
    return _axolotl(run, rl="dpo", datasets=[pairs], plugins=None)


def _llama_factory(run: Run) -> list[str]:
    own = {"model_name_or_path": run.model("qwen3"), "dataset": "tiny", "dataset_dir": run.data("llama_factory")}
    own |= {
        "disable_gradient_checkpointing": True,
        "cutoff_len": 256,
        "num_train_epochs": None,
        "overwrite_cache": True,
    }
    return ["llamafactory-cli", "train", run.yaml("llama_factory.yaml", own | run.trainer_arguments())]


def _ms_swift(run: Run) -> list[str]:
    own = {
        "model": run.model("qwen3"),
        "model_type": "qwen3",
        "template": "qwen3",
        "dataset": [run.data("chats/train.jsonl")],
    }
    own |= {"use_hf": True, "torch_dtype": "float32", "max_length": 256, "num_train_epochs": None}
    own |= {"split_dataset_ratio": 0, "attn_impl": "eager", "dataset_num_proc": 1, "dataloader_num_workers": 0}
    return ["swift", "sft", run.yaml("ms_swift.yaml", own | run.trainer_arguments())]


RUN = "`hf-gradutils run` in front of the command"
PROGRAMS: dict[str, Program] = {
    "sentence-transformers": Program(
        name="sentence-transformers, cosine similarity",
        line="`exact(SentenceTransformerTrainer)(…)`",
        command=_recipe("sentence_transformers_pairs.py", "bert", "scores"),
        packages=("sentence-transformers",),
        by_run=False,
    ),
    **{
        f"trl {name}": Program(
            name=f"TRL, {name}Trainer",
            line=f"`exact({name}Trainer)(…)`",
            command=_recipe(f"trl_{name.lower()}.py", "qwen3", data, bf16=False, max_length=256),
            packages=("trl",),
            by_run=False,
        )
        for name, data in {"SFT": "chats", "DPO": "preferences", "Reward": "preferences"}.items()
    },
    **{
        f"trl cli {task}": Program(
            name=f"TRL's command line, `trl {task}`", line=RUN, command=_trl(task, "qwen3", data), packages=("trl",)
        )
        for task, data in {"sft": "chats", "dpo": "preferences", "reward": "preferences"}.items()
    },
    "peft": Program(
        name="PEFT, LoRA on BERT",
        line="`exact(Trainer)(…)`",
        command=_recipe("peft_lora.py", "bert", "labels"),
        packages=("peft",),
        by_run=False,
    ),
    **_examples(),
    "axolotl": Program(
        name="axolotl",
        line="`plugins: [hf_gradutils.integrations.axolotl.ExactPlugin]`",
        command=_axolotl,
        environment="axolotl",
        packages=("axolotl", "trl"),
        by_run=False,
        variables=lambda run: {"AXOLOTL_DO_NOT_TRACK": "1"},
    ),
    "axolotl dpo": Program(
        name="axolotl, `rl: dpo`",
        line=RUN,
        command=_axolotl_dpo,
        environment="axolotl",
        packages=("axolotl", "trl"),
        variables=lambda run: {"AXOLOTL_DO_NOT_TRACK": "1"},
    ),
    "LLaMA-Factory": Program(
        name="LLaMA-Factory",
        line=RUN,
        command=_llama_factory,
        environment="llamafactory",
        packages=("llamafactory", "trl"),
        variables=lambda run: (
            {"DISABLE_VERSION_CHECK": "1"}
            | ({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(run.layout.ranks)} if run.layout.ranks > 1 else {})
        ),
    ),
    "ms-swift": Program(
        name="ms-swift",
        line=RUN,
        command=_ms_swift,
        environment="ms-swift",
        packages=("ms-swift", "trl"),
        variables=lambda run: {"NPROC_PER_NODE": str(run.layout.ranks)} if run.layout.ranks > 1 else {},
    ),
}


# ---- Running ----

_ERROR = re.compile(r"\s*(?:\[rank\d\]: *)?(?P<error>[\w.]*(?:Error|Exception)\b.*)")


@dataclass(frozen=True)
class Outcome:
    """What came of a start."""

    code: int
    text: str
    numbers: dict[str, float] | None
    """Loss and gradient norm of step 1."""

    @property
    def reason(self) -> str:
        """The last line that looks like an error."""
        lines = [found["error"] for found in map(_ERROR.match, self.text.splitlines()) if found]
        own = [line for line in lines if "ChildFailedError" not in line]  # the launcher's, which has no reason
        return own[-1] if own else lines[-1] if lines else f"exit code {self.code}"


def start(program: Program, mode: str, run: Run, timeout_s: float = 300) -> Outcome:
    """Start a program, as it is, exact or to be checked, and wait for its end."""
    shutil.rmtree(run.out, ignore_errors=True)
    run.out.parent.mkdir(parents=True, exist_ok=True)
    words = program.command(run)
    if mode == CHECK or (mode == OURS and program.by_run):
        words = words[1:] if words[0] == PYTHON else words
        words = [PYTHON, "-m", "hf_gradutils", "check" if mode == CHECK else "run", *words]
    code, text = _call(words, run.folder / "work", environment(run) | program.variables(run), timeout_s)
    return Outcome(code, text, step_1(run.out))


def environment(run: Run) -> dict[str, str]:
    """Nothing of this process's but where things are; no hub."""
    names = ("HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    return {name: os.environ[name] for name in names if name in os.environ} | {
        "PATH": os.pathsep.join([str(Path(run.python).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(run.folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "NLTK_DATA": str(run.folder / "work" / "nltk_data"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",  # no look-up of the host name
        "WANDB_MODE": "disabled",
    }


def _call(words: list[str], folder: Path, env: dict[str, str], timeout_s: float) -> tuple[int, str]:
    """Exit code and output; what the program has started ends with it."""
    started = time.monotonic()
    with subprocess.Popen(
        words, cwd=folder, env=env, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            return 124, f"{text}\nTimeoutError: not done after {time.monotonic() - started:.0f} s"
        return process.returncode, text


def step_1(out: Path) -> dict[str, float] | None:
    """Loss and gradient norm of the first step, if there was one."""
    for file in sorted(out.glob("**/trainer_state.json")):
        for entry in json.loads(file.read_text())["log_history"]:
            if "loss" in entry and "grad_norm" in entry:
                return {name: float(entry[name]) for name in ("loss", "grad_norm")}
    return None


def python_here() -> str:
    return sys.executable
