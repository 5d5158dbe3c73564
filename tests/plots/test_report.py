"""Errors, tolerance, answer and reasons in the picture of a report."""

import math
from types import SimpleNamespace

import pytest

from hf_gradutils.invariance import InvarianceReport
from hf_gradutils.invariance._report import Comparison
from hf_gradutils.plots import plot_report
from hf_gradutils.plots._report import draw_report

pytest.importorskip("matplotlib")

FOUR_TIMES = "the gradient is 4 times what it should be; this head ignores the count"


def report_of(*rows, tolerance=1e-4):
    return InvarianceReport(rows, tolerance, "ddp2, 16 samples, float32")


def drawn(figure):
    """Name of each row → (position, marker, color, filled, words)."""
    (axis,) = figure.axes
    markers = [line for line in axis.get_lines() if line.get_label() != "tolerance"]
    words = [text.get_text() for text in axis.texts if text.get_text() != "tolerance"]
    names = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    return {
        name: (float(line.get_xdata()[0]), line.get_marker(), line.get_color(), line.get_fillstyle() == "full", text)
        for name, line, text in zip(names, markers, words, strict=True)
    }


def test_errors_stand_at_their_place_beside_the_tolerance_and_wrong_ones_differ_without_color():
    right = Comparison(name="replicas", gradient_error=2e-7)
    wrong = Comparison(name="micro-batches", gradient_error=3.0, problem=FOUR_TIMES)
    figure = draw_report(report_of(right, wrong))
    rows = drawn(figure)
    assert rows["replicas"][:2] + rows["replicas"][4:] == (2e-7, "o", "2.0e-07 ok")
    assert rows["micro-batches"][:2] + rows["micro-batches"][4:] == (3.0, "X", "3.0e+00 WRONG")
    assert rows["replicas"][2] != rows["micro-batches"][2]
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    (tolerance,) = [line for line in axis.get_lines() if line.get_label() == "tolerance"]
    assert list(tolerance.get_xdata()) == [1e-4, 1e-4]
    assert 2e-7 < tolerance.get_xdata()[0] < 3.0
    stems = [path.vertices[:, 0].tolist() for lines in axis.collections for path in lines.get_paths()]
    assert [stem[1] for stem in stems] == [2e-7, 3.0]


@pytest.mark.parametrize("error", [0.0, math.inf, math.nan])
def test_errors_that_a_log_axis_cannot_show_stand_at_its_edges(error, tmp_path):
    problem = "" if error == 0.0 else "the gradient is inf or NaN on these samples"
    report = report_of(Comparison(name="odd", gradient_error=error, problem=problem))
    figure = draw_report(report)
    low, high = figure.axes[0].get_xlim()
    position, marker, _, _, words = drawn(figure)["odd"]
    assert position == (low if error == 0.0 else high)
    assert (marker, words) == {"0.0": ("o", "0 ok"), "inf": ("X", "inf WRONG"), "nan": ("X", "NaN WRONG")}[str(error)]
    path = plot_report(report, tmp_path / "new" / "x")
    assert path == tmp_path / "new" / "x.png"
    assert 5_000 < path.stat().st_size < 60_000


def test_a_wrong_loss_beside_a_right_gradient_is_wrong_and_says_so():
    row = Comparison(name="loss", gradient_error=1e-7, problem="the gradient is right, but the loss is off by 1e-1; x")
    assert drawn(draw_report(report_of(row)))["loss"][4] == "1.0e-07 WRONG, the loss"


def test_a_row_that_does_not_decide_is_open():
    other = SimpleNamespace(name="single rows", gradient_error=7.0, problem=FOUR_TIMES, not_compared="", decides=False)
    report = SimpleNamespace(comparisons=[other], tolerance=1e-4, what="one rank", verdict="passed", answer="EXACT")
    *_, filled, words = drawn(draw_report(report))["single rows"]
    assert (filled, words) == (False, "7.0e+00, not as you train")
    assert drawn(draw_report(report_of(Comparison(name="a", gradient_error=1.0))))["a"][3]


def test_the_title_is_the_answer():
    answer = "EXACT: the gradient is that of one batch"
    report = SimpleNamespace(comparisons=(), tolerance=1e-4, what="one rank", verdict="passed", answer=answer)
    assert draw_report(report).get_suptitle() == answer
    wrong = report_of(Comparison(name="micro-batches", gradient_error=3.0, problem=FOUR_TIMES))
    assert "4 times" in draw_report(wrong).get_suptitle().replace("\n", " ")


def test_rows_that_were_not_compared_are_named_with_their_reason_and_have_no_marker():
    report = report_of(
        Comparison(name="fine", gradient_error=1e-7), Comparison(name="left out", not_compared="draws numbers")
    )
    figure = draw_report(report)
    assert list(drawn(figure)) == ["fine"]
    copies = draw_report(report_of(Comparison(name="fine", gradient_error=1e-7), Comparison(name="copies")))
    assert copies.get_supxlabel().splitlines()[1:] == ["ok, without a gradient to compare: copies"]
    assert figure.get_supxlabel().splitlines() == [
        "ddp2, 16 samples, float32, tolerance 1e-04",
        "not compared: left out: draws numbers",
    ]
    nothing = draw_report(report_of(Comparison(name="left out", not_compared="draws numbers")))
    assert "no gradient was compared" in [text.get_text() for text in nothing.axes[0].texts]


def test_names_and_reasons_of_any_length_stay_inside_the_picture():
    rows = [Comparison(name="a long name " * 8, gradient_error=10.0**-k, problem="") for k in range(3, 9)]
    rows.append(Comparison(name="x " * 50, not_compared="because " * 90))
    figure = draw_report(report_of(*rows))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in [*axis.get_yticklabels(), *axis.texts, *figure.texts]]
    assert len(boxes) == 6 + 7 + 2
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert axis.get_window_extent().width > width / 3
