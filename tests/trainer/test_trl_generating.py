"""The mixin in front of trl's trainers that generate what they train on: GRPO, RLOO and GKD."""

import inspect
import random
import re

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset

from hf_gradutils import check_invariance
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.targets import trl_generating
from hf_gradutils.upstream.trl import TRL_ENTROPY_BONUS, TRL_LOSSES
from tests.harness.gradients import norm_of, relative_error
from tests.harness.layouts import on_layouts
from tests.trainer.trl_cases import MARKS, make_data, trl
from tests.trainer.trl_generating_cases import (
    LONGEST,
    ExactGKD,
    ExactGRPO,
    ExactRLOO,
    StockGKD,
    StockGRPO,
    StockRLOO,
    distilled,
    make_generating,
    rows_of,
    train_generating,
    truth,
)

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*experimental.*:UserWarning", "ignore:.*mpirical.*:FutureWarning"),
]
TOLERANCE = 1e-5
TWICE = {"max_steps": 2, "learning_rate": 0.2, "num_iterations": 2}
"""The second step trains the same completions with other weights, so that ratios are clipped."""


def check_steps(trainer_class, loss_type, accumulation, *, arguments=None, options=None, kwargs=None, batch_size=4):
    """Each step against the float64 truth: gradient, logged loss and norm. Returns the largest error."""
    named = {} if loss_type == "rloo" else {"loss_type": loss_type}
    arguments = TWICE | named | (arguments or {})
    trainer, tap, weights = train_generating(
        trainer_class, batch_size, accumulation, arguments=arguments, **(kwargs or {})
    )
    errors = []
    for step, got in enumerate(tap.steps):
        rows = rows_of(trainer.kept[step * accumulation : (step + 1) * accumulation])
        want, want_loss = truth(loss_type, rows, weights.steps[step], **(options or {}))
        entry = trainer.state.log_history[step]
        errors += [relative_error(got, want), abs(entry["loss"] - want_loss)]
        errors.append(abs(entry["grad_norm"] / norm_of(want) - 1))
    assert len(tap.steps) == arguments["max_steps"]
    return max(errors)


# ---- GRPO ----

LOSS_TYPES = (
    *trl_generating.MEANS_OVER_ROWS,
    *trl_generating.MEANS_OVER_TOKENS,
    *trl_generating.SHARES_OF_TOKENS,
)


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"vespo"}))
def test_grpo_takes_the_step_of_all_rows(loss_type):
    arguments = {"epsilon_high": 0.2}
    assert check_steps(ExactGRPO, loss_type, 4, arguments=arguments) < TOLERANCE


def test_grpo_takes_the_same_step_however_it_is_cut():
    for loss_type, batch_size, accumulation in (("bnpo", 16, 1), ("bnpo", 1, 16), ("grpo", 1, 16), ("dapo", 2, 8)):
        assert check_steps(ExactGRPO, loss_type, accumulation, batch_size=batch_size) < TOLERANCE


def test_vespo_does_not_depend_on_the_cut():
    def step(batch_size, accumulation):
        arguments = TWICE | {"loss_type": "vespo"}
        return train_generating(ExactGRPO, batch_size, accumulation, arguments=arguments)[1].steps[0]

    assert relative_error(step(2, 8), step(16, 1)) < TOLERANCE


def test_control_stock_grpo_is_wrong_by_tokens():
    assert check_steps(StockGRPO, "bnpo", 4) > 1e-2


