"""The launch configurations: accelerate reads them, and what the CPU can run of them trains two steps."""

import json
import os
import shutil
from unittest import mock

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.harness.ranks import RankFailure
from tests.harness.recipe_cases import (
    CPU_OF_DEEPSPEED,
    ROOT,
    SMALL,
    launch,
    run_in_ranks,
    skip_without_deepspeed,
    skip_without_trl,
    steps_of,
)
from tests.harness.trainer_cases import IS_OLD

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "configs" / "accelerate"
ARGUMENTS = ["configs/causal_lm.yaml", *SMALL, "--max_steps", "2", "--save_strategy", "no"]

EXPECTED = {
    "cpu": (1, 1, {}),
    "cpu_2_ranks": (2, 1, {}),
    "gpu_1": (1, 1, {}),
    "ddp_8": (8, 1, {}),
    "two_nodes": (16, 2, {}),
    "fsdp2_8": (8, 1, {}),
    "hsdp_2x8": (16, 2, {"dp_replicate": 2, "dp_shard": 8}),
    "tp2_fsdp2_4": (8, 1, {"tp": 2, "dp_shard": 4}),
    "cp2_fsdp2_4": (8, 1, {"cp": 2, "dp_shard": 4}),
    "deepspeed_zero2_8": (8, 1, {}),
    "deepspeed_zero3_8": (8, 1, {}),
}
"""Name → ranks, nodes and the sizes of the axes."""


