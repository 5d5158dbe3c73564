"""A rank is killed in the middle of training; resumed, the run goes on as if nothing had happened."""

import json

import pytest

from tests.harness.ranks import RankFailure
from tests.harness.recipe_cases import FSDP2, SMALL, run_in_ranks, skip_without_trl, steps_of
from tests.harness.trainer_cases import IS_OLD

pytestmark = pytest.mark.slow

NUM_STEPS = 6
SAVING = ["--max_examples", "80", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]

CASES = {
    "Trainer, DDP": ("finetune.py", [], {}),
    "Trainer, FSDP2": ("finetune.py", [], FSDP2),
    "no Trainer, DDP": ("finetune_no_trainer.py", [], {}),
    "no Trainer, FSDP2": ("finetune_no_trainer.py", [], FSDP2),
    "utilities, DDP": ("finetune_utilities.py", [], {}),
    "utilities, FSDP2": ("finetune_utilities.py", ["--shard"], {}),
    "trl, DDP": ("finetune_trl.py", [], {}),
}


@pytest.fixture(scope="module")
def model(home, tmp_path_factory):
    """A small model with dropout, so that the state of the random numbers counts."""
    folder = tmp_path_factory.mktemp("model")
    training = ["configs/causal_lm.yaml", *SMALL, "--max_steps", "1", "--output_dir", folder]
    run_in_ranks(home, "finetune_utilities.py", training, 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(case, home, model, tmp_path):
    recipe, arguments, env = CASES[case]
    skip_without_trl(recipe)
    if IS_OLD and case in ("Trainer, DDP", "trl, DDP"):
        pytest.skip("transformers 5.17 cannot load the optimizer again on several CPU ranks")

    def run(folder, *more, killed=""):
        config = "configs/chat.yaml" if "trl" in case else "configs/causal_lm.yaml"
        own = [config, *SMALL, *SAVING, *arguments, "--max_steps", NUM_STEPS, "--output_dir", folder]
        return run_in_ranks(home, recipe, [*own, "--model_name_or_path", model, *more], 2, env=env, killed=killed)

    for layout in run(tmp_path / "whole"):
        assert bool(layout["reduced"]) == ("FSDP2" in case), "sharded gradients are reduce-scattered"
    whole = steps_of(tmp_path / "whole")
    assert [step["step"] for step in whole] == [1, 2, 3, 4, 5, 6]

    with pytest.raises(RankFailure) as failure:
        run(tmp_path / "cut", killed="1@5")
    assert "SIGKILL" in failure.value.reports[1].summary
    assert [step["step"] for step in steps_of(tmp_path / "cut" / "checkpoint-4")] == [1, 2, 3, 4]
    half_made = tmp_path / "cut" / "checkpoint-5"  # as a run leaves it that is killed while it saves
    half_made.mkdir()
    (half_made / "model.safetensors").write_bytes(b"half")

    run(tmp_path / "cut", "--resume_from_checkpoint", "last")
    cut = steps_of(tmp_path / "cut")
    assert cut[:4] == whole[:4]
    assert cut == [pytest.approx(step, rel=1e-6) for step in whole]