OPTIONS = {
    "divergence": ("bnpo", {"beta": 0.1}, {"beta": 0.1}),
    "sequences": ("grpo", {"importance_sampling_level": "sequence"}, {"sequence": True}),
    "truncated": ("bnpo", {"mask_truncated_completions": True}, {}),
    "entropy": ("bnpo", {"entropy_coef": 0.1}, {"entropy_coef": 0.1}),
    "batch": ("bnpo", {"scale_rewards": "batch"}, {}),
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_of_grpo_are_exact(name):
    loss_type, arguments, options = OPTIONS[name]
    assert check_steps(ExactGRPO, loss_type, 4, arguments=arguments, options=options) < TOLERANCE


def test_a_step_without_any_token_has_no_gradient():
    arguments = {"loss_type": "bnpo", "mask_truncated_completions": True}
    arguments["generation_kwargs"] = {"suppress_tokens": [0, 1]}  # no end of a sequence: all are truncated
    trainer, tap, _ = train_generating(ExactGRPO, 4, 4, arguments=arguments)
    assert all(batch["completion_mask"].sum() == 0 for batch in trainer.kept)
    assert norm_of(tap.steps[0]) == 0
    assert trainer.state.log_history[0]["loss"] == 0


@pytest.mark.parametrize(("per_generation", "accumulation"), [(2, 4), (4, 2)])
def test_shares_of_other_generations_add_up(per_generation, accumulation):
    """Several generations in a step are one mean over their tokens; a part of one is divided by its even share."""
    arguments = {"loss_type": "dapo", "steps_per_generation": per_generation}
    trainer, tap, weights = train_generating(ExactGRPO, 4, accumulation, arguments=arguments)
    sizes = [int(batch["num_items_in_batch"]) for batch in trainer.kept]
    divisor = sum(sizes) / per_generation
    want, want_loss = truth("dapo", rows_of(trainer.kept), weights.steps[0], divisor=divisor)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    if per_generation < accumulation:
        assert len(set(sizes)) > 1
        assert divisor == sum(int(batch["completion_mask"].sum()) for batch in trainer.kept)
        stock = train_generating(StockGRPO, 4, accumulation, arguments=arguments)[1]
        assert relative_error(stock.steps[0], want) > 1e-2, "a mean of the generations' means"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_entropy_quantile": 0.2}, "by a quantile of their own micro-batch"),
        ({"entropy_coef": 0.1, "loss_type": "grpo"}, "entropy bonus adds a mean over the tokens"),
        ({"use_adaptive_entropy": True, "loss_type": "dapo"}, "entropy bonus adds a mean over the tokens"),
    ],
)
def test_options_that_depend_on_the_micro_batch_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make_generating(ExactGRPO, 4, 4, arguments=arguments)
    make_generating(ExactGRPO, 16, 1, arguments=arguments)


def test_options_that_are_set_later_are_refused_before_the_first_step():
    trainer = make_generating(ExactGRPO, 4, 4)
    trainer.top_entropy_quantile = 0.5
    with pytest.raises(InvalidArgumentError, match="by a quantile"):
        trainer.train()
    assert not hasattr(trainer, "kept"), "nothing was generated"


def test_every_loss_type_of_grpo_is_known():
    types = set()
    for names in re.findall(
        r"self\.loss_type (?:==|in) (\[.*?\]|\"\w+\")", inspect.getsource(trl.GRPOTrainer._compute_loss)
    ):
        types |= set(re.findall(r"\w+", names))
    assert types == set(LOSS_TYPES)


def test_the_attributes_of_trl_are_still_there():
    for trainer_class in (trl.GRPOTrainer, trl.RLOOTrainer):
        source = inspect.getsource(trainer_class)
        for text in ('self._metrics["train"]["step_time"].append(', "self._current_train_step_time = 0.0"):
            assert text in source
        for name in TRL_LOSSES:
            assert f"def {name}(self, model, inputs" in source
    assert f"self.{TRL_ENTROPY_BONUS} = " in inspect.getsource(trl.GRPOTrainer)


# ---- RLOO ----


def test_rloo_takes_the_step_of_all_rows():
    for accumulation, batch_size in ((4, 4), (16, 1)):
        arguments = {"learning_rate": 0.01}
        assert check_steps(ExactRLOO, "rloo", accumulation, batch_size=batch_size, arguments=arguments) < TOLERANCE


# ---- As trl does it ----


@pytest.mark.parametrize(("exact", "stock"), [(ExactGRPO, StockGRPO), (ExactRLOO, StockRLOO)])
def test_completions_and_logs_are_those_of_the_stock_trainer(exact, stock):
    runs = []
    for trainer_class in (stock, exact):
        data = Dataset.from_list([{"prompt": "w4 w5"}] * 4)
        arguments = {"max_steps": 5, "num_iterations": 2, "include_num_input_tokens_seen": "all"}
        trainer, _, _ = train_generating(trainer_class, 4, 2, arguments=arguments)
        trainer.evaluate(data)
        runs.append(trainer)
    wants, gots = (run.state.log_history for run in runs)
    assert len(runs[0].kept) == len(runs[1].kept) == 10
    for want, got in zip(*(run.kept for run in runs), strict=True):
        assert torch.equal(want["completion_ids"], got["completion_ids"])
    for want, got in zip(wants, gots, strict=True):
        assert set(got) - set(want) <= {"num_targets"}
        for name in set(want) - {"step_time"}:
            if not re.search("runtime|per_second", name):
                assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    assert "eval_loss" in gots[-2] | gots[-1]


