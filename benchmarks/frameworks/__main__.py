"""Programs of other frameworks, unmodified, exact and checked: loss and gradient norm of step 1 on the same 16 rows.

    python -m benchmarks.frameworks [--only trl,axolotl] [--examples FOLDER] [--out FILE]

Makes environments of their own for what does not fit this one, under .venv-frameworks. The example scripts of
transformers are in its repository alone: clone it at the tag of your version and give its folder examples/pytorch.
Prints a line per program and start, writes the page, and fails if ours is wrong anywhere, or a check's answer is. What
is not measured this time stays on the page.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.frameworks import environments, judge
from benchmarks.frameworks.render import render
from tests.harness.framework_materials import write_materials
from tests.harness.framework_programs import (
    CHECK,
    EXAMPLES,
    LAYOUTS,
    MODES,
    OURS,
    PROGRAMS,
    Layout,
    Outcome,
    Program,
    Run,
    start,
)

_ANSWERS = {0: "exact", 1: "wrong", 2: "not compared"}
_COMMON = ("torch", "transformers", "accelerate")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated parts of names of programs (default: all)")
    parser.add_argument("--examples", type=Path, help="examples/pytorch of a clone of transformers (default: none run)")
    parser.add_argument("--logs", type=Path, help="a folder for what the programs print (default: not kept)")
    page.add_arguments(parser)
    options = parser.parse_args(arguments)
    data = page.load(options.out)
    if options.render:
        page.publish(options.out, data, render)
        return 0
    chosen = [key for key in PROGRAMS if not options.only or any(part in key for part in options.only.split(","))]
    faults: list[str] = []
    rows = data.setdefault("programs", {})
    with tempfile.TemporaryDirectory() as folder:
        write_materials(Path(folder))
        for key in chosen:
            if PROGRAMS[key].environment == EXAMPLES and options.examples is None:
                print(f"{key}: left out; --examples names the folder of the scripts")
                continue
            rows[key] = _measure(key, Path(folder), options)
            faults += [f"{key}: {fault}" for fault in judge.faults(rows[key])]
            data["programs"] = {name: rows[name] for name in PROGRAMS if name in rows}
            page.publish(options.out, data, render)
    print("\n".join([f"{len(faults)} faults", *faults]))
    return 1 if faults else 0


def _measure(key: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    program = PROGRAMS[key]
    python = environments.python_of(program.environment)
    measured = page.provenance("benchmarks.frameworks", argparse.Namespace())
    found: dict[str, Any] = {
        "date": measured["date"],
        "versions": environments.versions(python, (*_COMMON, *program.packages)),
    }
    for mode, layout, outcome in _starts(key, program, folder, python, options):
        cell: Any = outcome.numbers or {"error": page.short_reason(outcome.reason, 160)}
        if mode == CHECK:
            cell = {"answer": _ANSWERS.get(outcome.code, f"exit code {outcome.code}"), "said": _said(outcome.text)}
        found.setdefault(mode, {})[str(layout)] = cell
        print(f"{key}, {mode}, {layout}: {cell}", flush=True)
    return judge.with_distances(found)


def _starts(
    key: str, program: Program, folder: Path, python: str, options: argparse.Namespace
) -> Iterator[tuple[str, Layout, Outcome]]:
    for mode in MODES:
        for layout in LAYOUTS:
            name = f"{key}-{mode}-{layout.ranks}x{layout.accumulation}".replace(" ", "-")
            run = Run(folder, layout, mode == OURS, folder / "out" / name, python, options.examples)
            outcome = start(program, mode, run)
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{name}.log").write_text(outcome.text)
            yield mode, layout, outcome


def _said(text: str) -> str:
    """The line of a check's report that has the answer."""
    for line in text.splitlines():
        if line.startswith(("EXACT", "WRONG", "NOT COMPARED", "error:")):
            return page.short_reason(line)
    return ""


if __name__ == "__main__":
    sys.exit(main())
