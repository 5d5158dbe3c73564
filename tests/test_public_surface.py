"""What users have: import lines, names, loggers, variables and the command stay where they are."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers

import hf_gradutils
from hf_gradutils import GradUtilsTrainer, InvarianceReport
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.cli import main
from hf_gradutils.invariance._report import Comparison
from hf_gradutils.programs import answer
from hf_gradutils.programs.outcomes import Outcome
from tests.harness.ranks import run_ranks

ROOT = Path(__file__).parent.parent

TOP_LEVEL = [
    "FirstRankPerNode",
    "GradUtilsAccelerator",
    "GradUtilsPlugin",
    "GradUtilsSeq2SeqTrainer",
    "GradUtilsTrainer",
    "GradUtilsTrainerMixin",
    "InvarianceReport",
    "WholeBatchLoss",
    "barrier_and_log",
    "check_invariance",
    "check_loop_invariance",
    "check_trainers",
    "check_window_invariance",
    "clip_grad_by_total_norm_",
    "clip_gradients",
    "exact",
    "exact_trainers",
    "get_grad_norm",
    "get_sync_ctx",
    "reduce_loss",
    "rescale_gradients",
    "route_first_rank",
]

PLACES = {
    "hf_gradutils.dist_utils": [
        "FirstRankPerNode",
        "barrier_and_log",
        "clip_gradients",
        "get_sync_ctx",
        "logger",
        "reduce_loss",
        "rescale_gradients",
    ],
    "hf_gradutils.grad_utils": ["clip_grad_by_total_norm_", "get_grad_norm"],
    "hf_gradutils.errors": [
        "FirstRankError",
        "GradUtilsError",
        "InvalidArgumentError",
        "InvarianceError",
        "LauncherError",
        "LossUnitError",
        "NonfiniteGradientError",
        "ReplicaMismatchError",
        "TargetCountError",
    ],
    "hf_gradutils.trainer": ["GradUtilsSeq2SeqTrainer", "GradUtilsTrainer", "GradUtilsTrainerMixin", "exact"],
    "hf_gradutils.accelerator": ["GradUtilsAccelerator"],
    "hf_gradutils.invariance": ["check_invariance", "check_loop_invariance", "check_window_invariance"],
    "hf_gradutils.first_rank_upstream": ["route_first_rank"],
    "hf_gradutils.sync": ["SyncContext", "discard_deferred"],
    "hf_gradutils.window": ["AccumulationWindow", "WindowReport"],
    "hf_gradutils.plots": ["Run", "plot_files", "plot_report", "plot_runs", "read_run", "read_runs"],
    "hf_gradutils.cli": ["main"],
}
"""Modules that pages or recipes import from → the names they import."""

LOGGERS = {
    "hf_gradutils.channel",
    "hf_gradutils.dist_utils",
    "hf_gradutils.first_rank",
    "hf_gradutils.invariance",
    "hf_gradutils.accelerator",
    "hf_gradutils.loss_unit",
    "hf_gradutils.trainer",
    "hf_gradutils.nonfinite",
    "hf_gradutils.store",
    "hf_gradutils.sync_auto",
}

VARIABLES = {
    "HF_GRADUTILS_ACCUMULATE_IN_FLOAT32",
    "HF_GRADUTILS_CHECK_LOSS_UNIT",
    "HF_GRADUTILS_FOLD_INTO_OPTIMIZER",
    "HF_GRADUTILS_GRAD_NORM_GROUPS",
    "HF_GRADUTILS_LOSS_UNIT",
    "HF_GRADUTILS_MAX_SKIPPED_STEPS",
    "HF_GRADUTILS_NORM_TYPE",
    "HF_GRADUTILS_ON_NONFINITE",
    "HF_GRADUTILS_OWNERSHIP",
    "HF_GRADUTILS_SYNC",
}

FLAGS = {
    "check": {"--all", "--allow_loops", "--exact", "--json", "--num_samples", "--plot", "--timeout_s"},
    "run": {"--allow_loops"},
    "env": {"--timeout_s"},
    "plot": {"--max_grad_norm", "--out"},
}

LOGGED = {"num_targets", "grad_norm", "grad_norm/all", "skipped_steps"}
"""Keys of an entry of a Trainer's log, with a group called ``all`` and ``on_nonfinite="skip"``."""

