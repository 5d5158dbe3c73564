"""From measurements to a page: a JSON file beside it, and a template of prose with named places.

docs/data/exactness.json        what was measured, with date, versions and machine
benchmarks/exactness/page.md    prose, with places such as ``{summary}``
docs/exactness.md               both together; a test holds it to them
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "hf-gradutils")
NOT_MEASURED = "Not measured."
DIGITS = 6
"""Significant digits of a number in a JSON file; pages show two or three."""

# ---- The command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--out`` and ``--render``."""
    parser.add_argument("--out", type=Path, help="the page to write, and data/NAME.json beside it (default: none)")
    parser.add_argument("--render", action="store_true", help="write the page from its JSON file, without measuring")


def publish(page: Path | None, data: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """Write the JSON file, and the page that it renders to."""
    if page is None:
        return
    file = data_file(page)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_dumps(_rounded(data)) + "\n")
    page.write_text(render(load(page)))
    print(f"wrote {file} and {page}")


def load(page: Path | None) -> dict[str, Any]:
    """The contents of the JSON file beside a page; empty if there is none."""
    if page is None or not data_file(page).exists():
        return {}
    found: dict[str, Any] = json.loads(data_file(page).read_text())
    return found


def data_file(page: Path) -> Path:
    return page.parent / "data" / f"{page.stem}.json"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)  # JSON has no nan and no inf
    return value


def _dumps(value: Any, indent: str = "") -> str:
    """JSON with a line for everything that fits into one."""
    text = json.dumps(value, ensure_ascii=False)
    if len(indent + text) <= 160 or not isinstance(value, dict | list):
        return text
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _dumps(part, inner) for part in value) + f"\n{indent}]"
    parts = (f"{inner}{json.dumps(name, ensure_ascii=False)}: {_dumps(part, inner)}" for name, part in value.items())
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


# ---- When, with what and where ----


def provenance(module: str, options: argparse.Namespace, *packages: str) -> dict[str, Any]:
    """Date, command, seed, versions (of more packages too) and machine of a measurement."""
    given = {name: value for name, value in vars(options).items() if name not in ("out", "render")}
    words = ["python", "-m", module]
    for name, value in given.items():
        if value not in (None, False):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return {
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "command": shlex.join(words),
        "seed": given.get("seed"),
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)},
        "machine": {"cores": len(os.sched_getaffinity(0)), "cpu": _cpu(), "load": round(os.getloadavg()[0], 1)},
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.machine()


def provenance_text(measured: dict[str, Any]) -> str:
    """The same in words, and what was measured again. Early measurements have not recorded everything."""
    machine, seed, again = measured.get("machine") or {}, measured.get("seed"), measured.get("again")
    words = [measured.get("date"), again and f"{again['heads']} heads again on {again['date']}"]
    words += [None if seed is None else f"seed {seed}"]
    words += [f"{name} {version}" for name, version in measured.get("versions", {}).items()]
    words.append(" of ".join(filter(None, (machine.get("cores") and f"{machine['cores']} cores", machine.get("cpu")))))
    words.append(f"load {machine['load']:g}" if "load" in machine else None)
    return ", ".join(filter(None, [*words, machine.get("gpu")]))


# ---- Markdown ----


def fill(template: Path, **places: Any) -> str:
    """A template with something in all of its places, its paragraphs wrapped."""
    parts = _FENCED.split(template.read_text().format(**places).strip())
    blocks = [
        block for part in parts for block in ([part] if _FENCED.match(part) else re.split(r"\n{2,}", part.strip()))
    ]
    return "\n\n".join(b if b.startswith(_NO_PARAGRAPH) else wrapped(b) for b in blocks if b) + "\n"


_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_NO_PARAGRAPH = ("|", "<", "-", "#", "1.", "```")


def replace_between(page: str, name: str, body: str) -> str:
    """A page with ``body`` between the two comments that mark a place."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    _, found_end, after = rest.partition(end)
    assert found_end, f"the page has no line {start!r} with an end below"
    return f"{before}{start}{body}{end}{after}"


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as a table, the first one the header."""
    header, *body = rows
    lines = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *body))
    return "\n".join([next(lines), "|---" * len(header) + "|", *lines])


def folded(summary: str, body: str) -> str:
    """A block that a reader opens."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def bullets(lines: Iterable[str]) -> str:
    """A list, wrapped; "None." where it is empty."""
    return "\n".join(wrapped(f"- {line}", "  ") for line in lines) or "None."


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def code(names: Iterable[str]) -> str:
    """Names in code font, one after the other."""
    return ", ".join(f"`{name}`" for name in names)


def short_reason(reason: str, width: int = 200) -> str:
    """The first line of an error, for a table: without the names of temporary folders."""
    folders = rf"{re.escape(tempfile.gettempdir())}/[^\s.]+"
    first_line = re.sub(folders, "a temporary folder", reason.split("\n")[0]).replace("|", "/")
    return first_line if len(first_line) <= width else first_line[:width] + " …"
