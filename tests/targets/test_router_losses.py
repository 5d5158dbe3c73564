"""The router loss of the whole batch from sums of its micro-batches, for every class of transformers that has one."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import one_hot

from benchmarks.heads.classes import build
from benchmarks.heads.configs import OVERRIDES, tiny_config
from benchmarks.heads.rows import collate, find_rows
from hf_gradutils.targets.auxiliary_loss import auxiliary_places, without_auxiliary
from hf_gradutils.targets.router_losses import _FAMILIES, NO_SUMS, add_coefficient, own_router_loss, router_loss_of
from tests.harness import router_cases as cases
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.trainer_cases import IS_OLD

TOLERANCE = 1e-6
"""Heads sum over tokens in float32, also where they compute in float64."""

# ---- The table ----


@pytest.mark.parametrize("name", [*_FAMILIES, *NO_SUMS])
def test_the_classes_in_the_table_are_still_there(name):
    if IS_OLD and not hasattr(transformers, name):
        pytest.skip("newer than this transformers")
    assert issubclass(getattr(transformers, name), transformers.PreTrainedModel)


def test_every_class_that_balances_its_experts_is_in_the_table():
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    sources = {file: file.read_text() for file in files}
    balancing = [source for source in sources.values() if re.search(r"load_balancing_loss_func\(", source)]
    found = {name for source in balancing for name in _classes_that_balance(source)}
    assert "MixtralForCausalLM" in found
    assert not found - _FAMILIES.keys() - NO_SUMS.keys()


def _classes_that_balance(source):
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and "load_balancing_loss_func" in ast.unparse(node):
            yield node.name


def test_other_heads_have_none():
    assert router_loss_of(HEADS["llama causal"].build()) is None
    classifier = transformers.MixtralForSequenceClassification(transformers.MixtralConfig(**cases.cfg.EXPERTS))
    assert router_loss_of(classifier) is None


# ---- A head's own loss ----

MORE = {
    "DbrxAttentionConfig": {"kv_n_heads": 2, "clip_qkv": 8.0},
    "DeepseekV4Config": {"mlp_layer_types": ["hash_moe", "moe"]},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
    },
    "FlintConfig": {"mlp_only_layers": [0]},
    "Glm5NextTextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "NllbMoeConfig": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "SwitchTransformersConfig": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}
"""Class of a configuration → what it takes to be tiny and to have a layer of experts."""
ABSENT = {
    "DbrxConfig": ("attn_config", "rope_theta", 1e4),
    "Qwen3OmniMoeThinkerConfig": (None, "vision_start_token_id", 40),
}
"""Class of a configuration → a field that its model reads and that it has not: in which part, its name, a value."""


@pytest.mark.wide
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", _FAMILIES)
def test_rows_give_the_own_router_loss_of_every_class(name, padded, monkeypatch):
    if IS_OLD:
        pytest.skip("options are those of a newer transformers")
    model, batch = _tiny(name, monkeypatch)
    if padded:
        batch["attention_mask"][0, 7:] = batch["attention_mask"][1, 9:] = 0
    else:
        batch.pop("attention_mask")
    _check_own(model, batch)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "nllb moe", "switch"])
def test_rows_give_the_own_router_loss_of_each_formula(name, padded):
    model = cases.make_router_model(name, 0.5)
    batch = cases.one_batch(cases.ragged_micro_batches(model, unequal=True))
    if not padded:
        batch = {key: value for key, value in batch.items() if "mask" not in key}
    _check_own(model, batch)


def test_the_coefficient_is_that_of_the_text_model(monkeypatch):
    if IS_OLD:
        pytest.skip("options are those of a newer transformers")
    model, batch = _tiny("Qwen3VLMoeForConditionalGeneration", monkeypatch)
    _check_own(model, batch)
    assert model.config.router_aux_loss_coef == 9.0
    assert add_coefficient(model) == 0.5


def _tiny(name, monkeypatch):
    for config_class, options in MORE.items():
        monkeypatch.setitem(OVERRIDES, config_class, OVERRIDES.get(config_class, {}) | options)
    head_class = getattr(transformers, name)
    config = tiny_config(head_class.config_class)
    if type(config).__name__ in ABSENT:
        part, field, value = ABSENT[type(config).__name__]
        setattr(getattr(config, part) if part else config, field, value)
    model = build(head_class, config)
    make_row, _ = find_rows(model)
    generator = torch.Generator().manual_seed(3)
    return model, collate([make_row(generator) for _ in range(3)])


def _check_own(model, batch):
    """In value and in gradient; and the coefficient is the one that the head adds it with."""
    for number, (place, attribute) in enumerate(list(auxiliary_places(model))):
        setattr(place, attribute, 0.5 + number)
    if model.config.get_text_config() is not model.config:
        model.config.router_aux_loss_coef = 9.0  # that no head reads
    outputs = model(**batch, output_router_logits=True)
    want, found = own_router_loss(model, outputs), router_loss_of(model)
    rows = found.rows(model, batch, outputs)
    got = found.loss(rows, ())
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=0, check_dtype=False)
    assert all(len(part) == 1 for part in rows)

    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    gradients = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        for loss in (got, want)
    ]
    got_gradient, want_gradient = (dict(zip(parameters, grads, strict=True)) for grads in gradients)
    assert relative_error(got_gradient, want_gradient) < TOLERANCE

    with without_auxiliary(model):
        without = model(**batch, output_router_logits=True).loss
    assert model(**batch, output_router_logits=False).loss == without
    added = float((outputs.loss - without).detach())
    assert add_coefficient(model) * float(want.detach()) == pytest.approx(added, rel=1e-4)


def test_forwards_without_router_logits_have_no_rows():
    for name in ("mixtral", "nllb moe", "switch"):
        model = cases.make_router_model(name, 0.5)
        batch = cases.ragged_micro_batches(model, unequal=False)[0]
        outputs = model(**batch, output_router_logits=False)
        assert own_router_loss(model, outputs) is None
        assert router_loss_of(model).rows(model, batch, outputs) == ()


# ---- The whole batch ----


def _balance(logits, top_k, mask):
    """In float64, from the formula."""
    probability = torch.cat(logits).double().softmax(dim=-1)[mask.flatten().bool().repeat(len(logits))]
    num_experts = probability.shape[-1]
    share = one_hot(probability.topk(top_k).indices, num_experts).sum(dim=1).double().mean(dim=0)
    return num_experts * (share * probability.mean(dim=0)).sum()


def _of_mixtral(outputs, batch):
    return _balance(outputs.router_logits, 2, batch["attention_mask"])


def _of_nllb(outputs, batch):
    encoder = _balance(outputs.encoder_router_logits, 2, batch["attention_mask"])
    return encoder + _balance(outputs.decoder_router_logits, 2, batch["decoder_attention_mask"])


def _of_switch(outputs, _):
    total = 0.0
    for of_layers in (outputs.encoder_router_logits, outputs.decoder_router_logits):
        logits = torch.cat(of_layers, dim=1)
        balances = [_balance((row,), 1, torch.ones(len(row))) for row in logits]
        total = total + torch.stack(balances).mean() + logits.logsumexp(dim=-1).square().mean()
    return 0.5 * total


ORACLES = {"mixtral": _of_mixtral, "qwen3 moe": _of_mixtral, "nllb moe": _of_nllb, "switch": _of_switch}


@pytest.mark.parametrize("name", ORACLES)
def test_two_passes_give_the_gradient_of_the_whole_batch(name):
    model = cases.make_router_model(name, 0.5)
    # Switch takes in padding, so that the length has to be that of the whole batch.
    batches = cases.ragged_micro_batches(model, unequal=True, one_length=name == "switch")
    want = cases.gradient_of_whole_batch(model, batches, ORACLES[name])
    assert relative_error(cases.gradient_of_two_passes(model, batches), want) < 1e-9
    assert relative_error(cases.gradient_of_whole_batch(model, batches), want) < TOLERANCE
    assert relative_error(cases.gradient_of_mean(model, batches), want) > 1e-4
