"""The command ``hf-gradutils``: print the set-up as seen by the ranks, run a recipe's check, plot runs."""

import argparse
import os
import platform
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_gradutils import _environment
from hf_gradutils.coordination import keys
from hf_gradutils.coordination.channel import Channel
from hf_gradutils.coordination.nodes import claim_first_rank
from hf_gradutils.coordination.ranks import current_ranks
from hf_gradutils.coordination.store import LEAVE_GRACE_S, leave, open_channel
from hf_gradutils.coordination.waiting import WaitOptions, poll
from hf_gradutils.errors import GradUtilsError, InvalidArgumentError
from hf_gradutils.plots import plot_runs, read_run

PACKAGES = ("hf-gradutils", "torch", "accelerate", "transformers", "datasets", "trl", "peft", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 if a check fails, 2 for an error of the user."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options))
    except GradUtilsError as error:
        print(f"hf-gradutils: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-gradutils",
        description="Exact gradients in every parallel layout: look at the set-up, check a recipe, plot its runs.",
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="{env,check,plot}")

    env = commands.add_parser(
        "env",
        help="versions, launcher, ranks and nodes",
        description="Print versions, launcher, ranks and nodes as the ranks see them. Under a launcher every rank must "
        "run it: torchrun --nproc-per-node 2 -m hf_gradutils.cli env",
    )
    env.add_argument("--timeout_s", type=float, default=60.0, help="how long to wait for the other ranks (60)")
    env.set_defaults(run=_env)

    check = commands.add_parser(
        "check",
        help="run a recipe's check of invariance instead of its training",
        description="Run a training script with --check_invariance: it compares its gradient, on its own samples and "
        "in its own layout, with one process and one batch, and ends with code 1 if they differ. Under a launcher: "
        "accelerate launch --multi_gpu --num_processes 2 -m hf_gradutils.cli check recipes/finetune.py FILE.yaml",
    )
    check.add_argument("script", type=Path, help="a recipe, or a script of yours that takes --check_invariance")
    check.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    check.set_defaults(run=_check)

    plot = commands.add_parser(
        "plot",
        help="draw the runs of one or several output folders",
        description="Draw loss, gradient norm, targets per step, skipped steps and the norms of groups out of "
        "trainer_state.json, several runs over one another.",
    )
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output folder of a training")
    plot.add_argument("--out", type=Path, default=None, help="the picture (training.png in the first folder)")
    plot.add_argument("--max_grad_norm", type=float, default=None, help="height of the line of the clip")
    plot.set_defaults(run=_plot)
    return parser


# ---- env ----


def _env(options: argparse.Namespace) -> int:
    ranks = current_ranks()
    wait = WaitOptions(timeout_s=options.timeout_s).started()
    channel = open_channel(timeout_s=wait.timeout_s) if ranks.world_size > 1 else None
    grace_s = LEAVE_GRACE_S
    try:
        lines = _ranks_of(channel, wait) if channel is not None else ["ranks        1, no launcher"]
        if ranks.global_rank == 0:
            print("\n".join([*_machine(), *_settings(), *lines]))
    except GradUtilsError:
        grace_s = 0.3  # the limit has passed
        raise
    finally:
        if channel is not None:
            leave(grace_s=grace_s)
    return 0


def _machine() -> list[str]:
    lines = [f"python       {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package:<12} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:<12} not installed")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        lines.append(f"GPUs         {len(names)}: {', '.join(dict.fromkeys(names))}, CUDA {torch.version.cuda}")
    else:
        lines.append(f"GPUs         none that torch can see; {os.cpu_count()} CPUs")
    return lines


def _settings() -> list[str]:
    """Variables that set fields of the plugin, checked."""
    from hf_gradutils.accelerator import GradUtilsPlugin

    GradUtilsPlugin()  # raises if a value is invalid
    values = _environment.read_settings()
    return [f"{_environment.SETTING}{name.upper()}={value}" for name, value in values.items()]


def _ranks_of(channel: Channel, wait: WaitOptions) -> list[str]:
    """One line per rank, from the store."""
    world = channel.ranks.world_size
    env_keys = [keys.RANK_ENV.format(rank=rank) for rank in range(world)]

    def missing() -> list[int]:
        return [rank for rank, key in enumerate(env_keys) if channel.read(key) is None]

    try:
        claim_first_rank(channel)  # before this rank is complete: then all nodes have a first when all ranks are
        channel.write(env_keys[channel.ranks.global_rank], f"{channel.ranks.node} {channel.ranks.local_rank}")
        poll(lambda: None if missing() else True, lambda: f"ranks {missing()} of {world} are missing", wait)
    except TimeoutError as error:
        hint = _environment.describe_world()
        raise InvalidArgumentError(
            f"{error}; start all ranks, or raise --timeout_s" + (f". {hint}" if hint else "")
        ) from None
    except RuntimeError:
        raise InvalidArgumentError(f"lost {channel.origin}, whose host has ended, before all ranks had come") from None
    launched = _environment.read_launched_rank()
    lines = [
        f"launcher     {'none, a process group' if launched is None else launched.launcher}",
        f"store        {channel.origin}",
        f"ranks        {world}",
    ]
    for rank in range(world):
        node, local_rank = (channel.read(env_keys[rank]) or "").rsplit(" ", 1)
        is_first = channel.read(keys.NODE_FIRST_RANK.format(node=node)) == str(rank)
        first = " (first of its node)" if is_first else ""
        lines.append(f"  rank {rank}: {channel.process_of(rank)}, node {node}, local rank {local_rank}{first}")
    return lines


# ---- check ----


def _check(options: argparse.Namespace) -> int:
    if not options.script.is_file():
        raise InvalidArgumentError(f"no file {str(options.script)!r}; give a script that takes --check_invariance")
    sys.argv = [str(options.script), *options.arguments, "--check_invariance"]
    sys.path.insert(0, str(options.script.resolve().parent))  # as Python does for a script
    try:
        runpy.run_path(str(options.script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


# ---- plot ----


def _plot(options: argparse.Namespace) -> int:
    runs = [read_run(folder) for folder in options.runs]
    first = options.runs[0]
    path = options.out or (first.parent if first.is_file() else first) / "training.png"
    print(f"wrote {plot_runs(runs, path, max_grad_norm=options.max_grad_norm)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
