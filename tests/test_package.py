"""What users were promised to be able to import and call, and that a wheel carries it."""

import inspect
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_gradutils
from hf_gradutils import dist_utils, grad_utils

ROOT = Path(__file__).parent.parent


def parameters(function):
    return {
        name: None if p.default is inspect.Parameter.empty else p.default
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is not inspect.Parameter.KEYWORD_ONLY
    }


def test_the_documented_names_are_callable_as_documented():
    import torch

    assert isinstance(dist_utils.logger, logging.Logger)
    assert parameters(dist_utils.barrier_and_log) == {"string": None}
    assert list(parameters(dist_utils.reduce_loss).items()) == [
        ("loss_store", None),
        ("total_num_tokens", None),
        ("per_token_loss", True),
        ("dp_group", None),
    ]
    assert list(parameters(dist_utils.get_sync_ctx)) == ["model", "is_optim_step"]
    assert list(parameters(dist_utils.rescale_gradients)) == ["model", "num_tokens_for_grad_scaling", "dp_group"]
    assert list(parameters(dist_utils.clip_gradients).items()) == [
        ("model", None),
        ("clip_norm", None),
        ("foreach", True),
    ]
    assert list(parameters(grad_utils.clip_grad_by_total_norm_).items()) == [
        ("parameters", None),
        ("max_grad_norm", None),
        ("total_norm", None),
        ("dtype", torch.float32),
    ]
    assert list(parameters(grad_utils.get_grad_norm).items()) == [
        ("parameters", None),
        ("dp_cp_group", None),
        ("tp_group", None),
        ("norm_type", 2),
        ("dtype", torch.float32),
    ]
    first = dist_utils.FirstRankPerNode
    assert list(parameters(first)) == []
    assert list(inspect.signature(first.__exit__).parameters) == ["self", "exc_type", "exc_val", "exc_tb"]
    assert callable(first()._try_bootstrap_pg)


def test_everything_promised_is_exported_at_the_top():
    for name in hf_gradutils.__all__:
        assert getattr(hf_gradutils, name) is not None
    for module in (dist_utils, grad_utils):
        for name in ("FirstRankPerNode", "clip_gradients", "get_grad_norm", "clip_grad_by_total_norm_"):
            if hasattr(module, name):
                assert getattr(hf_gradutils, name) is getattr(module, name)


def test_the_utilities_do_not_import_transformers():
    code = "import sys, hf_gradutils; assert not {'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_wheel_carries_the_package_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", str(tmp_path), str(ROOT)]
    env = {name: value for name, value in os.environ.items() if name != "RES_OPTIONS"}  # the build downloads its tools
    subprocess.run(build, check=True, capture_output=True, env=env)
    (wheel,) = tmp_path.glob("hf_gradutils-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_gradutils").rglob("*.py")}
    assert modules | {"hf_gradutils/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_gradutils"}
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(target)], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import hf_gradutils as h; print(h.__file__, h.__version__)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert str(target) in out
