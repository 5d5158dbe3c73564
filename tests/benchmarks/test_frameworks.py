"""What ``make frameworks`` calls wrong, and the page that it writes."""

import copy
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.frameworks import judge
from benchmarks.frameworks.environments import ENVIRONMENTS
from benchmarks.frameworks.render import render
from tests.harness.framework_programs import HERE, LAYOUTS, PROGRAMS, RECIPES

RIGHT = {"loss": 1.1, "grad_norm": 0.2}
WRONG = {"loss": 4.4, "grad_norm": 0.8}
VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0"}
PLACES = [str(layout) for layout in LAYOUTS]


@pytest.fixture
def row():
    """Stock is wrong where there is more than one micro-batch."""
    checks = [{"answer": "exact", "said": ""}] + [{"answer": "wrong", "said": "4 times too long"}] * 2
    return judge.with_distances(
        {
            "date": "2026-01-01",
            "versions": VERSIONS,
            "stock": dict(zip(PLACES, (RIGHT, WRONG, WRONG), strict=True)),
            "ours": {place: {"loss": 1.1, "grad_norm": 0.2 + 2e-8} for place in PLACES},
            "check": dict(zip(PLACES, checks, strict=True)),
        }
    )


def test_what_is_right_is_no_fault(row):
    assert judge.faults(row) == []


def test_each_kind_of_fault_is_one(row):
    worse = copy.deepcopy(row)
    worse["ours"]["1 × 4"] = {"loss": 1.1, "grad_norm": 0.2001}
    worse["ours"]["2 × 2"] = {"error": "ValueError: no"}
    worse["check"]["1 × 1"]["answer"] = "wrong"
    worse["check"]["1 × 4"] = {"answer": "exact", "said": ""}
    assert [fault.partition(":")[0] for fault in judge.faults(worse)] == [
        "check, 1 × 1", "ours, 1 × 4", "check, 1 × 4", "ours, 2 × 2",
    ]  # fmt: skip


def test_where_stock_does_not_run_nothing_is_promised(row):
    row["stock"]["2 × 2"] = row["ours"]["2 × 2"] = {"error": "RuntimeError: no accelerator"}
    assert judge.faults(row) == []
    row["stock"]["1 × 1"] = {"error": "RuntimeError: no"}
    assert judge.faults(row) == ["the stock program does not run: {'error': 'RuntimeError: no'}"]


def test_the_page_shows_what_is_wrong_and_what_does_not_run(row):
    text = render({"programs": {"peft": row}})
    assert "| 1.1, 0.2 | **4.4, 0.8** | **4.4, 0.8** | 1e-07 |" in text
    assert "1 × 1: exact; 1 × 4: wrong; 2 × 2: wrong | 2026-01-01, transformers 5.24.0 |" in text
    assert "- PEFT, LoRA on BERT, 1 × 4 and 2 × 2: “4 times too long”" in text
    row["ours"]["2 × 2"] = row["stock"]["2 × 2"] = {"error": "RuntimeError: no accelerator"}
    text = render({"programs": {"peft": row}})
    assert "| does not run | 1e-07; 2 × 2 does not run |" in text
    assert "- PEFT, LoRA on BERT, 2 × 2, stock and ours: `RuntimeError: no accelerator`" in text


def test_every_program_has_an_environment_and_every_recipe_a_place_on_the_page():
    assert {program.environment for program in PROGRAMS.values()} == {HERE, *ENVIRONMENTS}
    text = (Path(judge.__file__).with_name("page.md")).read_text()
    assert [path.name for path in RECIPES.iterdir() if path.is_file() and path.name not in text] == []


def test_every_program_was_measured_and_nothing_was_wrong():
    rows = page.load(Path(__file__).parents[2] / "docs" / "frameworks.md")["programs"]
    assert set(rows) == set(PROGRAMS)
    assert {key: judge.faults(row) for key, row in rows.items()} == {key: [] for key in rows}
