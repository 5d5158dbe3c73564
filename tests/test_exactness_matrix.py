"""The script behind ``make matrix``, on a small part of it."""

import exactness
import pytest
from trainer_cases import IS_OLD


@pytest.mark.skipif(IS_OLD, reason="transformers 5.17 has no expert parallelism")
def test_a_part_of_the_matrix_has_no_fault_of_ours_and_shows_those_of_stock(tmp_path, capsys):
    out = tmp_path / "exactness.md"
    assert (
        exactness.main(["--heads", "bert choices,mixtral", "--layouts", "1 rank,ep2 x fsdp2", "--out", str(out)]) == 0
    )
    assert "0 faults" in capsys.readouterr().out
    page = out.read_text()
    (choices,) = (line for line in page.splitlines() if line.startswith("| bert choices | ") and "n/a" not in line)
    cells = [cell.strip() for cell in choices.strip("|").split("|")]
    assert [cell.startswith("**") for cell in cells[1:]] == [False] * 4 + [True] * 2, "stock at accumulation 4 and 8"
    assert "| bert choices | n/a (1) | n/a (1) |" in page
    assert "(1) ValueError: `ep_size=2` was requested, but `BertForMultipleChoice` has no `ep_plan`" in page


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
    assert exactness.main(["--heads", "bert choices", "--layouts", "1 rank", "--seed", "1"]) == 1
    assert "bert choices, 1 rank: Errors(gradient=" in capsys.readouterr().out
