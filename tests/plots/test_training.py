"""The lines that are drawn of runs, and what the legend says about them."""

import math
import subprocess
import sys

import pytest

from hf_gradutils.plots import Run, plot_runs
from hf_gradutils.plots._training import draw_runs

pytest.importorskip("matplotlib")


def run_of(name, losses, *, norms=None, counted=False, every=1, limit=None, **more):
    log = []
    for index, loss in enumerate(losses):
        entry = {"step": (index + 1) * every, "loss": loss} | {key: values[index] for key, values in more.items()}
        entry |= {"grad_norm": norms[index]} if norms else {}
        log.append(entry | ({"num_targets": 10 * every} if counted else {}))
    return Run(name=name, log=log, max_grad_norm=limit)


def panels(*runs, **options):
    """Label of each panel → label of each line → (steps, values)."""
    return {
        axis.get_ylabel(): {
            line.get_label(): tuple(list(map(float, data)) for data in line.get_data()) for line in axis.get_lines()
        }
        for axis in draw_runs(runs, **options).axes
        if axis.get_ylabel()
    }


def marked(figure, label):
    """Positions that have a marker in the line of the first panel with this label."""
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == label)
    return [] if line.get_marker() == "None" else line.get_markevery()


def test_the_loss_of_a_stock_trainer_is_told_from_one_per_target():
    ours, stock = run_of("a", [1.0, 0.5], counted=True), run_of("b", [4.0, 2.0])
    assert panels(ours, stock)["loss as logged"] == {
        "a, training (per target)": ([1, 2], [1.0, 0.5]),
        "b, training (stock Trainer)": ([1, 2], [4.0, 2.0]),
    }
    assert list(panels(ours, run_of("c", [1.0], counted=True))["loss per target"]) == ["a, training", "c, training"]
    assert list(panels(stock)["loss as logged"]) == ["b, training"]


def test_ratios_of_norms_are_those_of_common_steps_to_the_run_that_counts_targets():
    stock = run_of("stock", [1.0] * 4, norms=[4.0, 8.0, 12.0, 16.0])
    ours = run_of("ours", [1.0] * 3, norms=[2.0, 5.0, 0.0], counted=True, every=2)
    drawn = panels(stock, ours)["ratio of norms"]
    assert drawn["stock ÷ ours"] == ([2, 4], [4.0, 3.2])
    assert "ratio of norms" not in panels(stock)
    odd = Run(name="odd", log=[{"step": 7, "loss": 1.0, "grad_norm": 1.0}], max_grad_norm=None)
    assert "ratio of norms" not in panels(ours, odd), "no common step"


def test_all_panels_have_the_steps_of_the_longest_run():
    short, long = run_of("a", [1.0, 1.0], norms=[1.0, 1.0]), run_of("b", [1.0] * 5, norms=[1.0] * 5, every=10)
    figure = draw_runs([short, long])
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert figure.axes[0].get_xlim()[1] >= 50


def test_points_without_a_neighbor_get_a_marker():
    figure = draw_runs([run_of("one", [3.0]), run_of("gaps", [1.0, math.nan, 2.0, None, 3.0, 4.0])])
    assert marked(figure, "one, training") == [0]
    assert marked(figure, "gaps, training") == [0, 2]
    assert marked(draw_runs([run_of("line", [1.0, 2.0])]), "line, training") == []


def test_a_log_that_begins_anew_has_a_gap_instead_of_a_line_back():
    entries = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 2, 3)]
    steps, values = panels(Run(name="a", log=entries, max_grad_norm=None))["loss as logged"]["a, training"]
    assert steps == [1, 2, 3, 2, 2, 3]
    assert [math.isnan(value) for value in values] == [False, False, False, True, False, False]


def test_norms_that_a_log_axis_cannot_show_are_left_out_without_a_warning(tmp_path):
    runs = [run_of("a", [1.0, 1.0, 1.0], norms=[0.0, math.inf, math.nan]), run_of("b", [1.0], norms=[None])]
    assert list(panels(*runs)["gradient norm"]) == ["a"]
    assert plot_runs(runs, tmp_path / "x.svg").read_text().startswith("<?xml")
    assert set(panels(run_of("c", [1.0]))) == {"loss as logged"}, "no norms, no panel of them"


def test_equal_clips_are_one_line_and_others_have_the_color_of_their_run():
    def clips(*limits, **options):
        runs = [run_of(str(index), [1.0], norms=[1.0], limit=limit) for index, limit in enumerate(limits)]
        lines = draw_runs(runs, **options).axes[1].get_lines()
        return {line.get_label(): line.get_color() for line in lines if "clip" in str(line.get_label())}

    assert clips(1.0, 1.0, None) == {"clipped to 1": "0.4"}
    assert clips(1.0, 0.5) == {"clipped to 1": "C0", "clipped to 0.5": "C1"}
    assert clips(1.0, 0.5, max_grad_norm=2.0) == {"clipped to 2": "0.4"}
    assert clips(None, 0.0) == {}


def test_runs_of_one_name_have_two_labels():
    assert list(panels(run_of("a", [1.0]), run_of("a", [2.0]))["loss as logged"]) == ["a, training", "a (2), training"]


def test_groups_are_drawn_at_their_steps():
    norms = {"grad_norm/x": [1.0, 10.0, None], "grad_norm/y": [0.1, 0.0, 1.0]}
    figure = draw_runs([run_of("a", [1.0] * 3, counted=True, every=10, **norms)])
    axis = next(axis for axis in figure.axes if axis.collections)
    (mesh,) = axis.collections
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x", "y"]
    assert mesh.get_array().filled(9.0).tolist() == [[0.0, 1.0, 9.0], [-1.0, 9.0, 0.0]]
    assert sorted({x for row in mesh.get_coordinates()[:, :, 0] for x in row.tolist()}) == [5, 15, 25, 35]


def test_skipped_steps_have_a_panel_if_there_are_any():
    assert "skipped steps" not in panels(run_of("a", [1.0, 1.0], skipped_steps=[0, 0]))
    drawn = panels(run_of("a", [1.0, 1.0], skipped_steps=[0, 2]))["skipped steps"]
    assert drawn == {"a": ([1, 2], [0, 2])}


@pytest.mark.slow
def test_a_programs_own_backend_and_figures_are_left_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from hf_gradutils.plots import Run, plot_runs\n"
        "run = Run(name='a', log=[{'step': 1, 'loss': 1.0, 'grad_norm': 1.0}], max_grad_norm=None)\n"
        "plot_runs([run], Path(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], check=True)
    assert (tmp_path / "x.png").stat().st_size > 1000
