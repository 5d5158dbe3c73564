"""Rows from a file, a folder, a saved data set or the hub."""

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.parquet

from _shared.bad_files import cause_of
from _shared.errors import UserError
from _shared.folders import ENDINGS, files_of, has_card, kind_of, pick
from _shared.lines import ROW, Wanted, check_columns
from _shared.readers import READERS, features_of, read_rows


@dataclass(frozen=True, kw_only=True)
class Source:
    """The origin of rows, for messages."""

    name: str
    files: tuple[str, ...] = ()

    def place_of(self, row: int) -> str:
        """Name the file and the row in it; rows are numbered over all files of a folder."""
        if len(self.files) > 1:
            with contextlib.suppress(Exception):  # a name for a message, not worth another error
                for file in self.files:
                    num_rows = _num_rows(file)
                    if row <= num_rows:
                        return f"{file}, row {row:,}"
                    row -= num_rows
        return f"{self.name}, row {row:,}"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Rows as they were read, with the column ``ROW``."""

    rows: datasets.Dataset
    source: Source
    part: Literal["training", "held-out"] = "training"
    """The use of the rows."""


def load_texts_of(path: str, split: str, *, wanted: Wanted, config_name: str | None, cache_dir: str) -> Texts:
    """Load one split of a file, a folder, a folder that ``save_to_disk`` wrote, or a data set of the hub.

    Of files, only the ``wanted`` columns are read; others do not matter.
    """
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    base = split if "+" in split else split.partition("[")[0]
    folder, files = Path(path), []
    try:
        with _quiet_datasets():
            if folder.is_file():
                if not folder.stat().st_size:
                    raise UserError(f"{path} is empty; it needs rows to train on and rows to hold out")
                if base != "train":
                    raise UserError(f"{path} is one file, so its only split is 'train'; got {split!r}")
                files = [path]
                rows = _read_files(files, wanted, cache_dir)
            elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                rows = _load_saved(path, base)
            elif folder.is_dir() and config_name is None and not has_card(folder):
                files = files_of(path, base)
                rows = _read_files(files, wanted, cache_dir)
            elif not folder.exists() and (path.startswith((".", "/", "~")) or kind_of(path)):
                raise UserError(f"there is no file or folder {path!r}")
            else:
                rows = datasets.load_dataset(path, name=config_name, split=base, cache_dir=cache_dir)
            check_columns([column for column in rows.column_names if column != ROW], wanted, path)
            rows = _slice(numbered(rows), base, split)
    except UserError:
        raise
    except Exception as error:  # datasets wraps the causes in many types, and lets some of pyarrow through
        cause = cause_of(error)
        named = cause if any(file in cause for file in files) else f"cannot load the data set {path!r}: {cause}"
        raise UserError(named + _endings(files)) from error
    return Texts(rows=rows, source=Source(name=path, files=tuple(files)))


def numbered(rows: datasets.Dataset) -> datasets.Dataset:
    """Add the column ``ROW``."""
    rows = rows.remove_columns(ROW) if ROW in rows.column_names else rows
    return rows.add_column(ROW, np.arange(1, len(rows) + 1))


def cache_key(rows: datasets.Dataset, *what: Any) -> str:
    """Return a fingerprint of rows after a map of this folder's functions.

    datasets hashes only the name of a module's function; with the files in the key, an edit invalidates the cache.
    """
    return datasets.fingerprint.Hasher.hash((rows._fingerprint, _code(), what))


def _read_files(files: list[str], wanted: Wanted, cache_dir: str) -> datasets.Dataset:
    """Read the wanted columns of files of one kind."""
    kind = kind_of(files[0]) or "json"
    if kind in READERS:
        # datasets hashes only the name of the generator: with the files and the code in the key, an edit counts.
        stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
        options = {"files": tuple(files), "kind": kind, "wanted": dict(wanted), "key": (stats, _code())}
        features = features_of(kind, wanted)
        return datasets.Dataset.from_generator(read_rows, features, cache_dir=cache_dir, gen_kwargs=options)
    options = {}
    if kind == "parquet":
        for file in files:
            columns = pyarrow.parquet.read_schema(file).names
            check_columns(columns, wanted, file)
        options = {"columns": [column for column in wanted.values() if column in columns]}
    escaped = [glob.escape(file) for file in files]
    return datasets.load_dataset(kind, data_files=escaped, split="train", cache_dir=cache_dir, **options)


def _load_saved(path: str, split: str) -> datasets.Dataset:
    try:
        rows = datasets.load_from_disk(path)
    except IndexError as error:  # it wrote no shard
        raise UserError(f"{path} has no rows; it needs rows to train on and rows to hold out") from error
    rows = pick(rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}, split, path)
    return rows.with_format(None)  # it may have been saved with one, of torch or of some columns


def _num_rows(file: str) -> int:
    kind = kind_of(file) or "json"
    if kind in READERS:
        return sum(1 for _ in read_rows((file,), kind, {}))
    return pyarrow.parquet.read_metadata(file).num_rows


def _slice(rows: datasets.Dataset, base: str, split: str) -> datasets.Dataset:
    """Take the part of a split like ``train[:10%]``; its rows keep their numbers."""
    if base == split:
        return rows
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _code() -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep its log of errors off the terminal: they are raised as well."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _endings(files: list[str]) -> str:
    """Say which endings are read, for a file with another."""
    return "" if all(map(kind_of, files)) else f"; files that are read end in {', '.join(ENDINGS)}"
