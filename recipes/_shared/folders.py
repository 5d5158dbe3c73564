"""The files of a folder: which are read, and to which split each belongs."""

import re
from pathlib import Path
from typing import TypeVar

from _shared.errors import UserError

ENDINGS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Ending → kind of file; .gz, .bz2, .xz or .zst may follow. Single files with others are read as JSON lines."""

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Split → the words in the names of its files and folders, as ``datasets`` knows them."""

T = TypeVar("T")


def kind_of(file: str) -> str | None:
    """Return the kind of a file by its ending."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zst"):
        suffixes.pop()
    return ENDINGS.get(suffixes[-1]) if suffixes else None


def files_of(path: str, split: str) -> list[str]:
    """List the files of a split; refuse a folder of several kinds, of which some would be left out."""
    files = []
    for file in sorted(Path(path).rglob("*")):
        inner = file.relative_to(path)
        if kind_of(file.name) and file.is_file() and not any(part.startswith((".", "__")) for part in inner.parts):
            files.append(file)
    kinds = {kind_of(file.name) for file in files}
    if len(kinds) > 1:  # notes beside the data
        files = [file for file in files if kind_of(file.name) != "text"]
        kinds = {kind_of(file.name) for file in files}
    if not files:
        raise UserError(f"{path} has no file that is read; those end in {', '.join(ENDINGS)}")
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path)), []).append(str(file))
    unnamed = splits.pop("", [])
    if unnamed and "train" not in splits:  # beside a train.csv, the others are something else
        splits["train"] = unnamed
    chosen = pick(splits, split, path)
    if len(kinds) > 1:
        first = kind_of(files[0].name)
        other = next(file for file in files if kind_of(file.name) != first)
        raise UserError(
            f"{path} mixes {first} and {kind_of(other.name)} files ({other.name}), of which one kind is read; "
            "put each kind in a folder of its own"
        )
    return chosen


def pick(splits: dict[str, T], split: str, path: str) -> T:
    """Return one split."""
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return splits[split]


def has_card(folder: Path) -> bool:
    """Return True if a README.md says, as on the hub, which files belong to which split and how they are read."""
    card = folder / "README.md"
    is_card = card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---")
    return is_card and any(kind_of(file.name) for file in folder.rglob("*"))


def _split_of(file: Path) -> str:
    """Return the split that the words in a path name, or none; the innermost names it."""
    for part in reversed(file.parts):
        words = set(re.findall("[a-z]+", part.lower()))
        for split, names in SPLITS.items():
            if words & names:
                return split
    return ""
