"""Plots of training runs, from the ``trainer_state.json`` that a Trainer writes, and of reports of invariance."""

from hf_gradutils.plots._files import plot_files
from hf_gradutils.plots._picture import check_can_draw
from hf_gradutils.plots._report import plot_report
from hf_gradutils.plots._runs import Run, read_run, read_runs
from hf_gradutils.plots._training import plot_runs

__all__ = ["Run", "check_can_draw", "plot_files", "plot_report", "plot_runs", "read_run", "read_runs"]
