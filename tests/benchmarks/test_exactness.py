"""The script behind ``make matrix``, on a small part of it. The bounds of half precision: test_half_precision.py."""

import pytest

from benchmarks import page
from benchmarks.exactness import deepspeed, deepspeed_tables, float32, half_bounds
from benchmarks.exactness.__main__ import main
from benchmarks.exactness.float32 import Errors
from tests.harness.heads import HEADS
from tests.harness.recipe_cases import skip_without_deepspeed
from tests.harness.trainer_cases import IS_OLD


@pytest.mark.skipif(IS_OLD, reason="transformers 5.17 has no expert parallelism")
@pytest.mark.slow
def test_a_part_of_the_matrix_has_no_fault_of_ours_and_shows_those_of_stock(tmp_path, capsys):
    out = tmp_path / "exactness.md"
    part = ["--part", "float32", "--heads", "bert choices,mixtral", "--layouts", "one_rank,ep2_fsdp2x2"]
    assert main([*part, "--out", str(out)]) == 0
    assert "0 faults" in capsys.readouterr().out
    text = out.read_text()
    assert text.partition("## In half precision")[2].count(page.NOT_MEASURED) == 6, "its parts, and DeepSpeed's"
    (choices,) = (line for line in text.splitlines() if line.startswith("| bert choices | "))
    cells = [cell.strip() for cell in choices.strip("|").split("|")]
    assert [cell.startswith("**") for cell in cells[1:]] == [False] * 4 + [True] * 2, "stock at accumulation 4 and 8"
    assert "- bert choices: ValueError: `ep_size=2` was requested, but `BertForMultipleChoice` has no `ep_plan`" in text


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2", "tp2"])
def test_a_part_of_it_in_half_precision_too(tmp_path, capsys, layout):
    out = tmp_path / "exactness.md"
    page.publish(out, {"float32": {"measured": {"seed": 17}, "layouts": {}}}, lambda data: "")
    heads = {"ddp2": "bert classes", "fsdp2x2": "bert classes,plain module", "tp2": "llama causal"}[layout]
    assert main(["--part", "half", "--heads", heads, "--layouts", layout, "--out", str(out)]) == 0
    assert "0 faults" in capsys.readouterr().out
    text = out.read_text()
    assert "seed 17." in text.partition("## In half precision")[0], "the other part stays"
    for precision in half_bounds.PRECISIONS:
        lines = text.partition(f"{precision}, <code>{layout}</code>")[2].partition("</details>")[0].splitlines()
        (row,) = (line for line in lines if line.startswith(f"| {heads.split(',')[0]} | "))
        ours, stock = (row.split(" | ")[start : start + 4] for start in (1, 5))
        assert not any(cell.startswith("**") or "crashes" in cell for cell in ours), row
        if "bert" in heads:
            assert all(cell.startswith("**") for cell in stock), "twice and eight times too long"


def test_a_layout_in_which_nothing_runs_is_a_fault():
    crash = {"ours": "ValueError: no", "stock": "ValueError: no"}
    assert float32.unmeasured({("a", "x"): crash}, ["x"]) == ["x: neither trainer ran, with any head"]
    assert half_bounds.unmeasured(
        {("a", "x", "bf16"): crash, ("a", "x", "fp16"): {"ours": {}, "stock": {}}}, ["x"]
    ) == ["x, bf16: neither trainer ran, with any head"]


def test_a_wrong_cell_or_a_crash_of_ours_is_a_fault():
    right, wrong, nothing = Errors(1e-7, 1e-7, 1e-7), Errors(1e-7, 1e-7, 2e-5), Errors(float("nan"), 0.0, 0.0)
    cells = {
        ("a", "x"): {"ours": [right, wrong], "stock": [wrong, wrong]},
        ("b", "x"): {"ours": [nothing], "stock": [right]},
        ("c", "x"): {"ours": "ValueError: no", "stock": [wrong]},
        ("d", "x"): {"ours": "ValueError: no", "stock": "ValueError: no"},
    }
    assert [fault.split(":")[0] for fault in float32.faults(cells)] == ["a, x", "b, x", "c, x"]
    found = float32.record(cells)["x"]
    assert found["neither"] == {"d": "ValueError: no"}
    assert found["heads"]["c"] == {"ours": "ValueError: no", "stock": [1e-7]}
    assert found["largest"]["loss"] == 2e-5


@pytest.mark.slow
def test_a_head_that_is_wrong_makes_the_script_fail(monkeypatch, capsys):
    monkeypatch.setattr(float32, "WRONG", 1e-12)
    assert main(["--part", "float32", "--heads", "bert choices", "--layouts", "one_rank", "--seed", "1"]) == 1
    assert "bert choices, one_rank: Errors(gradient=" in capsys.readouterr().out


# ---- DeepSpeed ----


@pytest.mark.slow
def test_stages_of_zero_have_no_fault_of_ours_and_show_those_of_stock():
    skip_without_deepspeed()
    cells = deepspeed.measure_stages("bert choices", 2, ("0", "3"), seed=3)
    half = deepspeed.measure_stages("bert choices", 2, ("bf16, 2",), seed=3)
    assert deepspeed.faults(cells, half) == []
    found = deepspeed.record(cells)["2"]
    for stage, missing in (("0", 3), ("3", 0)):
        assert found[stage]["heads"]["bert choices"]["stock"]["scale"] == pytest.approx([2, 8, 16], rel=1e-3)
        assert found[stage]["stock wrong"] == {"gradient": 3, "norm": 3 - missing, "loss": 3, "missing norm": missing}


def test_a_wrong_cell_under_deepspeed_is_a_fault():
    right, wrong = deepspeed.Errors(1e-7, 1e-7, 1e-7, 1.0), deepspeed.Errors(1e-7, 2e-5, 1e-7, 1.0)
    no_norm, nothing = deepspeed.Errors(1e-7, None, 1e-7, 1.0), deepspeed.Errors(1e-7, 1e-7, float("nan"), 1.0)
    wide = {
        (head, "3", 2): {"ours": ours, "stock": [wrong]}
        for head, ours in {"a": [right], "b": [wrong], "c": [no_norm], "d": [nothing], "e": "ValueError: no"}.items()
    }
    assert [fault.split(",")[0] for fault in deepspeed.faults(wide, {})] == ["b", "c", "d", "e"]
    near, far, long = (
        deepspeed.Errors(*e) for e in ((1e-2, 1e-3, 1e-3, 1.0), (3e-2, 1e-3, 1e-3, 1.0), (1e-2, 0.05, 1e-3, 1.05))
    )
    alone = [deepspeed.Errors(1e-2, None, 0.0, 1.0)]
    half = {
        (head, "bf16, 1", 2): {"ours": [ours], "stock": [near], "one process": alone}
        for head, ours in {"a": near, "b": far, "c": long}.items()
    }
    assert [fault.split(",")[0] for fault in deepspeed.faults({}, half)] == ["b", "c"]


def test_each_head_has_one_class_in_the_tables():
    assert sorted(head for heads in deepspeed_tables.CLASSES.values() for head in heads) == sorted(HEADS)
