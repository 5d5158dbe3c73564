"""Environments of their own for what does not fit this package's versions, and for the example scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.framework_programs import EXAMPLES, HERE, ROOT, python_here

FOLDER = ROOT / ".venv-frameworks"
_OURS = ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0", "datasets==5.2.0")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Packages of one environment."""

    packages: tuple[str, ...]
    """Installed with what they require."""
    alone: tuple[str, ...] = ()
    """Installed without: these ask for other versions than those above."""
    stand_ins: tuple[str, ...] = ()
    """Modules that are imported and not used here, as empty files: their wheels need CUDA."""


ENVIRONMENTS = {
    EXAMPLES: Environment(packages=(*_OURS, "evaluate", "nltk", "scikit-learn", "sentencepiece", "protobuf")),
    "axolotl": Environment(
        packages=(
            *_OURS, "peft==0.21.2", "addict", "fire", "colorama", "einops", "numba", "typer", "evaluate", "scipy",
            "art", "python-dotenv", "pydantic", "wandb", "sentencepiece", "schedulefree", "nvidia-ml-py", "posthog",
            "zstandard", "tensorboard", "kernels", "fastcore",
        ),
        alone=(
            "axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "trl==1.9.0",
            "bitsandbytes==0.50.2", "triton==3.7.1",
        ),
    ),
    "llamafactory": Environment(
        packages=(
            *_OURS, "peft==0.21.2", "trl==0.24.0", "omegaconf", "fire", "tiktoken", "sentencepiece", "einops",
            "pydantic", "scipy", "protobuf", "av", "tyro", "matplotlib", "hf-transfer", "uvicorn", "fastapi",
            "sse-starlette", "psutil",
        ),
        alone=("llamafactory==0.9.5", "torchdata==0.11.0"),
        stand_ins=("torchaudio",),
    ),
    "ms-swift": Environment(
        packages=("torch==2.13.0", "ms-swift==4.6.0", "transformers==5.19.0", "accelerate==1.15.0"),
    ),
}  # fmt: skip


def python_of(name: str) -> str:
    """The interpreter of an environment, which is made or completed first."""
    if name == HERE:
        return python_here()
    python, wanted = FOLDER / name / "bin" / "python", ENVIRONMENTS[name]
    stamp = FOLDER / name / "wanted.txt"
    if stamp.exists() and stamp.read_text() == repr(wanted):
        return str(python)
    print(f"setting up {FOLDER.name}/{name} …", flush=True)
    if not python.exists():
        _uv("venv", "--python", sys.executable, str(FOLDER / name))
    _install(python, wanted.packages)
    _install(python, ["--no-deps", *wanted.alone, "--editable", str(ROOT)])
    for module in wanted.stand_ins:
        (site,) = (FOLDER / name / "lib").glob("python*/site-packages")
        (site / f"{module}.py").write_text('"""Stands in for a package that is not used here."""\n')
    stamp.write_text(repr(wanted))
    return str(python)


def _install(python: Path, words: Sequence[str]) -> None:
    _uv("pip", "install", "--python", str(python), *words)


def _uv(*words: str) -> None:
    # uv does not read where pip looks for wheels besides its index.
    env = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    subprocess.run([sys.executable, "-m", "uv", *words, "--quiet"], check=True, env=os.environ | env)


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """The installed versions in an environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True)
    read: dict[str, str] = json.loads(found.stdout)
    return read
