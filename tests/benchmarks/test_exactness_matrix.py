"""The script behind ``make matrix``, on a small part of it. The bounds of half precision: test_half_precision.py."""

import pytest

from benchmarks import exactness, half_report
from tests.harness.trainer_cases import IS_OLD


@pytest.mark.skipif(IS_OLD, reason="transformers 5.17 has no expert parallelism")
@pytest.mark.slow
def test_a_part_of_the_matrix_has_no_fault_of_ours_and_shows_those_of_stock(tmp_path, capsys):
    out = tmp_path / "exactness.md"
    part = ["--part", "float32", "--heads", "bert choices,mixtral", "--layouts", "one_rank,ep2_fsdp2x2"]
    assert exactness.main([*part, "--out", str(out)]) == 0
    assert "0 faults" in capsys.readouterr().out
    page = out.read_text()
    assert "## In half precision" not in page
    (choices,) = (line for line in page.splitlines() if line.startswith("| bert choices | ") and "n/a" not in line)
    cells = [cell.strip() for cell in choices.strip("|").split("|")]
    assert [cell.startswith("**") for cell in cells[1:]] == [False] * 4 + [True] * 2, "stock at accumulation 4 and 8"
    assert "| bert choices | n/a (1) | n/a (1) |" in page
    assert "(1) ValueError: `ep_size=2` was requested, but `BertForMultipleChoice` has no `ep_plan`" in page


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2", "tp2"])
def test_a_part_of_it_in_half_precision_too(tmp_path, capsys, layout):
    out = tmp_path / "exactness.md"
    out.write_text(f"{exactness.TITLE}\n\n## In float32\n\nKept.\n")
    heads = {"ddp2": "bert classes", "fsdp2x2": "bert classes,plain module", "tp2": "llama causal"}[layout]
    assert exactness.main(["--part", "half", "--heads", heads, "--layouts", layout, "--out", str(out)]) == 0
    assert "0 faults" in capsys.readouterr().out
    page = out.read_text()
    assert "\n\n## In float32\n\nKept.\n\n## In half precision\n\n" in page
    for precision in ("bf16", "fp16"):
        lines = page.partition(f"### {precision}, {layout}\n")[2].partition("###")[0].splitlines()
        (row,) = (line for line in lines if line.startswith(f"| {heads.split(',')[0]} | "))
        ours, stock = (row.split(" | ")[start : start + 4] for start in (1, 5))
        assert not any(cell.startswith("**") or "crashes" in cell for cell in ours), row
        if "bert" in heads:
            assert all(cell.startswith("**") for cell in stock), "twice and eight times too long"


def test_a_layout_in_which_nothing_runs_is_a_fault():
    crash = {"ours": "ValueError: no", "stock": "ValueError: no"}
    assert exactness.unmeasured({("a", "x"): crash}, ["x"]) == ["x: neither trainer ran, with any head"]
    assert half_report.unmeasured(
        {("a", "x", "bf16"): crash, ("a", "x", "fp16"): {"ours": {}, "stock": {}}}, ["x"]
    ) == ["x, bf16: neither trainer ran, with any head"]


def test_a_wrong_cell_or_a_crash_of_ours_is_a_fault():
    right, wrong = exactness.Errors(1e-7, 1e-7, 1e-7), exactness.Errors(1e-7, 1e-7, 2e-5)
    nothing = exactness.Errors(float("nan"), 0.0, 0.0)
    cells = {
        ("a", "x"): {"ours": [right, wrong], "stock": [wrong, wrong]},
        ("b", "x"): {"ours": [nothing], "stock": [right]},
        ("c", "x"): {"ours": "ValueError: no", "stock": [wrong]},
        ("d", "x"): {"ours": "ValueError: no", "stock": "ValueError: no"},
    }
    assert [fault.split(":")[0] for fault in exactness.faults(cells)] == ["a, x", "b, x", "c, x"]


def test_a_head_that_is_wrong_makes_the_script_fail(monkeypatch, capsys):
    monkeypatch.setattr(exactness, "WRONG", 1e-12)
    assert exactness.main(["--part", "float32", "--heads", "bert choices", "--layouts", "one_rank", "--seed", "1"]) == 1
    assert "bert choices, one_rank: Errors(gradient=" in capsys.readouterr().out
