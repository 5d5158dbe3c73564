"""hf-gradutils plot, of runs with labels and of a report."""

import json
import math

import pytest

from hf_gradutils.cli import main
from hf_gradutils.invariance import InvarianceReport
from hf_gradutils.invariance._report import Comparison
from tests.plots.test_runs import write_state

pytest.importorskip("matplotlib")

REPORT = InvarianceReport(
    (
        Comparison(name="micro-batches", gradient_error=3.0, problem="the gradient is 4 times what it should be"),
        Comparison(name="rows", gradient_error=math.inf, problem="the gradient is inf or NaN on these samples"),
        Comparison(name="loss", not_compared="it draws random numbers"),
    ),
    1e-4,
    "ddp2, 16 samples",
)


def test_labelled_runs_are_drawn_into_the_first_folder(tmp_path, capsys):
    stock, ours = write_state(tmp_path / "a" / "out"), write_state(tmp_path / "b" / "out")
    assert main(["plot", f"stock={stock}", f"ours={ours}"]) == 0
    assert f"wrote {stock / 'training.png'}" in capsys.readouterr().out
    assert main(["plot", str(ours / "trainer_state.json"), "--out", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_a_report_is_drawn_beside_its_file(tmp_path, capsys):
    path = tmp_path / "report.json"
    REPORT.save(path)
    assert main(["plot", str(path)]) == 0
    assert f"wrote {tmp_path / 'report.png'}" in capsys.readouterr().out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(path), "--out", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").exists()


@pytest.mark.parametrize("content", [{"comparisons": [1]}, {"comparisons": 1, "tolerance": 1}, {"comparisons": []}])
def test_a_file_that_is_no_report_is_an_error_of_one_line(content, tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    assert main(["plot", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is not a report of a check" in line


def test_a_report_is_not_drawn_with_runs(tmp_path, capsys):
    path = tmp_path / "report.json"
    REPORT.save(path)
    assert main(["plot", str(path), str(write_state(tmp_path / "out"))]) == 2
    assert "is a report of a check; give one report, or only runs" in capsys.readouterr().err
