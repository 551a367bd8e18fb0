"""The permutohedral lattice: the fast form against the naive one, its laws, and the Gaussian."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from assertions import close
from bapnal.crf import PermutohedralLattice, filtering, keys, lattice
from naive_crf import NaiveLattice
from strategies import seeded


@st.composite
def points(draw, max_points=80, max_dimensions=7):
    """Points ``(n, d)``: scattered, crowded into few simplices, or on ties."""
    n, d = draw(st.integers(1, max_points)), draw(st.integers(1, max_dimensions))
    generator = seeded(draw(st.integers(0, 2**20)))
    f = torch.randn(n, d, generator=generator, dtype=torch.float64)
    f *= draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    return (f.round() if draw(st.booleans()) else f), generator


def digits_of(cell):
    low, high = torch.aminmax(cell[:-1], dim=1)
    return keys.VertexKeys(low.tolist(), high.tolist())


def draw_values(generator, n, channels=2):
    return torch.randn(n, channels, generator=generator, dtype=torch.float64)


@given(points())
def test_fast_form_is_the_naive_form(drawn):
    f, generator = drawn
    v = draw_values(generator, f.shape[0]).requires_grad_()
    w = draw_values(generator, f.shape[0])
    naive, fast = NaiveLattice(f), PermutohedralLattice(f)
    assert fast.size == naive.size
    expected, actual = naive.filter(v), fast.filter(v)
    close(actual, expected)
    close(
        torch.autograd.grad((actual * w).sum(), v)[0],
        torch.autograd.grad((expected * w).sum(), v)[0],
    )


@given(points(max_dimensions=4))
def test_form_for_a_gpu_is_the_form_for_a_cpu(drawn):
    f, generator = drawn
    v = draw_values(generator, f.shape[0])
    fast = PermutohedralLattice(f)
    forms = filtering.BagOps(filtering.Workspace()), filtering.IndexOps()
    tables = [form.splat(fast, v) for form in forms]
    close(*tables)
    for blur in fast.blurs:
        tables = [form.blur(fast, table, blur) for form, table in zip(forms, tables, strict=True)]
        close(*tables)
    close(*(form.slice(fast, table) for form, table in zip(forms, tables, strict=True)))


@given(points())
def test_neighbours_by_search_are_those_by_hash(drawn):
    """What a GPU does, without the host knowing where a vertex starts, and what a CPU does."""
    f, generator = drawn
    groups = torch.randint(0, 3, f.shape[:1], generator=generator)
    cell, rank, _ = lattice.simplices(lattice.elevate(f.T.contiguous()))
    low, high = torch.aminmax(cell[:-1], dim=1)
    digits = keys.VertexKeys(low.tolist(), high.tolist(), (0, 2))
    table = keys.number_vertices(digits.of_points(cell, rank, groups), digits.span)
    distinct = table.ordered.flatten()[table.fresh.flatten()]
    assert int(table.size) == distinct.shape[0] == PermutohedralLattice(f, groups).size
    assert (distinct.diff() > 0).all()
    number = table.fresh.flatten().cumsum(0) - 1
    scattered = torch.empty_like(distinct).scatter_(0, number, table.ordered.flatten())
    assert torch.equal(scattered, distinct)
    found = keys.searched_neighbours(distinct, digits)
    for a, b in zip(found, keys.hashed_neighbours(distinct, digits), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("numbers", [1, 7, 64, 10**6])
def test_sums_in_parts_are_the_whole(numbers, monkeypatch):
    f = 3 * torch.randn(150, 3, generator=seeded(5), dtype=torch.float64)
    f[50:] = f[50:51]  # one vertex has many points
    v = draw_values(seeded(6), 150, 5)
    expected = NaiveLattice(f).filter(v)
    monkeypatch.setattr(filtering, "AT_ONCE", numbers)
    close(PermutohedralLattice(f).filter(v), expected)


def test_a_workspace_is_written_again():
    fast = PermutohedralLattice(torch.randn(60, 2, generator=seeded(7)))
    v = torch.rand(60, 3, generator=seeded(8))
    workspace = filtering.Workspace()
    once = fast.apply(v, workspace)
    expected = once.clone()
    again = fast.apply(2 * v, workspace)
    assert again.data_ptr() == once.data_ptr()
    close(again, 2 * expected)
    close(fast.apply(v[:, :2], workspace), expected[:, :2])
    alone = fast.apply(v)
    fast.apply(2 * v)
    close(alone, expected)


@given(points())
def test_groups_are_lattices_of_their_own(drawn):
    f, generator = drawn
    n = f.shape[0]
    groups = torch.randint(0, 3, (n,), generator=generator)
    v = draw_values(generator, n)
    together = PermutohedralLattice(f, groups).filter(v)
    for group in groups.unique():
        mine = groups == group
        close(together[mine], PermutohedralLattice(f[mine]).filter(v[mine]))


def test_keys_that_do_not_fit_64_bits():
    f = torch.randn(40, 20, generator=seeded(3), dtype=torch.float64) * 100
    f[20:] = f[:20] + 0.01
    v = draw_values(seeded(4), 40)
    cell = lattice.simplices(lattice.elevate(f.T.contiguous()))[0]
    assert not digits_of(cell).fits
    close(PermutohedralLattice(f).filter(v), NaiveLattice(f).filter(v))


def test_keys_that_do_not_fit_32_bits():
    f = torch.randn(50, 6, generator=seeded(3), dtype=torch.float64) * 50
    v = draw_values(seeded(4), 50)
    cell = lattice.simplices(lattice.elevate(f.T.contiguous()))[0]
    digits = digits_of(cell)
    assert digits.fits
    assert digits.dtype == torch.int64
    close(PermutohedralLattice(f).filter(v), NaiveLattice(f).filter(v))


def test_hash_collisions_are_settled(monkeypatch):
    """With all vertices in one of four places of the hash table, the neighbours are the same."""
    f = torch.randn(60, 3, generator=seeded(5), dtype=torch.float64)
    v = draw_values(seeded(6), 60)
    monkeypatch.setattr(keys, "_hashed", lambda numbers, bits: numbers & 3)
    close(PermutohedralLattice(f).filter(v), NaiveLattice(f).filter(v))


@given(points(max_points=30))
def test_transpose_blurs_in_the_opposite_order(drawn):
    f, generator = drawn
    x, y = draw_values(generator, f.shape[0]), draw_values(generator, f.shape[0]).requires_grad_()
    filtered = PermutohedralLattice(f).filter(y)
    transposed = torch.autograd.grad(filtered, y, x)[0]
    close((x * filtered).sum(), (transposed * y).sum().item())


def test_gradients():
    f = torch.randn(12, 3, generator=seeded(0), dtype=torch.float64) * 0.5
    v = draw_values(seeded(1), 12).requires_grad_()
    fast = PermutohedralLattice(f)
    assert gradcheck(fast.filter, (v,))
    assert gradgradcheck(lambda v: fast.filter(v).square(), (v,))


@given(points())
def test_laws_of_a_filter(drawn):
    f, generator = drawn
    n = f.shape[0]
    fast = PermutohedralLattice(f)
    x, y = draw_values(generator, n), draw_values(generator, n)
    close(fast.filter(2 * x - y), 2 * fast.filter(x) - fast.filter(y))
    assert (fast.filter(x.abs()) >= 0).all()
    order = torch.randperm(n, generator=generator)
    close(PermutohedralLattice(f[order]).filter(x[order]), fast.filter(x)[order])
    close(fast.filter(x[:, :1]), fast.filter(x)[:, :1])


def test_equal_points_share_and_far_points_do_not():
    f = torch.tensor([[0.3, 0.4], [0.3, 0.4], [90.0, 20.0]], dtype=torch.float64)
    v = torch.tensor([[1.0], [3.0], [7.0]], dtype=torch.float64)
    out = PermutohedralLattice(f).filter(v)
    alone = PermutohedralLattice(f[:1]).filter(torch.ones(1, 1, dtype=torch.float64))
    close(out[0], out[1])
    close(out[0], 4 * alone[0])


@pytest.mark.parametrize(
    ("d", "n", "extent", "mean", "worst"),
    [(1, 200, 6, 0.002, 0.006), (2, 400, 6, 0.004, 0.02), (5, 1500, 4, 0.005, 0.03)],
)
def test_error_against_the_dense_gaussian(d, n, extent, mean, worst):
    """What the lattice approximates: weighted means of values in [0, 1], and how closely."""
    f = torch.rand(n, d, generator=seeded(d), dtype=torch.float64) * extent
    v = torch.rand(n, 1, generator=seeded(d + 1), dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(f, f).square() / 2)
    exact = kernel @ v / kernel.sum(1, keepdim=True)
    fast = PermutohedralLattice(f)
    error = (fast.filter(v) / fast.filter(torch.ones_like(v)) - exact).abs()
    assert error.mean() < mean
    assert error.max() < worst
    assert (fast.filter(v) - v).abs().mean() > 10 * mean  # it does blur


def test_dtypes_and_empty_inputs():
    f = torch.randn(5, 2)
    fast = PermutohedralLattice(f)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert fast.filter(torch.ones(5, 1, dtype=dtype)).dtype == torch.float32
    assert fast.filter(torch.ones(5, 1, dtype=torch.float64)).dtype == torch.float64
    assert fast.filter(torch.ones(5, 0)).shape == (5, 0)
    half = PermutohedralLattice(f.half())
    close(
        half.filter(torch.ones(5, 1)),
        PermutohedralLattice(f.half().float()).filter(torch.ones(5, 1)),
    )
    empty = PermutohedralLattice(torch.zeros(0, 3))
    assert empty.size == 0
    assert empty.filter(torch.zeros(0, 4)).shape == (0, 4)


def test_a_lattice_over_values_that_are_not_contiguous():
    f = torch.randn(6, 2, generator=seeded(0))
    v = torch.randn(3, 6, generator=seeded(1)).T
    fast = PermutohedralLattice(f)
    close(fast.filter(v), fast.filter(v.contiguous()))


@pytest.mark.parametrize(
    ("features", "groups", "error", "message"),
    [
        (torch.zeros(3), None, ValueError, r"features must have shape \(n, d\), got \(3,\)"),
        (torch.zeros(3, 0), None, ValueError, "features must have at least one column, got 0"),
        (torch.zeros(3, 2, dtype=torch.long), None, TypeError, "features must have a floating"),
        (torch.full((3, 2), torch.nan), None, ValueError, "features must be finite"),
        (torch.zeros(3, 2), torch.zeros(2).long(), ValueError, r"groups must have shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "groups must have an integer dtype"),
        ([[0.0]], None, TypeError, "features must be a Tensor, got list"),
    ],
)
def test_bad_points(features, groups, error, message):
    with pytest.raises(error, match=message):
        PermutohedralLattice(features, groups)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.zeros(2, 1), ValueError, r"values must have shape \(3, C\), got \(2, 1\)"),
        (torch.zeros(3, 1).long(), TypeError, "values must have a floating-point dtype"),
        (torch.zeros(3), ValueError, r"values must have shape \(3, C\), got \(3,\)"),
    ],
)
def test_bad_values(values, error, message):
    with pytest.raises(error, match=message):
        PermutohedralLattice(torch.zeros(3, 2)).filter(values)


@pytest.mark.cuda
def test_cuda_is_cpu():
    f = torch.randn(500, 5, generator=seeded(0))
    v = torch.randn(500, 3, generator=seeded(1))
    out = PermutohedralLattice(f.cuda()).filter(v.cuda())
    close(out.cpu(), PermutohedralLattice(f).filter(v), tolerance=1e-4)
