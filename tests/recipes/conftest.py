"""Shared by the tests of the recipes' parts: the parts themselves, and small data."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from tests.harness.recipe_cases import RECIPES

sys.path.append(str(RECIPES))  # where the recipes find their parts

QUESTION = {"role": "user", "content": "What follows three?"}
ANSWER = {"role": "assistant", "content": "four"}


@pytest.fixture(autouse=True)
def _no_progress_bars():
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with a chat template that marks the assistant's tokens."""
    from _shared.arguments import RecipeArguments
    from _shared.data import train_tokenizer
    from _shared.files import Source, Texts

    rows = datasets.Dataset.from_dict({"text": ["number one is followed by number two, what follows three?"] * 3})
    recipe = RecipeArguments(dataset_name="any", vocab_size=300)
    trained = train_tokenizer(Texts(rows=rows.add_column("_row", [1, 2, 3]), source=Source(name="any")), recipe)
    trained.pad_token = "<pad>"
    return trained


@pytest.fixture
def recipe(tmp_path):
    """Arguments with prepared data in a folder of the test."""
    from _shared.arguments import RecipeArguments

    return lambda **own: RecipeArguments(
        **{"dataset_name": "my.jsonl", "cache_dir": str(tmp_path / "cache"), "max_length": 24} | own
    )


def json_lines(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def texts_of(rows: list, features: datasets.Features | None = None):
    from _shared.files import Source, Texts

    numbered = datasets.Dataset.from_list(rows, features=features).add_column("_row", list(range(1, len(rows) + 1)))
    return Texts(rows=numbered, source=Source(name="my.jsonl"))


def prepared(tokenizer, arguments, rows: list, features: datasets.Features | None = None):
    """Return the tokenized rows and their counts."""
    from _shared.classes import find_classes
    from _shared.tokenization import tokenize

    texts = texts_of(rows, features)
    return tokenize(texts, arguments, tokenizer, find_classes(arguments, texts))
