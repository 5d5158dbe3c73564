"""The mixin in front of trl's trainers: supervised fine-tuning by tokens, preferences by pairs."""

import inspect
import re
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainerMixin
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets import trl as trl_trainers
from tests.harness.gradients import norm_of, relative_error
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import fsdp_on_cpu
from tests.trainer.trl_cases import (
    MARKS,
    SIZES,
    ExactDPO,
    ExactReward,
    ExactSFT,
    make_data,
    make_llama,
    make_trainer,
    train,
    trl,
    truth,
)

pytestmark = MARKS
TOLERANCE = 1e-5


class MeanOfMeansSFT(trl.SFTTrainer):
    """A control: every micro-batch counts the same."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


# ---- Supervised fine-tuning: a mean over the answers' tokens ----


def count(batch):
    return batch["labels"][:, 1:].ne(-100).sum()


@on_layouts("one_rank", "ddp2")
def test_sft_takes_the_step_of_the_whole_batch(layout):
    for loss_type, accumulations in (("nll", (1, 4, 8)), ("dft", (4,)), ("smoothed", (4,))):
        want, want_loss = truth(loss_type, make_data())
        arguments = {"label_smoothing_factor": 0.1} if loss_type == "smoothed" else {"loss_type": loss_type}
        for accumulation in accumulations:
            batch_size = 16 // accumulation // (2 if layout == "ddp2" else 1)
            trainer, tap = train(ExactSFT, batch_size, accumulation, arguments=arguments)
            assert relative_error(tap.steps[0], want) < TOLERANCE, (loss_type, accumulation)
            entry = trainer.state.log_history[0]
            assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
            assert entry["num_targets"] == sum(2 + i * 5 % 11 for i in range(16)), "words and <eos>"


@pytest.mark.parametrize("plugin", [GradUtilsPlugin(loss_unit="shifted_tokens"), GradUtilsPlugin(count_targets=count)])
def test_smoothing_shifts_with_any_count(plugin):
    _, tap = train(ExactSFT, 4, 4, arguments={"label_smoothing_factor": 0.1}, grad_plugin=plugin)
    assert relative_error(tap.steps[0], truth("smoothed", make_data())[0]) < TOLERANCE


def test_control_a_mean_of_means_is_wrong_for_sft():
    _, tap = train(MeanOfMeansSFT, 4, 4)
    assert relative_error(tap.steps[0], truth("nll", make_data())[0]) > 1e-2


FLATTENED = {"padding-free": {"padding_free": True, "max_length": None}, "packed": {"packing": True, "max_length": 24}}


@on_layouts("one_rank", "ddp2")
def test_sft_without_padding_is_exact(layout):
    want, _ = truth("nll", make_data())
    for how, num_rows in (("padding-free", 16), ("packed", 10)):
        arguments = FLATTENED[how] | {"num_train_epochs": 1}
        trainer, tap = train(ExactSFT, 2 if how == "padding-free" else 1, 16, arguments=arguments)
        assert len(trainer.train_dataset) == num_rows
        assert relative_error(tap.steps[0], want) < TOLERANCE, how


# ---- Preferences: a mean over pairs, whose rows are all chosen ones, then all rejected ones ----


@on_layouts("one_rank", "ddp2")
def test_dpo_takes_the_step_of_the_whole_batch(layout):
    # 15 pairs leave a last micro-batch that is smaller; trl gathers rewards, so on two ranks all must be as large.
    num_pairs, cuts = (15, ((15, 1), (4, 4), (1, 15))) if layout == "one_rank" else (16, ((8, 1), (1, 8)))
    data = make_data(num_pairs)
    for loss_type in ("sigmoid", "ipo"):
        want, want_loss = truth(loss_type, data)
        for batch_size, accumulation in cuts if loss_type == "sigmoid" else cuts[1:2]:
            trainer, tap = train(ExactDPO, batch_size, accumulation, data=data, arguments={"loss_type": [loss_type]})
            assert relative_error(tap.steps[0], want) < TOLERANCE, (loss_type, accumulation)
            entry = trainer.state.log_history[0]
            assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
            assert entry["num_targets"] == num_pairs


def test_control_the_stock_dpo_trainer_is_wrong_on_the_same_data():
    data = make_data(15)
    assert relative_error(train(trl.DPOTrainer, 4, 4, data=data)[1].steps[0], truth("sigmoid", data)[0]) > 1e-2


MEANS_OVER_PAIRS = dict.fromkeys(["sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair"], 1.0)
MEANS_OVER_PAIRS |= dict.fromkeys(["apo_zero", "apo_down", "discopop", "sigmoid_norm"], 1.0)
MEANS_OVER_PAIRS |= {"ipo": 0.1, "sppo_hard": 0.01}
"""``loss_type`` → a weight, so that each is a noticeable part of the sum."""


def test_a_mix_of_dpo_losses_is_exact():
    data = make_data(15)
    arguments = {"loss_type": list(MEANS_OVER_PAIRS), "loss_weights": list(MEANS_OVER_PAIRS.values())}
    arguments |= {"label_smoothing": 0.1, "precompute_ref_log_probs": True}
    double = {"model": make_llama().double(), "ref_model": make_llama(12).double()}
    _, want = train(trl.DPOTrainer, 15, 1, data=data, arguments=arguments, **double)
    _, got = train(ExactDPO, 4, 4, data=data, arguments=arguments)
    assert relative_error(got.steps[0], want.steps[0]) < TOLERANCE


def test_every_dpo_loss_of_trl_is_known():
    types = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trl.DPOTrainer._compute_loss)))
    assert types == set(MEANS_OVER_PAIRS) | set(trl_trainers.DPO_WITHOUT_UNIT)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_dpo_losses_that_are_no_mean_over_pairs_are_refused(loss_type):
    arguments = {"loss_type": ["sigmoid", loss_type], "loss_weights": [1.0, 0.5]}
    reason = "sorts the pairs of its micro-batch"
    with pytest.raises(LossUnitError, match=f"cannot be split exactly: loss_type '{loss_type}' .*{reason}"):
        train(ExactDPO, 4, 4, data=make_data(15), arguments=arguments)


def test_dpo_with_an_sft_term_has_a_weight_for_each():
    arguments = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    _, want = train(trl.DPOTrainer, 15, 1, data=make_data(15), arguments=arguments)
    _, got = train(ExactDPO, 4, 4, data=make_data(15), arguments=arguments)
    _, stock = train(trl.DPOTrainer, 4, 4, data=make_data(15), arguments=arguments)
    assert relative_error(got.steps[0], want.steps[0]) < TOLERANCE
    assert relative_error(stock.steps[0], want.steps[0]) > 1e-2


class Shortens(trl.DPOTrainer):
    """Trains on the first three tokens of an answer, which the batch as it was drawn does not tell."""

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        mask = prepared["completion_mask"]
        return prepared | {"completion_mask": mask * (mask.cumsum(1) <= 3)}


def test_dpo_with_an_sft_term_counts_pairs_and_stops_if_the_step_changes_its_tokens():
    arguments = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    trainer, _ = train(ExactDPO, 4, 4, data=make_data(15), arguments=arguments)
    assert trainer.state.log_history[0]["num_targets"] == 15
    for bases in ((GradUtilsTrainerMixin, Shortens), (Shortens, ExactDPO)):
        with pytest.raises(InvalidArgumentError, match="were counted before its first backward"):
            train(type("Shortened", bases, {}), 4, 4, data=make_data(15), arguments=arguments)


class AddsToIt(ExactDPO):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step:
            loss += 0.1 * next(model.parameters()).square().sum()
        return loss


def test_dpo_with_an_sft_term_stops_at_a_term_that_is_added_in_place():
    arguments = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "max_steps": 2}
    with pytest.raises(LossUnitError, match="the loss that comes to backward is not the model's"):
        train(AddsToIt, 4, 4, data=make_data(32), arguments=arguments)


def count_chosen(batch):
    return batch["completion_mask"].chunk(2)[0][:, 1:].sum()


@pytest.mark.parametrize("plugin", [GradUtilsPlugin(), GradUtilsPlugin(count_targets=count_chosen)])
def test_dpo_by_tokens_alone_is_exact(plugin):
    data = make_data(15)
    want, want_loss = truth("sft", data)
    trainer, tap = train(ExactDPO, 4, 4, data=data, arguments={"loss_type": ["sft"]}, grad_plugin=plugin)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert (
        relative_error(train(trl.DPOTrainer, 4, 4, data=data, arguments={"loss_type": ["sft"]})[1].steps[0], want)
        > 1e-2
    )


def test_a_wrong_count_of_the_users_own_is_refused():
    with pytest.raises(LossUnitError, match=r"\(count_targets=count_chosen\): L\(AB\)"):
        train(ExactDPO, 4, 4, data=make_data(15), grad_plugin=GradUtilsPlugin(count_targets=count_chosen))


def test_rewards_are_learnt_exactly():
    data = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in make_data(15)]
    data = [row | {"margin": i / 9} for i, row in enumerate(data)]
    arguments = {"center_rewards_coefficient": 0.1}

    def step(trainer_class, batch_size, accumulation, dtype=torch.float32):
        torch.manual_seed(11)
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).to(dtype)
        trainer, tap = train(
            trainer_class, batch_size, accumulation, data=data, eval_data=data, arguments=arguments, model=model
        )
        return tap.steps[0], trainer.evaluate()["eval_loss"]

    want, want_loss = step(trl.RewardTrainer, 15, 1, torch.float64)
    got, got_loss = step(ExactReward, 4, 4)
    assert relative_error(got, want) < TOLERANCE
    assert got_loss == pytest.approx(want_loss, rel=1e-5)
    assert relative_error(step(trl.RewardTrainer, 4, 4)[0], want) > 1e-2


# ---- All: mixtures of experts, sharding, metrics, evaluation ----


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_auxiliary_loss_of_a_mixture_is_weighted_like_its_micro_batch(kind):
    is_sft = kind == "sft"
    data = make_data(15)

    def step(trainer_class, accumulation, dtype):
        torch.manual_seed(11)
        config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
        kwargs = {} if is_sft else {"ref_model": make_llama(12).to(dtype)}
        kwargs["model"] = MixtralForCausalLM(config).to(dtype)
        arguments = {"router_aux_loss_coef": 0.1, "max_steps": 4 // accumulation}
        return train(trainer_class, 4, accumulation, data=data, arguments=arguments, **kwargs)

    stock, parts = step(trl.SFTTrainer if is_sft else trl.DPOTrainer, 1, torch.float64)
    trainer, got = step(ExactSFT if is_sft else ExactDPO, 4, torch.float32)
    counts = [count(batch).item() for batch in stock.get_train_dataloader()] if is_sft else [4, 4, 4, 3]
    want = {
        name: sum(n * part[name] for n, part in zip(counts, parts.steps, strict=True)) / sum(counts)
        for name in parts.steps[0]
    }
    assert relative_error(got.steps[0], want) < TOLERANCE
    aux_losses = [entry["aux_loss"] for entry in stock.state.log_history[:4]]
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(sum(aux_losses) / 4, rel=1e-5)


@ranks(2)
def test_shards_are_exact():
    arguments = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    for trainer_class, loss_type in ((ExactSFT, "nll"), (ExactDPO, "sigmoid")):
        with fsdp_on_cpu():
            trainer, tap = train(trainer_class, 2, 4, arguments=arguments)
        assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
        assert relative_error(tap.steps[0], truth(loss_type, make_data())[0]) < TOLERANCE, loss_type


METRICS = ["entropy", "mean_token_accuracy", "num_tokens"]
REWARDS = ["rewards/chosen", "rewards/margins", "logps/rejected", "logits/chosen"]


@on_layouts("one_rank", "ddp2")
def test_metrics_are_those_of_the_stock_trainer(layout):
    cases = ((ExactSFT, trl.SFTTrainer, METRICS), (ExactDPO, trl.DPOTrainer, METRICS + REWARDS))
    for exact, stock, names in cases:
        logs = []
        for trainer_class in (exact, stock):
            arguments = {"per_device_eval_batch_size": 3}
            trainer, _ = train(trainer_class, 2, 4, eval_data=make_data(13, seed=8), arguments=arguments)
            trainer.evaluate()
            logs.append(trainer.state.log_history[0] | trainer.state.log_history[-1])
        for name in (*names, *(f"eval_{name}" for name in names)):
            assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-6), name
            assert logs[0][name] != 0, name


@on_layouts("one_rank", "ddp2")
def test_the_evaluation_loss_is_that_of_one_batch(layout):
    data = make_data(13, seed=8)  # does not divide: ranks are handed copies to fill up
    wants = {ExactSFT: truth("nll", data)[1], ExactDPO: truth("sigmoid", data)[1]}
    cases = [(trainer_class, size, {}) for trainer_class in wants for size in (1, 3, 8)]
    cases += [(ExactSFT, size, arguments) for arguments in FLATTENED.values() for size in (1, 3)]
    for trainer_class, batch_size, arguments in cases:
        arguments = {"per_device_eval_batch_size": batch_size} | arguments
        trainer = make_trainer(trainer_class, 4, eval_data=data, arguments=arguments)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(wants[trainer_class], rel=1e-5), arguments


# ---- Preparing data ----


@ranks(2)
def test_the_first_rank_tokenizes_before_the_others():
    started = [0.0]

    class Watched(ExactSFT):
        def _prepare_dataset(self, *args, **kwargs):
            with PartialState().main_process_first():
                started[0] = time.monotonic()
                time.sleep(0.3)
            return super()._prepare_dataset(*args, **kwargs)

    make_trainer(Watched, 4)
    assert PartialState.main_process_first.__module__.startswith("accelerate"), "and all is as before"
    times = [0.0, 0.0]
    dist.all_gather_object(times, started[0])
    assert times[1] - times[0] >= 0.3
