"""The report of a check, as text."""

import math

from hf_gradutils.invariance import InvarianceReport
from hf_gradutils.invariance._report import Comparison


def test_the_report_is_a_table():
    rows = (
        Comparison(name="a", loss=(1.0, 1.0), grad_norm=(2.0, 2.0), gradient_error=1e-7),
        Comparison(name="b", loss=(1.0, 4.0), gradient_error=3.0, problem="too large; halve it", worst=(("w", 3.0),)),
        Comparison(name="c", not_compared="no way to"),
    )
    report = InvarianceReport(rows, 1e-5, "2 samples")
    lines = str(report).splitlines()
    assert not report.passed
    assert lines[0] == "Invariance: 2 samples, tolerance 1e-05"
    assert lines[2].split() == ["a", "1", "1", "2", "2", "off", "by", "1.0e-07", "ok"]
    assert lines[3].endswith("WRONG")
    assert "WRONG: b: too large; halve it" in lines
    assert "  most wrong: w (3.0e+00)" in lines
    assert "not compared: c: no way to" in lines
    assert lines[-1] == "FAILED"
    assert math.isnan(rows[2].gradient_error)


def test_a_report_without_any_comparison_has_not_passed():
    copies, gradient = Comparison(name="copies"), Comparison(name="a", not_compared="the loss draws")
    report = InvarianceReport((copies, gradient), 1e-5, "2 samples")
    assert not report.passed
    assert str(report).splitlines()[-1] == report.verdict == "NOT COMPARED"
    assert InvarianceReport((copies, gradient, Comparison(name="b", gradient_error=1e-7)), 1e-5, "").passed
