"""Scaling in place, and the coefficient that clips."""

import math

import pytest
import torch

from hf_gradutils.gradients.scaling import clip_coefficient, scale_
from hf_gradutils.upstream.torch import foreach_mul_in_fp32_, foreach_mul_promoted_


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_multiplied_in_at_least_float32(dtype, foreach):
    tensors = [torch.randn(1000), torch.empty(0), torch.randn(3, 4), torch.randn(1), torch.tensor(0.7)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    factor = torch.tensor(0.123456789, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [(t.to(wide) * factor.to(wide)).to(dtype) for t in tensors]
    scale_(tensors, factor, foreach=foreach)
    for got, want in zip(tensors, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_multiplied_by_promotion_is_what_the_kernel_for_many_gives(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in [(1000,), (3, 4), (1,), (), (0, 2)]]
    factor, expected = torch.tensor(0.123456789), [tensor.clone() for tensor in tensors]
    foreach_mul_in_fp32_(expected, factor)
    foreach_mul_promoted_(tensors, factor)
    assert all(torch.equal(got, want) for got, want in zip(tensors, expected, strict=True))


def test_tensors_of_all_kinds_are_scaled_together():
    tensors = [torch.randn(4, 6, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    tensors += [torch.randn(6, 4).t(), torch.randn(8)[::2], torch.tensor([1.0, math.inf, math.nan])]
    factor = torch.tensor(0.3, dtype=torch.float64)
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    expected = [(t.to(w) * factor.to(w)).to(t.dtype) for t, w in zip(tensors, wide, strict=True)]
    scale_(iter(tensors), factor)
    for got, want in zip(tensors, expected, strict=True):
        assert torch.equal(got.nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


def test_control_a_factor_in_bf16_is_another_number():
    gradient = torch.randn(1000).bfloat16()
    factor = torch.tensor(0.123456789)
    assert not torch.equal(gradient * factor.bfloat16(), (gradient.float() * factor).bfloat16())


def test_the_coefficient_clips_only_what_is_longer():
    assert clip_coefficient(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-6)
    assert clip_coefficient(torch.tensor(0.5), 1.0) == 1
    assert clip_coefficient(torch.tensor(4.0), math.inf) == 1


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_scales_nothing(norm):
    assert clip_coefficient(torch.tensor(norm), 1.0) == 1
    gradient = torch.tensor([1.0, norm])
    assert not torch.equal(gradient * (1.0 / (torch.tensor(norm) + 1e-6)), gradient), "control: torch's coefficient"
