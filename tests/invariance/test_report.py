"""The report of a check, as text and as JSON."""

import json
import math

import pytest

from hf_gradutils.invariance import InvarianceReport
from hf_gradutils.invariance._difference import Difference, compare_gradients
from hf_gradutils.invariance._report import Comparison

ROWS = (
    Comparison(name="a", loss=(1.0, 1.0), grad_norm=(2.0, 2.0), gradient_error=1e-7),
    Comparison(name="b", loss=(1.0, 4.0), gradient_error=3.0, problem="too large; halve it", worst=(("w", 3.0),)),
    Comparison(name="c", not_compared="no way to"),
)


def test_the_report_is_a_table_below_its_answer():
    report = InvarianceReport(ROWS, 1e-5, "2 samples", fix="use another")
    lines = str(report).splitlines()
    assert not report.passed
    assert lines[0] == report.answer == "WRONG: b: too large; halve it"
    assert lines[2] == "Invariance: 2 samples, tolerance 1e-05"
    assert lines[4].split() == ["a", "1", "1", "2", "2", "off", "by", "1.0e-07", "ok"]
    assert lines[5].endswith("WRONG")
    assert "WRONG: b: too large; halve it" in lines[6:]
    assert "  most wrong: w (3.0e+00)" in lines
    assert "not compared: c: no way to" in lines
    assert lines[-2:] == ["to train exactly: use another", "FAILED"]
    assert math.isnan(ROWS[2].gradient_error)


def test_an_answer_names_what_was_not_compared():
    rows = (ROWS[0], Comparison(name="this layout against one process", not_compared="no memory"))
    answer = InvarianceReport(rows, 1e-5, "2 samples", num_ranks=2).answer
    assert answer.endswith("up to 1e-07, but for this layout against one process, which is not compared")


def test_a_row_that_does_not_decide_is_a_second_statement():
    rows = (ROWS[0], Comparison(name="b", gradient_error=7.0, problem="8 times", summary="8 times", decides=False))
    report = InvarianceReport(rows, 1e-5, "8 samples", num_micro_batches=4, num_ranks=2)
    lines = str(report).splitlines()
    assert report.passed
    assert lines[0] == "EXACT: the gradient is that of one batch (4 micro-batches, 2 ranks), up to 1e-07"
    assert "at other accumulations: b: 8 times" in lines
    assert "WRONG" not in str(report)
    assert lines[-1] == "passed"
    control = InvarianceReport((rows[0], Comparison(name="b", problem="8 times", summary="8 times")), 1e-5, "8 samples")
    assert control.answer == "WRONG: 8 times"


def test_a_report_without_any_comparison_has_not_passed():
    copies, gradient = Comparison(name="copies"), Comparison(name="a", not_compared="the loss draws")
    report = InvarianceReport((copies, gradient), 1e-5, "2 samples")
    assert not report.passed
    assert str(report).splitlines()[-1] == report.verdict == "NOT COMPARED"
    assert report.answer == "NOT COMPARED: the loss draws"
    assert InvarianceReport((copies, gradient, Comparison(name="b", gradient_error=1e-7)), 1e-5, "").passed


def test_a_report_comes_back_from_json(tmp_path):
    infinite = Comparison(name="d", gradient_error=math.inf, factor=8.0, worst=(("v", math.inf),), decides=False)
    report = InvarianceReport((*ROWS, infinite), 1e-5, "2 samples", num_samples=2, num_ranks=2, fix="x", version="1")
    report.save(path := tmp_path / "report.json")
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values == report.to_dict()
    assert (values["verdict"], values["answer"]) == ("FAILED", report.answer)
    assert values["comparisons"][3]["gradient_error"] is None
    assert values["comparisons"][2]["loss"] == [None, None]
    back = InvarianceReport.from_dict(values | {"of a later version": 1})
    assert (str(back), back.to_dict()) == (str(report).replace("off by inf", " " * 10), values)
    assert back.comparisons[1] == ROWS[1] or repr(back.comparisons[1]) == repr(ROWS[1])
    values["comparisons"][1]["problem"] = ""
    assert InvarianceReport.from_dict(values).passed  # control: the rows are read


def _row(*pairs, **options):
    """Of gradients (wanted, got) of one element each."""
    differences = {str(i): Difference((b - a) ** 2, a * a, a * b) for i, (a, b) in enumerate(pairs)}
    numbers = {"loss": (1.0, 1.0), "grad_norm": (1.0, 1.0), "tolerance": 1e-5}
    return compare_gradients(
        "row", differences, **numbers, advice=lambda factor: f"advice {factor}", cause=lambda scale: "why", **options
    )


def test_a_multiple_is_told_from_other_errors():
    row = _row((1.0, 8.0), (2.0, 16.0))
    assert row.summary == "the gradient is 8.0 times what one batch would give: why"
    assert row.problem == "the gradient is 8 times what it should be; advice 8.0"
    assert row.factor == 8
    mean = _row((1.0, 1.1), (2.0, 1.9))
    assert mean.summary == "the gradient is off by 6.3%: why"
    assert mean.problem.endswith("; advice None")
    assert math.isnan(mean.factor)
    assert "about 8.0 times" in _row((1.0, 9.0), (2.0, 15.5)).summary
    assert "1 of 4 parameters" in _row((1.0, 2.0), *[(2.0, 2.0)] * 3).summary
    assert "nothing is trained" in _row((0.0, 0.0)).summary
    assert "inf or NaN" in _row((1.0, math.nan)).summary
