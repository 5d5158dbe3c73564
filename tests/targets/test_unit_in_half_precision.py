"""The check of a loss's unit lets rounding in half precision pass, and no wrong unit."""

import pytest
import torch

from hf_gradutils._undisturbed import undisturbed
from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.probe import check_additivity
from hf_gradutils.targets.unit import settle_unit
from tests.harness.heads import HEADS

ROUNDED = ("bert classes", "whisper seq2seq", "bert answers", "bert tokens", "t5 seq2seq", "vit images")
"""Heads that compute their loss in the dtype of the model."""


def batch_in(dtype, head, seed):
    batch = HEADS[head].collate(HEADS[head].rows(8, seed))
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}


def find_unit(model, batch, counter):
    def loss_of(part, counter=None):
        return model(**part)["loss"]

    with undisturbed(model):
        settle_unit(loss_of, loss_of, batch, counter, check=True, exact_arithmetic=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ROUNDED)
def test_no_head_is_refused_because_its_loss_is_rounded(head, dtype):
    model = HEADS[head].build().to(dtype)
    assert model(**batch_in(dtype, head, 0))["loss"].dtype == dtype
    for seed in range(100):
        find_unit(model, batch_in(dtype, head, seed), TargetCounter())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ROUNDED)
def test_control_a_wrong_unit_is_still_found(head, dtype):
    model = HEADS[head].build().to(dtype)
    counter = TargetCounter(count=lambda batch: torch.tensor(1))
    for seed in range(20):
        with pytest.raises(LossUnitError, match=r"L\(AB\)"):
            find_unit(model, batch_in(dtype, head, seed), counter)


def test_in_float32_a_loss_that_happens_to_fit_half_precision_is_no_excuse():
    losses = iter([89.0, 89.5, 90.0])
    batch = {"labels": torch.tensor([0, 1])}
    additivity = check_additivity(lambda _: torch.tensor(next(losses)), batch, TargetCounter("rows"))
    assert additivity.relative_error > 5e-3
