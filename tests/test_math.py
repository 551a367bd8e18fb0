"""Quotients with a defined zero, their gradients included."""

import math

import pytest
import torch
from hypothesis import given

import reference
from assertions import close, finite_gradients
from bapnal._math import divide, full_precision, inverse_norm, unit, weighted_mean, widen
from strategies import seeded, seeds


@given(seed=seeds)
def test_divide_is_division(seed):
    generator = seeded(seed)
    a, b = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    expected = [reference.ratio(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    close(divide(a, b), expected)
    leaves = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(divide, leaves)


def test_divide_has_a_zero():
    numerator, denominator = torch.tensor([0.0, 3.0, -2.0, 1.0]), torch.tensor([0.0, 0, 0, 2])
    assert divide(numerator, denominator).tolist() == [0, 0, 0, 0.5]
    a, b = finite_gradients(divide, numerator, denominator)
    assert a.tolist() == [0, 0, 0, 0.5]
    assert b.tolist() == [0, 0, 0, -0.25]


def test_divide_broadcasts():
    close(divide(torch.ones(()), torch.tensor([0.0, 4.0])), [0.0, 0.25])
    close(divide(torch.ones(2, 3), torch.tensor([[2.0], [0.0]])), [[0.5] * 3, [0.0] * 3])


@given(seed=seeds)
def test_unit_vectors_have_length_one(seed):
    x = torch.randn(3, 4, 5, generator=seeded(seed), dtype=torch.float64)
    for dim in (0, 1, -1):
        close(unit(x, dim).norm(dim=dim), torch.ones(()).expand(unit(x, dim).norm(dim=dim).shape))
        close(unit(x, dim), torch.nn.functional.normalize(x, dim=dim))
        same, inverse = inverse_norm(x, dim)
        assert same is x
        close(inverse, 1 / x.norm(dim=dim, keepdim=True))
    assert torch.autograd.gradcheck(lambda v: unit(v, 1), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_vector_stays_zero_without_a_gradient(dtype):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    assert unit(x, 1)[0].tolist() == [0, 0]
    assert inverse_norm(x, 1)[1].flatten().tolist()[0] == 0
    for function in (unit, lambda v, dim: inverse_norm(v, dim)[1]):
        (gradient,) = finite_gradients(lambda v, f=function: f(v, 1), x)
        assert gradient[0].tolist() == [0, 0]
    close(unit(x, 1)[1], torch.tensor([0.6, 0.8]), tolerance=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_vectors_of_any_length(dtype):
    """Below 1e-12 zero, from there on to the end of the range a direction."""
    most = int(math.log10(torch.finfo(dtype).max))
    for power in range(-most - 6, most + 1):
        x = torch.full((1, 4), 10.0**power, dtype=torch.float64).to(dtype)
        wide = widen(x)
        (gradient,) = finite_gradients(lambda v: (unit(v, 1) * torch.arange(4.0)).sum(), wide)
        if power < -12:
            assert (unit(wide, 1) == 0).all()
            assert (gradient == 0).all()
        elif power > -12:
            close(unit(wide, 1), torch.full((1, 4), 0.5), tolerance=1e-6)
            expected = (torch.arange(4.0, dtype=torch.float64) - 1.5) / 2
            if power < 30:  # beyond that it is too small for float32
                close(gradient.double() * wide.double(), expected[None], tolerance=1e-5)
    x = torch.full((1, 4), torch.finfo(dtype).max, dtype=dtype)
    close(unit(widen(x), 1), torch.full((1, 4), 0.5), tolerance=1e-6)


def test_a_long_vector_does_not_change_its_neighbours():
    x = torch.randn(5, 7, generator=seeded(1))
    long = torch.cat([x, torch.full((1, 7), 3e38)])
    assert torch.equal(unit(long, 1)[:5], unit(x, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_of_finite_numbers_is_finite(dtype):
    most = torch.finfo(dtype).max / 2
    x = torch.full((1, 3, 8), most, dtype=dtype)
    x[:, 1] *= -1
    weights = torch.ones(1, 8, 2, dtype=dtype)
    weights[..., 1] = 0
    mean = weighted_mean(x, weights)
    close(mean[0, 0] / most, [1.0, -1.0, 1.0])
    assert (mean[0, 1] == 0).all()
    x = torch.randn(2, 3, 8, generator=seeded(0), dtype=dtype)
    weights = torch.rand(2, 8, 2, generator=seeded(1), dtype=dtype)
    expected = (x @ weights).mT / weights.sum(1)[..., None]
    assert torch.equal(weighted_mean(x, weights), expected)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(
            weighted_mean, (x.requires_grad_(), weights.requires_grad_())
        )


def test_widen_leaves_all_but_half_precision_alone():
    for dtype in (torch.float16, torch.bfloat16):
        assert widen(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert widen(x) is x


def test_full_precision_turns_autocast_off():
    x = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with full_precision(x.to("meta")):  # a device that knows no autocast
        pass
