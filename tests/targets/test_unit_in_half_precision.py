"""The check of a loss's unit lets rounding in half precision pass, and no wrong unit."""

import pytest
import torch

from hf_gradutils._undisturbed import in_evaluation_mode
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import compare, cut_after
from hf_gradutils.targets.unit import LossExaminer
from tests.harness.heads import HEADS

ROUNDED = ("bert classes", "whisper seq2seq", "bert answers", "bert tokens", "t5 seq2seq", "vit images")
"""Heads that compute their loss in the dtype of the model."""


def batch_in(dtype, head, seed):
    batch = HEADS[head].collate(HEADS[head].rows(8, seed))
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}


def verdict_on(model, batch, counter, *, change=lambda loss: loss, rounding=None):
    def loss_of(part, counter=None):
        return change(model(**part)["loss"])

    rounding = torch.finfo(next(model.parameters()).dtype).eps if rounding is None else rounding
    with in_evaluation_mode(model), torch.no_grad():
        examiner = LossExaminer(loss_of, loss_of, counter, rounding=rounding)
        return examiner.settle(batch, check=True).verdict.kind


def with_new_weights(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if seed % 2 == 0 else 0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ROUNDED)
def test_no_head_is_refused_because_its_loss_is_rounded(head, dtype):
    model = HEADS[head].build().to(dtype)
    assert model(**batch_in(dtype, head, 0))["loss"].dtype == dtype
    for seed in range(100):
        assert verdict_on(model, batch_in(dtype, head, seed), TargetCounter()) in ("mean", "alike")


BFLOAT16 = torch.finfo(torch.bfloat16).eps
UNSHOWN = {
    "a half loss of a float32 model": (4, torch.float32, {"change": lambda loss: loss.bfloat16(), "rounding": 0.0}),
    "a sum of half losses": (8, torch.bfloat16, {"change": lambda loss: loss.float() * 0.7 + loss.float() * 0.55}),
    "two rows in autocast": (2, torch.float32, {"rounding": BFLOAT16}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNSHOWN)
@pytest.mark.parametrize("head", ["bert classes", "whisper seq2seq"])
def test_no_loss_is_refused_where_its_value_does_not_show_the_rounding(head, case):
    num_rows, dtype, options = UNSHOWN[case]
    model, of_one = HEADS[head].build().to(dtype), TargetCounter(count=lambda batch: torch.tensor(1))
    for seed in range(40):
        with_new_weights(model, seed)
        batch = HEADS[head].collate(HEADS[head].rows(num_rows, seed))
        batch = {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
            assert verdict_on(model, batch, TargetCounter(), **options) != "wrong"
            assert verdict_on(model, batch, of_one, **options) == "wrong"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ROUNDED)
def test_control_a_wrong_unit_is_still_found(head, dtype):
    model = HEADS[head].build().to(dtype)
    counter = TargetCounter(count=lambda batch: torch.tensor(1))
    for seed in range(20):
        assert verdict_on(model, batch_in(dtype, head, seed), counter) == "wrong"


def test_in_float32_a_loss_that_happens_to_fit_half_precision_is_no_excuse():
    losses = iter([89.0, 89.5, 90.0])
    batch = {"labels": torch.tensor([0, 1])}
    additivity = compare(lambda _: torch.tensor(next(losses)), cut_after(batch, 1), TargetCounter("rows"))
    assert additivity.relative_error > 5e-3
