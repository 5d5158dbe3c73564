"""DPO with several losses: each term gets its own share of the whole batch's targets."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_gradutils.targets import trl_terms
from tests.harness.gradients import relative_error
from tests.trainer.trl_cases import MARKS, SIZES, make_data, make_llama, make_trainer, trl

pytestmark = MARKS
TERMS = {"loss_type": ["sigmoid", "sft", "hinge"], "loss_weights": [1.0, 0.5, 0.2]}


def make_double(arguments, **kwargs):
    models = {"model": make_llama().double(), "ref_model": make_llama(12).double()} | kwargs
    trainer = make_trainer(trl.DPOTrainer, 4, data=make_data(15), arguments=arguments, **models)
    loader = trainer.get_train_dataloader()
    whole = trainer._prepare_inputs(loader.collate_fn(list(loader.dataset)))
    return trainer, whole, [trainer._prepare_inputs(batch) for batch in loader]


def gradient_of(trainer, batches, weigh):
    """The gradient of Σ weigh(batch)'s losses, and their sum."""
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = weigh(batch)
        loss.backward()
        total += loss.item()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}, total


def shared(trainer, batches):
    counts = [trl_terms.dpo_counts(trainer, batch) for batch in batches]

    def weigh(batch):
        ratios = trl_terms.dpo_counts(trainer, batch) / torch.stack(counts).sum(0)
        with trl_terms.dpo_shares(trainer, ratios):
            return trainer.compute_loss(trainer.model, batch)

    return weigh


@pytest.mark.parametrize("arguments", [TERMS, {"loss_type": ["sft"]}, {"loss_type": "sigmoid"}])
def test_the_terms_of_micro_batches_add_up_to_the_whole_batch(arguments):
    trainer, whole, parts = make_double(arguments)
    assert len(parts) == 4
    want, want_loss = gradient_of(trainer, [whole], lambda batch: trainer.compute_loss(trainer.model, batch))
    got, loss = gradient_of(trainer, parts, shared(trainer, parts))
    assert relative_error(got, want) < 1e-6, "trl's head computes log-probabilities in float32"
    assert loss == pytest.approx(want_loss, rel=1e-6)


def test_control_one_weight_for_all_terms_is_wrong():
    trainer, whole, parts = make_double(TERMS)
    want, _ = gradient_of(trainer, [whole], lambda batch: trainer.compute_loss(trainer.model, batch))

    def by_pairs(batch):
        return trainer.compute_loss(trainer.model, batch) * (len(batch["input_ids"]) / len(whole["input_ids"]))

    assert relative_error(gradient_of(trainer, parts, by_pairs)[0], want) > 1e-2


def test_metrics_and_weights_are_as_before():
    trainer, _, parts = make_double(TERMS)
    trainer.compute_loss(trainer.model, parts[1])
    want = {name: list(values) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    shared(trainer, parts)(parts[1])
    assert dict(trainer._metrics["train"]) == want
    assert want["rewards/margins"] != [0.0]
    assert trainer.loss_weights == TERMS["loss_weights"]


def test_shares_keep_the_dtype_of_the_loss():
    trainer, _, parts = make_double(TERMS, model=make_llama(), ref_model=make_llama(12))
    assert shared(trainer, parts)(parts[0]).dtype == torch.float32


def test_the_auxiliary_loss_of_a_mixture_is_weighted_by_pairs():
    torch.manual_seed(11)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    arguments = {"loss_type": ["sigmoid", "sft"], "router_aux_loss_coef": 0.1}
    trainer, _, parts = make_double(arguments, model=MixtralForCausalLM(config).double())
    assert [int(count[-1]) for count in (trl_terms.dpo_counts(trainer, part) for part in parts)] == [4, 4, 4, 3]
    ratios = torch.tensor([0.0, 0.0, 0.25], dtype=torch.float64)
    with trl_terms.dpo_shares(trainer, ratios):
        loss = trainer.compute_loss(trainer.model, parts[0])
    assert loss.item() == pytest.approx(0.1 * 0.25 * trainer._metrics["train"]["aux_loss"][-1], rel=1e-6)
    assert trainer.router_aux_loss_coef == 0.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (TERMS, ""),
        ({"loss_type": ["sft", "aot"]}, "loss_type 'aot' sorts"),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "a product of two means"),
    ],
)
def test_losses_that_are_no_sum_of_means_are_told(arguments, reason):
    trainer = make_trainer(trl.DPOTrainer, 4, data=make_data(4), arguments=arguments)
    assert reason in trl_terms.why_not_split(trainer)
    assert bool(reason) == bool(trl_terms.why_not_split(trainer))
