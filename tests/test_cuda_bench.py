"""The GPU part of ``make bench``, on the CPU: tiny, and without what only a GPU can say."""

import cuda_report
import performance
import pytest
import sections
import torch

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")

PAGE = """\
# Title

Text.

## First

### Inside

One.

## On a GPU

Measured: 3 TB/s.

### Inside

Two.

## Last

Three.
"""


# ---- What is measured elsewhere stays ----


def test_a_section_goes_up_to_the_next_heading_of_its_level():
    assert sections.section(PAGE, "## First") == ["### Inside", "", "One."]
    assert sections.section(PAGE, "## Last") == ["Three."]
    assert sections.section(PAGE, "## None") == []


def test_a_section_is_replaced_and_all_else_stays():
    page = sections.with_section(PAGE, "## On a GPU", ["Anew."])
    assert page == PAGE.replace("Measured: 3 TB/s.\n\n### Inside\n\nTwo.", "Anew.")
    assert sections.with_section(page, "## On a GPU", sections.section(PAGE, "## On a GPU")) == PAGE


def test_a_section_that_is_not_there_comes_last():
    assert sections.with_section("# Title\n", "## New", ["One."]) == "# Title\n\n## New\n\nOne.\n"
    assert sections.with_section("", "## New", ["One."]) == "## New\n\nOne.\n"


@needs_no_gpu
def test_without_a_gpu_the_page_keeps_what_was_measured_on_one(tmp_path, capsys):
    page = tmp_path / "page.md"
    assert cuda_report.measured_or_kept(page) == ([cuda_report.NO_GPU], []), "nothing has been measured yet"
    page.write_text(PAGE)
    assert cuda_report.measured_or_kept(page) == (["Measured: 3 TB/s.", "", "### Inside", "", "Two."], [])
    assert capsys.readouterr().out == f"{cuda_report.NO_GPU}\n" * 2


@needs_no_gpu
def test_without_a_gpu_there_is_no_gpu_part_to_replace(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert performance.main(["--only-cuda", "--out", str(page)]) == 1
    assert page.read_text() == PAGE
    assert capsys.readouterr().out == f"{cuda_report.NO_GPU}\n"


def test_the_gpu_part_alone_leaves_the_rest_of_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(cuda_report.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_report, "report", lambda: (["Anew."], ["ours: too slow"]))
    assert performance.main(["--only-cuda", "--out", str(page)]) == 1, "a fault"
    assert page.read_text() == PAGE.replace("Measured: 3 TB/s.\n\n### Inside\n\nTwo.", "Anew.")
    assert "1 faults\nours: too slow" in capsys.readouterr().out
