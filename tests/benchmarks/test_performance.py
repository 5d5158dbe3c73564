"""The script behind ``make bench``, on a small part of it."""

from dataclasses import replace

import pytest

from benchmarks.performance import judge, step, window
from benchmarks.performance.__main__ import main
from benchmarks.performance.methods import FOLDED, OURS, TORCH
from benchmarks.performance.render import render
from benchmarks.performance.step import StepCounts, StepTimes
from benchmarks.performance.window import Cost


def test_a_part_of_the_bench_has_no_fault_and_shows_what_others_do(tmp_path, capsys):
    out = tmp_path / "performance.md"
    options = ["--layouts", "two_meshes2x2", "--sizes", "30", "--repeats", "2", "--no-trainer", "--out", str(out)]
    assert main(options) == 0
    assert "0 faults" in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.read_text().splitlines()]
    counted = {row[1]: row[2:] for row in rows if row[0] == "`two_meshes2x2`" and len(row) == 6 and row[1] != "30"}
    assert counted["ours"] == ["1", "0", "20", "2 / 1"]
    assert counted["ours, folded"][-1] == "1 / 0"
    assert counted["torch"] == ["raises"] * 4
    assert counted["Trainer"][0] == "2", "one collective for each mesh"


TIMES = (1e-3, 2e-3, 1e-3)
GOOD = Cost(
    calls=20, collectives=1, syncs=0, reads=2.0, writes=1.0, norm_error=1e-9, first_s=0.0, cpu_s=TIMES, thread_s=TIMES
)
GOOD_FOLDED = replace(GOOD, calls=18, reads=1.0, writes=0.0)


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ({"collectives": 2}, "expected 1 collectives, got 2"),
        ({"syncs": 1}, "expected no host sync, got 1"),
        ({"calls": 21}, "expected at most 20 calls, got 21"),
        ({"reads": 3.0}, "expected 2 reads and 1 writes, got 3 / 1"),
        ({"writes": 2.0}, "expected 2 reads and 1 writes, got 2 / 2"),
        ({"norm_error": float("nan")}, "the norm is off by nan"),
    ],
)
def test_a_count_above_what_is_promised_is_a_fault(worse, said):
    cells = {("fsdp2x2", 300): {OURS: GOOD, FOLDED: GOOD_FOLDED, TORCH: replace(GOOD, **worse)}}
    assert judge.window_faults(cells) == [], "what others do is none"
    cells["fsdp2x2", 300][OURS] = replace(GOOD, **worse)
    assert judge.window_faults(cells) == [f"ours, fsdp2x2, 300 parameters: {said}"]


def test_others_that_were_measured_at_some_sizes_only_are_on_the_page():
    ours = {OURS: GOOD, FOLDED: GOOD_FOLDED}
    both = window.record(ours | {TORCH: replace(GOOD, calls=321)})
    text = render({"windows": {"hsdp2x2": {"300": both, "3000": window.record(ours)}}})
    assert "| `hsdp2x2` | torch | 1 | 0 | 321 | 2 / 1 |" in text
    assert "| `hsdp2x2` | 300 | torch | 1000 µs | 1.00 / **1.00** / 1.00 | 1.00 / **1.00** / 1.00 | 0 s |" in text


def test_a_method_of_ours_that_raises_is_a_fault():
    cells = {("fsdp2x2", 300): {OURS: "raises RuntimeError: no", FOLDED: GOOD_FOLDED}}
    assert judge.window_faults(cells) == ["ours, fsdp2x2, 300 parameters: raises RuntimeError: no"]


def test_a_promise_that_is_not_kept_makes_the_script_fail(monkeypatch, capsys):
    monkeypatch.setattr(judge, "MOST_CALLS", 5)
    assert main(["--layouts", "one_rank", "--sizes", "30", "--repeats", "1", "--no-trainer"]) == 1
    assert "ours, one_rank, 30 parameters: expected at most 5 calls, got 20" in capsys.readouterr().out


def test_targets_are_judged_by_the_median_of_the_repeats():
    slow = replace(GOOD, cpu_s=(9e-3, 2e-3, 2e-3), thread_s=(9e-3, 4e-3, 1e-3))  # 9, 1 and 2 times ours; 9, 2 and 1
    costs = window.record({OURS: GOOD, FOLDED: GOOD_FOLDED, TORCH: slow})
    rows = judge.window_targets({"fsdp2x2": {"300": costs}})
    assert rows[0] == ("`fsdp2x2`, 300 parameters: torch takes ≥ 2 × ours", "2.00", "2.00", "1 / 1", "met")
    assert rows[1][1:] == ("not measured", "", "", "")


def test_the_page_says_which_targets_are_met():
    costs = {"300": window.record({OURS: GOOD, FOLDED: GOOD_FOLDED, TORCH: GOOD})}
    ours, stock = StepTimes((1.0, 2.0, 3.0), (1.0,) * 3), StepTimes((2.0, 2.0, 2.0), (1.0,) * 3)
    times = {"1": {"ours": ours, "stock": stock}, "8": {"ours": stock, "stock": StepTimes((1.0,) * 3, (1.0,) * 3)}}
    steps = {"one_rank": {"counts": {}, "times": {name: step.record(both) for name, both in times.items()}}}
    text = render({"windows": {"fsdp2x2": costs, "hsdp2x2": costs}, "steps": steps})
    assert "Judged by the median: 1 met, 3 not met, 6 not measured. " in text
    wanted = "a step takes ≤ 1 × the stock Trainer's"
    assert f"| `one_rank`, accumulation 1: {wanted} | 1.00 |  |  | met |" in text
    assert f"| `one_rank`, accumulation 8: {wanted} | 2.00 |  |  | **not met** |" in text
    assert "| `hsdp2x2`, 300 parameters: torch takes ≥ 4 × ours | 1.00 | 1.00 | 1 / 1 | **not met** |" in text


def test_a_step_of_the_trainer_that_costs_more_than_promised_is_a_fault():
    stock = StepCounts(
        look_ahead=8,
        live_batch_bytes=900,
        syncs_per_micro_batch=2.0,
        syncs_per_step=0.0,
        collectives={1: {"all_reduce": 1, "all_gather": 1}, 8: {"all_reduce": 1, "all_gather": 1}},
    )
    good = replace(stock, look_ahead=1, syncs_per_micro_batch=0.0, collectives={1: {"all_reduce": 2}, 8: {}})
    assert judge.step_faults({"ddp2": {"ours": good, "stock": stock}}) == []
    for worse in (
        {"look_ahead": 2},
        {"syncs_per_micro_batch": 1.0},
        {"syncs_per_step": 1.0},
        {"collectives": {8: {"all_reduce": 3}}},
    ):
        ours = replace(good, **worse)
        assert len(judge.step_faults({"ddp2": {"ours": ours, "stock": stock}})) == 1, worse
