"""The command ``hf-gradutils``: check a program, make it exact, print the set-up as seen by the ranks, plot runs.

Each command imports what it needs: ``run`` and ``check`` start another process, and do without torch.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gradutils.errors import GradUtilsError, InvalidArgumentError
from hf_gradutils.programs.command import check_program, run_exact, words_of

_WITH_VALUE = ("--json", "--num_samples", "--plot", "--timeout_s")
"""Options of ``check`` that take a value."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, which for ``run`` is the program's.

    0: done, and what was checked is exact. 1: what was checked is wrong. 2: an error, or it could not be compared.
    """
    parser = _parser()
    own, program = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own, argparse.Namespace(program=program))
    if options.run is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options))
    except GradUtilsError as error:
        print(f"hf-gradutils: error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 2  # 1 would say that a gradient is wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-gradutils",
        description="Exact gradients in every parallel layout: check any program that trains with a Trainer, make it "
        "exact, look at the set-up, plot runs.",
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="{check,run,env,plot}")

    env = commands.add_parser(
        "env",
        help="versions, launcher, ranks and nodes",
        description="Print versions, launcher, ranks and nodes as the ranks see them. Under a launcher every rank must "
        "run it: torchrun --nproc-per-node 2 -m hf_gradutils env",
    )
    env.add_argument("--timeout_s", type=float, default=60.0, help="how long to wait for the other ranks (60)")
    env.set_defaults(run=_env)

    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        usage="hf-gradutils check [options] SCRIPT.py … | -m MODULE … | COMMAND …",
        help="is the gradient of a program that of one batch? changes nothing in it",
        description="Run an unmodified program, under a launcher too, until its first transformers.Trainer is about "
        "to train, and compare there its gradient, on its own samples and in its own layout, with that of one process "
        "and one batch. Prints a report last, with the answer in its first line, and ends with code 0 if they are "
        "the same, 1 if not, 2 if they could not be compared.",
    )
    check.add_argument("--num_samples", type=int, help="samples to compare on (16, more for a long accumulation)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    check.add_argument("--plot", type=Path, metavar="FILE", help="draw the report")
    check.add_argument("--exact", action="store_true", help="check the program as `hf-gradutils run` would run it")
    check.add_argument("--all", action="store_true", help="check each Trainer of a process, then train it")
    check.add_argument("--timeout_s", type=float, default=1800.0, help="the longest that one check may take (1800)")
    _add_loops(check)
    check.set_defaults(run=_check)

    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        usage="hf-gradutils run [options] SCRIPT.py … | -m MODULE … | COMMAND …",
        help="train an unmodified program with every Trainer exact",
        description="Run an unmodified program, under a launcher too, with every transformers.Trainer and subclass "
        "exact that it or a process of it makes. One that cannot be made exact stops with the reason.",
    )
    _add_loops(run)
    run.set_defaults(run=_run)

    plot = commands.add_parser(
        "plot",
        help="draw the runs of one or several output folders, or a report of a check",
        description="Draw loss, gradient norm, targets per step, skipped steps and the norms of groups out of "
        "trainer_state.json, several runs over one another; or the errors of one report that check --json wrote.",
    )
    plot.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN_DIR", help="output folders of trainings, or one report as JSON"
    )
    plot.add_argument("--out", type=Path, default=None, help="the picture (training.png in the first folder)")
    plot.add_argument("--max_grad_norm", type=float, default=None, help="height of the line of the clip")
    plot.set_defaults(run=_plot)
    return parser


def _add_loops(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow_loops", action="store_true", help="let optimizers step outside of a Trainer, as they are"
    )


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of ``run`` or ``check``, and the program, whose own arguments may look like options."""
    if not arguments or arguments[0] not in ("run", "check"):
        return list(arguments), []
    place = 1
    while place < len(arguments) and arguments[place].startswith("-") and arguments[place] not in ("-m", "--"):
        place += 2 if arguments[place] in _WITH_VALUE else 1
    program = arguments[place:]
    return list(arguments[:place]), list(program[1:] if program[:1] == ["--"] else program)


def _env(options: argparse.Namespace) -> int:
    from hf_gradutils.programs.env import print_env

    print_env(options.timeout_s)
    return 0


def _run(options: argparse.Namespace) -> int:
    return run_exact(words_of(options.program), allows_loops=options.allow_loops)


def _check(options: argparse.Namespace) -> int:
    from hf_gradutils.programs.answer import make_room, show

    if options.timeout_s <= 0 or (options.num_samples is not None and options.num_samples < 1):
        raise InvalidArgumentError("--num_samples and --timeout_s must be > 0")
    words, picture = words_of(options.program), options.plot
    if picture is not None:
        from hf_gradutils.plots import check_can_draw

        picture = check_can_draw(picture)
    make_room(options.json, picture)  # last: an error above has removed nothing
    outcomes = check_program(
        words,
        makes_exact=options.exact,
        num_samples=options.num_samples,
        all_trainers=options.all,
        timeout_s=options.timeout_s,
        allows_loops=options.allow_loops,
    )
    return show(outcomes, json_file=options.json, picture=picture)


def _plot(options: argparse.Namespace) -> int:
    from hf_gradutils.plots import plot_files

    def report_of(values: dict[str, Any]) -> Any:
        from hf_gradutils.invariance import InvarianceReport  # loads accelerate, which runs do without

        return InvarianceReport.from_dict(values)

    picture = plot_files(options.runs, options.out, report_of=report_of, max_grad_norm=options.max_grad_norm)
    print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