def test_the_time_of_a_step_is_that_of_all_its_micro_batches():
    times = []

    class Timed(ExactGRPO):
        def log(self, logs, *args, **kwargs):
            times.append(list(self._metrics["train"]["step_time"]))
            super().log(logs, *args, **kwargs)

    train_generating(Timed, 4, 4, arguments={"max_steps": 4, "logging_steps": 2})
    assert [len(entry) for entry in times] == [2, 2, 0]
    assert all(time > 0 for entry in times for time in entry)


def test_an_iterable_data_set_is_trained_like_another():
    rows = [{"prompt": f"w{4 + i} w5"} for i in range(8)]
    arguments = {"max_steps": 4, "loss_type": "bnpo", "shuffle_dataset": False}
    runs = []
    for trainer_class in (StockGRPO, ExactGRPO):
        data = IterableDataset.from_generator(lambda: iter(rows))
        runs.append(train_generating(trainer_class, 4, 4, data=data, arguments=arguments)[0])
    for want, got in zip(*(run.kept for run in runs), strict=True):
        assert torch.equal(want["completion_ids"], got["completion_ids"])


# ---- Losses and counts of the user's own ----


class Doubled(ExactGRPO):
    def _compute_loss(self, model, inputs):
        return 2 * super()._compute_loss(model, inputs)


def count_tokens(batch):
    return batch["completion_mask"].sum()


def test_a_loss_of_the_users_own_needs_a_count():
    with pytest.raises(InvalidArgumentError, match="cannot be asked what a loss of your own is a mean over"):
        train_generating(Doubled, 4, 4, arguments={"loss_type": "bnpo"})
    steps = {}
    for trainer_class, plugin in (
        (Doubled, GradUtilsPlugin(count_targets=count_tokens)),
        (ExactGRPO, GradUtilsPlugin()),
    ):
        _, tap, _ = train_generating(trainer_class, 4, 4, arguments={"loss_type": "bnpo"}, grad_plugin=plugin)
        steps[trainer_class] = tap.steps[0]
    doubled = {name: 2 * gradient for name, gradient in steps[ExactGRPO].items()}
    assert relative_error(steps[Doubled], doubled) < TOLERANCE


def test_a_count_for_a_known_loss_is_refused():
    with pytest.raises(InvalidArgumentError, match="loss_unit and count_targets cannot be checked for RLOOTrainer"):
        train_generating(ExactRLOO, 4, 4, grad_plugin=GradUtilsPlugin(loss_unit="rows"))


def test_rows_can_be_counted_first_and_tokens_cannot():
    first = {"grad_plugin": GradUtilsPlugin(counts="first")}
    assert check_steps(ExactGRPO, "grpo", 4, kwargs=first) < TOLERANCE
    with pytest.raises(InvalidArgumentError, match=r"GRPOTrainer generates them .* a mean over rows \(grpo, sapo"):
        train_generating(ExactGRPO, 4, 4, arguments={"loss_type": "bnpo"}, **first)
    with pytest.raises(InvalidArgumentError, match=r"GKDTrainer generates them .* lmbda=0.0 and seq_kd=False"):
        train_generating(ExactGKD, 4, 4, arguments={"lmbda": 0.5}, **first)


# ---- GKD ----


