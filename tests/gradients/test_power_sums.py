"""Power sums of local tensors, exact for every dtype."""

import math

import pytest
import torch

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.power_sums import check_norm_type, power_sums, root

P = [1.0, 2.0, 3.0, math.inf]


def truth(tensor, p):
    return float(torch.linalg.vector_norm(tensor.double().flatten(), p))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", P)
def test_every_dtype_is_exact(p, dtype, foreach):
    tensors = [
        torch.randn(3, 5).to(dtype),
        torch.empty(0, dtype=dtype),
        torch.randn(200_001).to(dtype),
        torch.randn(()),
    ]
    norms = root(power_sums(tensors, p, foreach=foreach), p)
    assert norms.dtype == torch.float64
    for norm, tensor in zip(norms.tolist(), tensors, strict=True):
        assert norm == pytest.approx(truth(tensor, p) if tensor.numel() else 0.0, rel=1e-12)


def test_finite_values_whose_powers_do_not_fit_the_dtype_stay_finite():
    large = torch.full((1000,), 1e25)
    many = torch.full((3_000_000,), 300.0, dtype=torch.float16)
    tiny = torch.full((10,), 1e-25)
    assert not torch.linalg.vector_norm(large).isfinite(), "control: overflows in float32"
    assert not torch.linalg.vector_norm(many).isfinite(), "control: overflows in float16"
    assert torch.linalg.vector_norm(tiny) == 0, "control: underflows in float32"
    norms = root(power_sums([large, many, tiny], 2.0), 2.0)
    assert norms.tolist() == pytest.approx([1e25 * 1000**0.5, 300 * 3e6**0.5, 1e-25 * 10**0.5], rel=1e-7)


def test_a_large_tensor_on_cpu_is_exact():
    tensor = torch.rand(30_000_000)
    assert abs(float(torch.linalg.vector_norm(tensor)) / truth(tensor, 2) - 1) > 1e-5, "control: whole-tensor float32"
    assert root(power_sums([tensor], 2.0), 2.0).item() == pytest.approx(truth(tensor, 2), rel=1e-12)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_are_seen(p, bad):
    tensor = torch.ones(100_000)
    tensor[70_000] = bad
    value = power_sums([tensor, torch.ones(2)], p)
    assert math.isnan(value[0]) if math.isnan(bad) else math.isinf(value[0])
    assert math.isfinite(value[1])


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float16), (torch.float32, torch.float64)])
def test_many_small_tensors_are_as_exact_one_by_one(dtypes):
    generator = torch.Generator().manual_seed(4)
    shapes = [(16, 8), (), (3,), (0, 5), (2, 3, 4)] * 20
    tensors = [
        (torch.randn(shape, generator=generator) * 10 ** (number % 4)).to(dtypes[number % len(dtypes)])
        for number, shape in enumerate(shapes)
    ]
    tensors[0] = tensors[0].t()  # not contiguous
    before = [tensor.clone() for tensor in tensors]
    values = power_sums(tensors, 2.0)
    want = [truth(tensor, 2.0) ** 2 for tensor in tensors]
    assert values.tolist() == pytest.approx(want, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "only read"
    assert power_sums(tensors[:1], 2.0).item() == pytest.approx(want[0], rel=1e-12)
    assert torch.equal(tensors[0], before[0]), "a single one is not copied"
    tensors[4][0, 0, 0] = math.inf
    tensors[2][1] = math.nan
    values = power_sums(tensors, 2.0)
    assert [i for i, value in enumerate(values.tolist()) if not math.isfinite(value)] == [2, 4]


def test_nothing_is_zero():
    assert power_sums([torch.empty(0, 3), torch.empty(0)], 2.0).tolist() == [0, 0]
    assert power_sums([], 2.0).sum() == 0
    assert power_sums([torch.empty(0, 3), torch.empty(0)], math.inf).tolist() == [0, 0]


@pytest.mark.parametrize("p", [0, -1, math.nan])
def test_a_norm_type_that_is_none_is_refused(p):
    with pytest.raises(InvalidArgumentError, match="norm_type must be > 0"):
        check_norm_type(p)