OF_A_REPORT = {
    "accumulation",
    "answer",
    "comparisons",
    "fix",
    "format",
    "num_micro_batches",
    "num_ranks",
    "num_samples",
    "tolerance",
    "verdict",
    "version",
    "what",
}

OF_A_ROW = {
    "decides",
    "factor",
    "grad_norm",
    "gradient_error",
    "loss",
    "name",
    "not_compared",
    "problem",
    "summary",
    "worst",
}


def test_the_top_level_names_are_these():
    assert hf_gradutils.__all__ == TOP_LEVEL
    assert dir(hf_gradutils) == sorted([*TOP_LEVEL, "dist_utils", "errors", "grad_utils"])
    for name in TOP_LEVEL:
        assert getattr(hf_gradutils, name).__name__ == name


@pytest.mark.parametrize("place", PLACES)
def test_names_are_where_pages_and_recipes_import_them_from(place):
    module = importlib.import_module(place)
    for name in PLACES[place]:
        assert hasattr(module, name), f"{place}.{name}"
        assert getattr(hf_gradutils, name, getattr(module, name)) is getattr(module, name)


def test_every_import_line_of_the_pages_and_recipes_works():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.py")]
    pattern = re.compile(r"^\s*from (hf_gradutils[\w.]*) import (\([^)]*\)|[^\n(#]*)", re.MULTILINE)
    lines = {match.groups() for page in pages for match in pattern.finditer(page.read_text())}
    assert len(lines) > 10
    for module, names in lines:
        for name in names.strip("()\n ").split(","):
            if name.strip():
                assert hasattr(importlib.import_module(module), name.split(" as ")[0].strip()), (module, name)