def told(name):
    """What ``accelerate launch`` makes of a configuration: its arguments, and what it tells the ranks."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "recipe.py"])
    args, _, _ = _validate_launch_command(args)
    env = prepare_multi_gpu_env(args) if args.multi_gpu or args.use_fsdp else {}
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, env = prepare_deepspeed_cmd_env(args)
    return args, {k: v for k, v in env.items() if k.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))}


def test_every_configuration_is_known_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name):
    num_ranks, num_nodes, sizes = EXPECTED[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    args, env = told(name)
    assert (config.num_processes, config.num_machines) == (num_ranks, num_nodes)
    assert (args.num_processes, args.num_machines) == (num_ranks, num_nodes)
    assert (args.multi_gpu or args.use_fsdp or args.use_deepspeed) == (num_ranks > 1)
    if name in ("fsdp2_8", "hsdp_2x8", "cp2_fsdp2_4"):
        assert env["ACCELERATE_USE_FSDP"] == "true"
        assert env["FSDP_VERSION"] == "2"
    if args.use_deepspeed:
        assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name.removeprefix("deepspeed_zero")[0]
        assert env["ACCELERATE_GRADIENT_CLIPPING"] == "auto", "without it DeepSpeed clips to 1.0"
    with mock.patch.dict(os.environ, env):
        axes = ParallelismConfig()
    got = {axis: axes._sizes[axis] for axis in axes.active_mesh_dims}
    assert got == sizes
    assert axes.total_size == (num_ranks if sizes else 1)


def test_one_and_two_cpu_ranks_take_the_same_two_steps(home, tmp_path):
    for name, batch_size in (("cpu", 8), ("cpu_2_ranks", 4)):
        command = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml", "recipes/finetune.py"]
        command += [*ARGUMENTS, "--per_device_train_batch_size", batch_size, "--output_dir", tmp_path / name]
        result = launch(home, *command)
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"{2 if name == 'cpu_2_ranks' else 1} × cpu" in result.stdout
    one, two = steps_of(tmp_path / "cpu"), steps_of(tmp_path / "cpu_2_ranks")
    assert [step["num_targets"] for step in one] == [step["num_targets"] for step in two]
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    assert one[1] == pytest.approx(two[1], rel=1e-3)  # Adam's first step is the gradient's sign


BF16 = {
    "gpu_1": (1, {}),
    "ddp_8": (2, {}),
    "two_nodes": (2, {}),
    "fsdp2_8": (2, {}),
    "hsdp_2x8": (4, {"DP_SHARD": 2}),
    "tp2_fsdp2_4": (4, {"DP_SHARD": 2}),
    "cp2_fsdp2_4": (2, {"CP": 1, "DP_SHARD": 2}),
    "deepspeed_zero2_8": (2, {}),
    "deepspeed_zero3_8": (2, {}),
}
"""Those that say bf16 → the fewest ranks that have their layout, and the sizes of the axes with them. The attention of
context parallelism does not run on CPU: its configuration is tried without that axis."""

TASKS = {"causal-lm": "causal_lm", "seq2seq": "seq2seq", "sequence-classification": "sequence_classification"}
NO_PLAN = [("tp2_fsdp2_4", "seq2seq")]
"""T5 has no plan for tensor parallelism."""


def test_every_configuration_in_bf16_is_tried():
    assert {name for name in EXPECTED if told(name)[0].mixed_precision == "bf16"} == set(BF16)


@pytest.mark.wide
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", BF16)
def test_every_configuration_in_bf16_trains_every_task(name, task, home, tmp_path):
    num_ranks, sizes = BF16[name]
    if IS_OLD and name == "tp2_fsdp2_4":
        pytest.skip("transformers 5.17 spreads a model by tensor parallelism only")
    if "deepspeed" in name:
        skip_without_deepspeed()
    args, env = told(name)
    env |= {"ACCELERATE_MIXED_PRECISION": args.mixed_precision}  # which simple launchers say in another way
    env |= {f"PARALLELISM_CONFIG_{axis}_SIZE": str(size) for axis, size in sizes.items()} | CPU_OF_DEEPSPEED
    arguments = [f"configs/{TASKS[task]}.yaml", *ARGUMENTS[1:], "--output_dir", tmp_path]
    if (name, task) in NO_PLAN:
        with pytest.raises(RankFailure) as failure:
            run_in_ranks(home, "finetune.py", arguments, num_ranks, env=env)
        assert "has no `tp_plan`" in failure.value.reports[0].output + failure.value.reports[0].summary
        return
    layouts = run_in_ranks(home, "finetune.py", arguments, num_ranks, env=env)
    is_sharded = "fsdp2" in name or "hsdp" in name
    assert {layout["wrapper"] == "FSDP2" for layout in layouts} == {is_sharded}
    steps = steps_of(tmp_path)
    assert len(steps) == 2
    assert all(step["loss"] > 0 and step["grad_norm"] > 0 for step in steps)
    assert steps[1]["loss"] < steps[0]["loss"]


SPREAD = {
    "ddp_8": ("finetune_no_trainer.py", 2, {}, "DistributedDataParallel", set()),
    "fsdp2_8": ("finetune.py", 2, {}, "FSDP2", {(2,)}),
    "hsdp_2x8": ("finetune_no_trainer.py", 4, {"DP_SHARD": 2}, "FSDP2", {(2, 2)}),
    "tp2_fsdp2_4": ("finetune.py", 4, {"DP_SHARD": 2}, "FSDP2", {(2,), (2, 2)}),
}
"""Name → recipe, fewer ranks, the sizes of the axes with them, what wraps the model and the meshes it lies on."""


@pytest.mark.parametrize("name", SPREAD)
def test_the_model_is_spread_as_the_configuration_says_and_reduced_in_float32(name, home, tmp_path):
    recipe, num_ranks, sizes, wrapper, meshes = SPREAD[name]
    if IS_OLD and name == "tp2_fsdp2_4":
        pytest.skip("transformers 5.17 spreads a model by tensor parallelism only")
    _, env = told(name)
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    env |= {f"PARALLELISM_CONFIG_{axis}_SIZE": str(size) for axis, size in sizes.items()}
    for layout in run_in_ranks(home, recipe, [*ARGUMENTS, "--output_dir", tmp_path], num_ranks, env=env):
        assert layout["wrapper"] == wrapper
        assert layout["meshes"] == meshes
        assert layout["reduced"] == ({torch.float32} if wrapper == "FSDP2" else set())
    steps = steps_of(tmp_path)
    assert len(steps) == 2
    assert steps[1]["loss"] < steps[0]["loss"]
    loss = torch.tensor(steps[0]["loss"])
    assert loss.bfloat16().float() != loss, "a loss that FSDP2 hands out in bfloat16 has 8 bits"
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * 600 * 32, "whole, in float32"
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2


def test_that_tensor_parallelism_cannot_be_resumed_is_said_before_training(home, tmp_path):
    _, env = told("tp2_fsdp2_4")
    arguments = [*ARGUMENTS, "--save_strategy", "steps", "--output_dir", tmp_path]
    with pytest.raises(RankFailure) as failure:
        run_in_ranks(home, "finetune_no_trainer.py", arguments, 1, env=env)
    assert "error: transformers and accelerate cannot resume a model that is split" in failure.value.reports[0].output


@pytest.mark.wide
@pytest.mark.parametrize("recipe", ["finetune.py", "finetune_no_trainer.py", "finetune_trl.py"])
@pytest.mark.parametrize("name", ["deepspeed_zero2_8", "deepspeed_zero3_8"])
def test_deepspeed_takes_the_steps_of_ddp(name, recipe, home, tmp_path):
    skip_without_deepspeed()
    skip_without_trl(recipe)
    config = "configs/chat.yaml" if "trl" in recipe else "configs/causal_lm.yaml"
    arguments = [config, *ARGUMENTS[1:], "--gradient_accumulation_steps", "3", "--max_steps", "6"]
    arguments += ["--max_grad_norm", "0.2"]
    _, env = told(name)
    env |= {"ACCELERATE_MIXED_PRECISION": "no"} | CPU_OF_DEEPSPEED
    # Under ZeRO 3 a new model would draw other numbers.
    model = tmp_path / "model"
    run_in_ranks(home, recipe, [*arguments, "--max_steps", "1", "--output_dir", model], 1)
    for where, told_by in (("ddp", {}), ("deepspeed", env)):
        same = [*arguments, "--model_name_or_path", model, "--output_dir", tmp_path / where]
        for layout in run_in_ranks(home, recipe, same, 2, env=told_by):
            assert layout["wrapper"] == {"ddp": "DistributedDataParallel", "deepspeed": "DeepSpeedEngine"}[where]
    ddp, deepspeed = steps_of(tmp_path / "ddp"), steps_of(tmp_path / "deepspeed")
    assert len(ddp) == 6
    assert [step["num_targets"] for step in ddp] == [step["num_targets"] for step in deepspeed]
    assert min(step["num_targets"] for step in ddp) < 0.8 * ddp[0]["num_targets"], "a short window ends the epoch"
    assert ddp[0] == pytest.approx(deepspeed[0], rel=1e-5)
    assert ddp == [pytest.approx(step, rel=1e-2) for step in deepspeed]  # Adam turns rounding near 0 into steps
    assert (tmp_path / "deepspeed" / "model.safetensors").stat().st_size > 4 * 600 * 32, "whole"


@pytest.mark.wide
@pytest.mark.parametrize("name", ["deepspeed_zero2_8", "deepspeed_zero3_8"])
@pytest.mark.parametrize("recipe", ["finetune.py", "finetune_no_trainer.py"])
def test_deepspeed_resumes_with_the_same_losses(recipe, name, home, tmp_path):
    skip_without_deepspeed()
    _, env = told(name)
    saving = [*ARGUMENTS, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    run_in_ranks(home, recipe, [*saving, "--output_dir", tmp_path / "whole"], 2, env=env | CPU_OF_DEEPSPEED)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = [*saving, "--resume_from_checkpoint", "last", "--output_dir", tmp_path / "resumed"]
    run_in_ranks(home, recipe, resumed, 2, env=env | CPU_OF_DEEPSPEED)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "resumed")


@pytest.mark.wide
@pytest.mark.parametrize("recipe", ["finetune.py", "finetune_no_trainer.py"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1",
            "gradient_accumulation_steps: 1, but gradient_accumulation_steps is 2",
        ),
        ("ACCELERATE_GRADIENT_CLIPPING=0.5", "gradient_clipping: 0.5, but max_grad_norm is 1.0"),
    ],
)
def test_another_number_in_deepspeeds_configuration_is_one_line(setting, message, recipe, home, tmp_path):
    skip_without_deepspeed()
    _, env = told("deepspeed_zero2_8")
    env |= dict([setting.split("=")]) | CPU_OF_DEEPSPEED  # accelerate config writes an accumulation of 1 by default
    with pytest.raises(RankFailure) as failure:
        run_in_ranks(home, recipe, [*ARGUMENTS, "--output_dir", tmp_path], 1, env=env)
    lines = [line for line in failure.value.reports[0].output.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert f"DeepSpeed's configuration has {message}; write" in lines[0]


def test_accelerate_would_reduce_in_bfloat16():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    policy = plugin.mixed_precision_policy
    assert (policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.bfloat16)
