"""The measured pages are what their JSON files and templates render to."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.exactness.render import render as exactness
from benchmarks.exactness.whole_batch_page import render as whole_batch
from benchmarks.first_rank.render import render as first_rank
from benchmarks.frameworks.render import render as frameworks
from benchmarks.heads.render import render as heads
from benchmarks.performance.render import render as performance

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    DOCS / "exactness.md": exactness,
    DOCS / "whole_batch.md": whole_batch,
    DOCS / "heads.md": heads,
    DOCS / "frameworks.md": frameworks,
    DOCS / "performance.md": performance,
    DOCS / "first_rank.md": lambda data: first_rank(data, (DOCS / "first_rank.md").read_text()),
}


MODULES = {"whole_batch": "exactness --part whole_batch"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_what_its_measurements_render_to(path):
    data = page.load(path)
    assert data
    assert PAGES[path](data) == path.read_text(), (
        f"run python -m benchmarks.{MODULES.get(path.stem, path.stem)} --render --out docs/{path.name}"
    )


def test_another_number_would_be_another_page():
    path = DOCS / "first_rank.md"
    data = page.load(path)
    data["store_load"]["rows"][0]["looks_per_s"] += 1
    assert PAGES[path](data) != path.read_text()


def test_what_is_written_is_read_again(tmp_path):
    data = {"a": {"1": [1.23456789e-7, float("nan"), float("inf")], "b": None}, "long": list(range(100))}
    page.publish(tmp_path / "x.md", data, lambda read: json.dumps(read, sort_keys=True))
    read = json.loads((tmp_path / "x.md").read_text())
    assert read == page.load(tmp_path / "x.md")
    assert read["a"] == {"1": [1.23457e-7, "nan", "inf"], "b": None}
    assert page.load(tmp_path / "y.md") == {}


def test_a_measurement_names_versions_and_machine_and_no_path(tmp_path):
    options = page.argparse.Namespace(out=tmp_path, render=False, seed=3, only_cuda=True, heads="a b", layouts=None)
    measured = page.provenance("benchmarks.x", options)
    assert measured["command"] == "python -m benchmarks.x --seed 3 --only-cuda --heads 'a b'"
    assert set(measured["versions"]) >= {"torch", "transformers", "accelerate"}
    assert measured["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert str(tmp_path) not in json.dumps(measured)
    assert f"seed 3, torch {measured['versions']['torch']}" in page.provenance_text(measured)


def test_a_measurement_says_what_was_measured_again():
    measured = {"date": "2026-01-01", "seed": 3, "again": {"date": "2026-01-02", "heads": 7}}
    assert page.provenance_text(measured) == "2026-01-01, 7 heads again on 2026-01-02, seed 3"


def test_a_place_between_marks_is_replaced_and_all_else_stays():
    text = "a\n<!-- t -->\nold\n<!-- end of t -->\nb\n"
    assert page.replace_between(text, "t", "new") == text.replace("old", "new")
    with pytest.raises(AssertionError, match="no line"):
        page.replace_between(text, "u", "new")


def test_a_reason_names_no_temporary_folder():
    said = f"OSError: no file in {tempfile.gettempdir()}/tmpa1b2c3/x y. | More.\nAnd more."
    assert page.short_reason(said) == "OSError: no file in a temporary folder y. / More."


def test_code_of_a_template_keeps_its_lines(tmp_path):
    code = "```python\na = {{1}}\n\n\nb = 2\n```"
    (tmp_path / "t.md").write_text(f"# Title\n\nSome\nwords of {{place}}.\n{code}\n\nMore\nwords.\n")
    want = f"# Title\n\nSome words of prose.\n\n{code}\n\nMore words.\n".replace("{{1}}", "{1}")
    assert page.fill(tmp_path / "t.md", place="prose") == want