@pytest.mark.slow
def test_the_documented_modules_are_attributes_of_the_package():
    code = "import hf_gradutils as h; h.dist_utils.clip_gradients, h.grad_utils.get_grad_norm, h.errors.GradUtilsError"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_loggers_keep_their_names():
    code = (
        "import importlib, json, logging, pkgutil, hf_gradutils as h\n"
        "for module in pkgutil.walk_packages(h.__path__, 'hf_gradutils.'):\n"
        "    importlib.import_module(module.name)\n"
        "loggers = logging.root.manager.loggerDict\n"
        "names = [n for n in loggers if n.startswith('hf_gradutils') and isinstance(loggers[n], logging.Logger)]\n"
        "print(json.dumps(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == LOGGERS


def test_the_variables_set_the_fields_of_the_plugin(monkeypatch):
    prefix = "HF_GRADUTILS_"
    own = {field.name for field in dataclasses.fields(GradUtilsPlugin)}
    assert {name.removeprefix(prefix).lower() for name in VARIABLES} < own
    texts = {"NORM_TYPE": "1", "OWNERSHIP": '{"experts.*": "sharded"}', "MAX_SKIPPED_STEPS": "3", "LOSS_UNIT": "rows"}
    texts |= {"ON_NONFINITE": "skip", "SYNC": "every", "GRAD_NORM_GROUPS": "layer", "ACCUMULATE_IN_FLOAT32": "true"}
    texts |= {"CHECK_LOSS_UNIT": "false", "FOLD_INTO_OPTIMIZER": "true"}
    assert {prefix + name for name in texts} == VARIABLES
    default = GradUtilsPlugin()
    for name, text in texts.items():
        monkeypatch.setenv(prefix + name, text)
        assert getattr(GradUtilsPlugin(), name.lower()) != getattr(default, name.lower()), name


@pytest.mark.slow
def test_the_command_is_called_hf_gradutils():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hf-gradutils": "hf_gradutils.cli:main"}
    done = subprocess.run(
        [Path(sys.executable).with_name("hf-gradutils"), "--help"], check=True, capture_output=True, text=True
    )
    assert "{check,run,env,plot}" in done.stdout


@pytest.mark.parametrize("command", FLAGS)
def test_commands_keep_their_flags(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    told = set(re.findall(r"^ +(?:-h, )?(--[a-z_]+)", capsys.readouterr().out, re.MULTILINE))
    assert told == FLAGS[command] | {"--help"}
    page = (ROOT / "docs" / "programs.md").read_text()
    assert command not in ("check", "run") or {flag for flag in FLAGS[command] if f"`{flag}" not in page} == set()


def test_exit_codes_of_a_check_are_those_of_the_page():
    assert (answer.EXACT, answer.WRONG, answer.UNKNOWN) == (0, 1, 2)
    assert "| 0 exact, 1 wrong, 2 if it could not compare:" in (ROOT / "docs" / "stability.md").read_text()
    assert main([]) == main(["run", "gone.py"]) == main(["check", "gone.py"]) == 2


def test_the_json_of_a_check_keeps_its_keys_and_the_page_has_them(tmp_path):
    row = Comparison(name="as you train", loss=(1.0, 1.0), grad_norm=(1.0, 2.0), gradient_error=1.0, problem="twice")
    report = InvarianceReport((row,), tolerance=1e-5, what="one row")
    outcome = Outcome(trainer="a.Trainer", rank=0, report=report.to_dict(), text=str(report))
    assert answer.show([outcome], json_file=tmp_path / "report.json", picture=None) == answer.WRONG
    written = json.loads((tmp_path / "report.json").read_text())
    assert set(written) == OF_A_REPORT | {"trainer"}
    assert set(written["comparisons"][0]) == OF_A_ROW
    assert {written["format"]} == {1}
    assert InvarianceReport.from_dict(written) == report
    page = (ROOT / "docs" / "invariance.md").read_text()
    assert [key for key in OF_A_REPORT | OF_A_ROW | {"trainer"} if f"`{key}`" not in page] == []


@pytest.mark.slow
def test_the_log_of_a_trainer_keeps_its_keys():
    ((stock, _), (ours, of_the_step)) = run_ranks(_logged, 1, init=False)[0]
    assert ours - stock == LOGGED - {"grad_norm"}
    assert stock <= ours
    assert of_the_step >= LOGGED | {"loss", "learning_rate", "epoch", "step"}
    page = (ROOT / "docs" / "stability.md").read_text()
    assert [key for key in LOGGED if f"`{key.replace('/all', '/<group>')}`" not in page] == []


def _logged():
    """Keys of all entries and of the first one, of the stock Trainer and of ours."""
    from tests.harness.trainer_cases import make_data, train

    plugin = GradUtilsPlugin(grad_norm_groups={"all": "*"}, on_nonfinite="skip")
    of_both = []
    for trainer_class, options in ((transformers.Trainer, {}), (GradUtilsTrainer, {"grad_plugin": plugin})):
        data = make_data("bert classes", 8)
        trainer, _ = train("bert classes", 2, trainer_class=trainer_class, data=data, taps=False, **options)
        log = trainer.state.log_history
        of_both.append(({key for entry in log for key in entry}, set(log[0])))
    return of_both


IMPORTS = {
    "FirstRankPerNode": {"torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "accelerate", "transformers"},
    "barrier_and_log": {"torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "accelerate", "transformers"},
    "clip_gradients": {"accelerate", "transformers", "datasets"},
    "get_grad_norm": {"accelerate", "transformers", "datasets"},
    "get_sync_ctx": {"accelerate", "transformers", "datasets"},
    "GradUtilsPlugin": {"trl", "peft", "matplotlib"},
    "GradUtilsTrainer": {"trl", "matplotlib"},
    "route_first_rank": {"trl", "matplotlib", "hf_gradutils.trainer"},
    "exact": {"trl", "matplotlib", "hf_gradutils.programs"},
}
"""Name → modules that its import must not load."""


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTS)
def test_a_name_loads_what_it_needs_and_no_more(name):
    code = f"import json, sys; from hf_gradutils import {name}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert IMPORTS[name] & set(json.loads(done.stdout.splitlines()[-1])) == set()
