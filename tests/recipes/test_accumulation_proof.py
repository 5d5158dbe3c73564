"""The measured proof on README's first screen: data, picture and table say the same."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.harness.recipe_cases import launch

ROOT = Path(__file__).parents[2]
DATA, PICTURE = ROOT / "docs" / "data" / "accumulation.json", ROOT / "docs" / "pictures" / "accumulation.png"
README = (ROOT / "README.md").read_text()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def test_the_table_of_the_readme_is_the_data():
    measured = json.loads(DATA.read_text())
    assert measured["accumulation"] == [1, 4, 8]
    table = {}
    for head, *cells in re.findall(r"^\| (\w[^|]*\w\)) \| ([^|]*) \| ([^|]*) \|$", README, re.MULTILINE):
        table[head] = [[float(number) for number in cell.strip("*").split(", ")] for cell in cells]
    assert list(table) == list(measured["errors"])
    for head, errors in measured["errors"].items():
        rows = [errors["transformers.Trainer"], errors["GradUtilsTrainer"]]
        shown = [[float(f"{error:.1e}" if error < 0.1 else f"{error:.1f}") for error in row] for row in rows]
        assert table[head] == shown, head
        assert max(errors["GradUtilsTrainer"]) < 1e-6
    assert max(measured["errors"]["classification (BERT)"]["transformers.Trainer"]) > 10, "the control"


def test_the_picture_of_the_readme_was_drawn_from_the_data_and_is_small():
    assert f"({PICTURE.relative_to(ROOT)})" in README
    assert digest(DATA) in PICTURE.read_bytes()
    assert PICTURE.stat().st_size < 60_000


@pytest.mark.slow
def test_the_command_draws_the_picture_from_its_data(home, tmp_path):
    pytest.importorskip("matplotlib")
    data = tmp_path / "data.json"
    shutil.copy(DATA, data)
    data.write_text(data.read_text().replace('"samples": 16', '"samples": 8'))
    done = launch(home, "recipes/_shared/accumulation_picture.py", data, tmp_path / "new" / "x.png")
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "new" / "x.png").read_bytes()
    assert digest(data) in drawn
    assert digest(DATA) not in drawn
