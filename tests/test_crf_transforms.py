"""The CRF under torch.func, and its weights as parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from assertions import close
from bapnal.crf import DenseCRF, PairwiseTerm, PermutohedralLattice, dense_crf
from strategies import seeded

# Of PyTorch about itself, where it loads its rules for forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

SIZE = (5, 6)
IMAGES = (torch.rand(2, 3, *SIZE, generator=seeded(0)) * 255).byte()
P = torch.randn(2, 3, *SIZE, generator=seeded(1), dtype=torch.float64).softmax(1)
DIRECTION = torch.randn(2, 3, *SIZE, generator=seeded(2), dtype=torch.float64)


def run(scores, weight=4.0):
    return dense_crf(IMAGES, scores.softmax(1), bilateral_weight=weight, iterations=3)


def objective(scores):
    return (run(scores) * DIRECTION).sum()


def difference(step=1e-6):
    """The derivative along ``DIRECTION`` by central differences."""
    scores = P.log()
    return (run(scores + step * DIRECTION) - run(scores - step * DIRECTION)) / (2 * step)


@pytest.fixture
def lattice():
    return PermutohedralLattice(torch.randn(20, 3, generator=seeded(3), dtype=torch.float64))


def test_grad_of_torch_func_is_the_gradient():
    scores = P.log()
    leaf = scores.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(leaf), leaf)
    close(torch.func.grad(objective)(scores), expected)
    weight = torch.tensor(2.0, dtype=torch.float64)
    slope = torch.func.grad(lambda w: (run(scores, w) * DIRECTION).sum())(weight)
    step = 1e-6
    values = [(run(scores, weight + s) * DIRECTION).sum() for s in (step, -step)]
    close(slope, (values[0] - values[1]) / (2 * step), tolerance=1e-6)


def test_jvp_is_the_derivative_along_a_direction():
    scores = P.log()
    value, slope = torch.func.jvp(run, (scores,), (DIRECTION,))
    close(value, run(scores))
    close(slope, difference(), tolerance=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scores, DIRECTION)
        close(forward_ad.unpack_dual(run(dual)).tangent, slope)


def test_vmap_over_probabilities_is_one_after_the_other():
    many = torch.randn(4, 2, 3, *SIZE, generator=seeded(4), dtype=torch.float64)
    expected = torch.stack([run(scores) for scores in many])
    close(torch.func.vmap(run)(many), expected)
    close(torch.func.vmap(run, in_dims=2, out_dims=1)(many.movedim(0, 2)), expected.movedim(0, 1))
    gradients = torch.func.vmap(torch.func.grad(objective))(many)
    close(gradients[1], torch.func.grad(objective)(many[1]))


def test_vmap_over_images_is_refused_in_one_line():
    images = IMAGES.expand(4, *IMAGES.shape)
    with pytest.raises(ValueError, match=r"^images must not be mapped by vmap.*use a batch$"):
        torch.func.vmap(lambda x: dense_crf(x, P))(images)
    valid = torch.ones(4, 2, *SIZE, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^valid must not be mapped by vmap.*use a batch$"):
        torch.func.vmap(lambda v: dense_crf(IMAGES, P, v))(valid)
    with pytest.raises(ValueError, match=r"^features must not be mapped by vmap"):
        torch.func.vmap(PermutohedralLattice)(torch.rand(4, 20, 3))


def test_the_filter_under_transforms(lattice):
    v, w = torch.randn(2, 20, 2, generator=seeded(5), dtype=torch.float64)
    close(torch.func.jvp(lattice.filter, (v,), (w,))[1], lattice.filter(w))
    transposed = torch.func.vjp(lattice.filter, v)[1](w)[0]
    leaf = v.clone().requires_grad_()
    close(transposed, torch.autograd.grad(lattice.filter(leaf), leaf, w)[0])
    many = torch.stack([v, w, v - w])
    for dim in (0, 1, 2):
        mapped = torch.func.vmap(lattice.filter, in_dims=dim)(many.movedim(0, dim))
        close(mapped, torch.stack([lattice.filter(x) for x in many]))
    jacobian = torch.func.jacrev(lattice.filter)(v)
    close(jacobian, torch.func.jacfwd(lattice.filter)(v))
    assert torch.autograd.gradcheck(lattice.filter, (leaf,), check_forward_ad=True)


# ---------------------------------------------------------------------------- weights of terms


def weighted():
    return [
        PairwiseTerm(nn.Parameter(torch.tensor(2.0)), xy=3.0),
        PairwiseTerm(torch.tensor([1.0, 2.0, 3.0]), 5.0, 30.0),
        PairwiseTerm(1.5, xy=2.0),
    ]


def test_weights_of_terms_are_parameters_and_learn():
    crf = DenseCRF(terms=weighted(), iterations=2)
    assert [name for name, _ in crf.named_parameters()] == ["terms_0_weight"]
    assert list(crf.state_dict()) == ["terms_0_weight"]
    optimizer = torch.optim.SGD(crf.parameters(), lr=1.0)
    before = crf(IMAGES, P.float())
    before[:, 0].sum().backward()
    optimizer.step()
    assert crf.terms[0].weight != 2
    assert not torch.allclose(crf(IMAGES, P.float()), before)
    twin = DenseCRF(terms=weighted(), iterations=2)
    twin.load_state_dict(crf.state_dict())
    assert torch.equal(twin(IMAGES, P), crf(IMAGES, P))
    assert torch.equal(copy.deepcopy(crf)(IMAGES, P), crf(IMAGES, P))
    assert "terms_0_weight" not in repr(crf)


def test_weights_of_terms_move_with_the_module():
    crf = DenseCRF(terms=weighted()).to("meta")
    assert [term.weight.device.type for term in crf.terms[:2]] == ["meta", "meta"]
    crf = DenseCRF(bilateral_weight=torch.ones(3)).to("meta")
    assert crf.bilateral_weight.device.type == "meta"
    assert not crf.state_dict()
    crf = DenseCRF(terms=weighted()).double()
    assert [term.weight.dtype for term in crf.terms[:2]] == [torch.float64] * 2


def test_a_module_with_terms_is_the_function():
    terms = weighted()
    expected = dense_crf(IMAGES, P, terms=terms)
    assert torch.equal(DenseCRF(terms=terms)(IMAGES, P), expected)
    assert DenseCRF(terms=terms).terms == terms
    assert DenseCRF().terms is None
