"""Runs of the stock Trainer and of ours, as they leave them."""

import transformers

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.plots import read_runs
from hf_gradutils.plots._training import draw_runs
from tests.harness.ranks import run_ranks
from tests.harness.trainer_cases import make_data, train

HEAD, STEPS = "bert classes", 3


def test_a_stock_run_beside_ours_is_told_apart_and_its_norm_is_a_multiple(tmp_path):
    run_ranks(_train, 1, tmp_path, init=False)
    runs = read_runs([tmp_path / "stock" / "out", f"exact={tmp_path / 'ours' / 'out'}"])
    assert [(run.name, run.counts_targets) for run in runs] == [("out", False), ("exact", True)]
    assert [run.max_grad_norm for run in runs] == [0.5, 0.5]
    loss, norm, ratio, targets = draw_runs(runs).axes
    (first, *_), (second, *_) = (line.get_ydata() for line in loss.get_lines())
    assert [line.get_label() for line in loss.get_lines()] == [
        "out, training (stock Trainer)",
        "exact, training (per target)",
    ]
    assert abs(first / second - 4) < 1e-3, "the control: this head ignores the count"
    assert [line.get_label() for line in norm.get_lines()] == ["out", "exact", "clipped to 0.5"]
    (drawn,) = [line for line in ratio.get_lines() if line.get_label() == "out ÷ exact"]
    assert drawn.get_xdata().tolist() == [1, 2, 3]
    assert all(abs(value - 4) < 1e-3 for value in drawn.get_ydata())
    assert [line.get_ydata().tolist() for line in targets.get_lines()] == [[16] * STEPS]


def _train(folder):
    for name, trainer_class in (("stock", transformers.Trainer), ("ours", GradUtilsTrainer)):
        arguments = {"output_dir": str(folder / name / "out"), "max_steps": STEPS, "learning_rate": 0.0}
        arguments |= {"save_strategy": "steps", "save_steps": STEPS, "max_grad_norm": 0.5}
        trainer, _ = train(
            HEAD, 4, trainer_class=trainer_class, data=make_data(HEAD, 16), arguments=arguments, taps=False
        )
        trainer.save_state()