@pytest.mark.parametrize("arguments", [{"lmbda": 0.0}, {"lmbda": 0.5}, {"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}])
def test_distillation_takes_the_step_of_all_tokens(arguments):
    runs = {}
    for trainer_class in (ExactGKD, StockGKD):
        random.seed(0)
        runs[trainer_class] = train_generating(trainer_class, 4, 4, arguments=arguments)
    (trainer, tap, _), (stock, stock_tap, _) = runs.values()
    kept = trainer.kept[-4:]
    want, want_loss = distilled(kept)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
    assert entry["num_targets"] == sum(int(batch["labels"].ne(-100).sum()) for batch in kept)
    for mine, theirs in zip(kept, stock.kept, strict=True):
        assert torch.equal(mine["labels"], theirs["labels"])
    if arguments != {"lmbda": 0.0}:
        assert relative_error(stock_tap.steps[0], want) > 5e-3, "stock divides by the tokens of the data"


def test_the_evaluation_loss_of_a_distillation_is_that_of_one_batch():
    data = Dataset.from_list([{"messages": row["prompt"] + row["chosen"]} for row in make_data(13, seed=8)])
    losses = []
    for size in (13, 4):
        trainer = make_generating(ExactGKD, 4, arguments={"per_device_eval_batch_size": size}, accumulation=4)
        losses.append(trainer.evaluate(data)["eval_loss"])
    batch = trainer.data_collator(list(data))
    assert losses == pytest.approx([distilled([batch])[1]] * 2, rel=1e-5)


# ---- A check of invariance ----


def test_a_check_says_that_generated_batches_cannot_be_compared():
    for trainer_class in (ExactGRPO, StockRLOO):
        trainer = make_generating(trainer_class, 4, 4)
        report = check_invariance(trainer)
        assert report.verdict == "NOT COMPARED"
        assert "generates its batches" in str(report)
        assert not hasattr(trainer, "kept")
    trainer, tap, _ = train_generating(ExactGRPO, 4, 4, check_invariance=True)
    assert len(tap.steps) == 1


def test_a_check_compares_a_distillation_on_the_answers_of_the_data():
    trainer = make_generating(ExactGKD, 4, 4, arguments={"lmbda": 1.0})
    report = check_invariance(trainer)
    assert report.passed, str(report)
    assert trainer.lmbda == 1.0
    assert len(report.comparisons) == 4


# ---- Two ranks ----


@on_layouts("ddp2")
def test_two_ranks_take_the_step_of_all_rows(layout):
    for loss_type in ("bnpo", "grpo", "dapo"):
        assert check_steps(ExactGRPO, loss_type, 4, batch_size=2) < TOLERANCE, loss_type
    assert check_steps(StockGRPO, "bnpo", 4, batch_size=2) > 1e-2
    arguments = {"learning_rate": 0.01, "beta": 0.0}  # without a reference, which rank 0 alone would save
    assert check_steps(ExactRLOO, "rloo", 4, batch_size=2, arguments=arguments) < TOLERANCE
    arguments = {"entropy_coef": 0.1}
    assert (
        check_steps(ExactGRPO, "bnpo", 4, batch_size=2, arguments=arguments, options={"entropy_coef": 0.1}) < TOLERANCE
    )


@on_layouts("ddp2")
def test_two_ranks_distil_exactly(layout):
    random.seed(dist.get_rank())
    trainer, tap, _ = train_generating(ExactGKD, 2, 4, arguments={"lmbda": 0.5})
    want, want_loss = distilled(trainer.kept[-4:])
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


@on_layouts("ddp2")
def test_two_ranks_generate_and_log_like_the_stock_trainer(layout):
    rows = [{"prompt": f"w{4 + i} w5"} for i in range(6)]
    arguments = {"max_steps": 4, "loss_type": "dapo", "shuffle_dataset": False, "steps_per_generation": 2}
    runs = []
    for trainer_class in (StockGRPO, ExactGRPO):  # an epoch ends inside a step, which goes on in the next
        data = IterableDataset.from_generator(lambda: iter(rows))
        runs.append(train_generating(trainer_class, 2, 4, data=data, arguments=arguments)[0])
    for want, got in zip(*(run.kept for run in runs), strict=True):
        assert torch.equal(want["completion_ids"], got["completion_ids"])
    for want, got in zip(*(run.state.log_history for run in runs), strict=True):
        for name in set(want) - {"step_time", "loss", "grad_norm", "train_loss"}:  # where stock has a mean of means
            if not re.search("runtime|per_second", name):
                assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    assert runs[1].state.log_history[0]["num_targets"] <= 24 * LONGEST
