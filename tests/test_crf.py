"""DenseCRF: the naive form, its laws, its corners, its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from assertions import close, finite
from bapnal.crf import DenseCRF, PairwiseTerm, dense_crf, mean_field
from crf_images import DEFAULTS, draw_images, naive
from strategies import seeded


@given(
    st.integers(0, 2**20),
    st.integers(1, 2),
    st.integers(1, 4),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_is_the_naive_form(seed, batch, classes, size):
    images, p = draw_images(seed, batch, classes, size)
    q = dense_crf(images, p)
    for b in range(batch):
        close(q[b], naive(images[b], p[b], DEFAULTS))
    close(q.sum(1), torch.ones(batch, *size))


def test_settings_reach_the_naive_form():
    images, p = draw_images(1, 1)
    settings = {
        "bilateral_weight": 2.5,
        "bilateral_xy": 7,
        "bilateral_rgb": 20,
        "gaussian_weight": 1.5,
        "gaussian_xy": 2,
        "iterations": 3,
    }
    expected = naive(images[0], p[0], [(1.5, 2.0, None), (2.5, 7.0, 20.0)], 3)
    close(dense_crf(images, p, **settings)[0], expected)
    close(DenseCRF(**settings)(images, p)[0], expected)


def test_module_has_the_defaults_of_the_function():
    images, p = draw_images(2)
    assert torch.equal(DenseCRF()(images, p), dense_crf(images, p))


def test_gradients_are_those_of_the_naive_form():
    images, p = draw_images(3, 1, size=(6, 5))
    p.requires_grad_()
    w = torch.randn(p.shape, generator=seeded(4), dtype=torch.float64)
    fast = torch.autograd.grad((dense_crf(images, p) * w).sum(), p)[0]
    slow = torch.autograd.grad((naive(images[0], p[0], DEFAULTS) * w[0]).sum(), p)[0]
    close(fast, slow)
    finite(fast)


def test_gradcheck_in_probabilities_and_weights():
    images, p = draw_images(5, 1, 2, (3, 4))
    scores = p.log().requires_grad_()
    bilateral = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([[0.0, 1.0], [0.5, -1.0]], dtype=torch.float64, requires_grad=True)

    def run(scores, bilateral, classes, matrix):
        terms = [
            PairwiseTerm(bilateral, xy=5, guidance=60),
            PairwiseTerm(classes, xy=2),
            PairwiseTerm(matrix, guidance=(30, 40, 50)),
        ]
        return dense_crf(images, scores.softmax(1), iterations=3, terms=terms)

    assert gradcheck(run, (scores, bilateral, classes, matrix))


def test_weights_can_be_learned():
    crf = DenseCRF(bilateral_weight=nn.Parameter(torch.tensor(4.0)), iterations=2)
    assert [name for name, _ in crf.named_parameters()] == ["bilateral_weight"]
    images, p = draw_images(6, dtype=torch.float32)
    crf(images, p)[:, 0].sum().backward()
    assert crf.bilateral_weight.grad.abs() > 0
    close(crf(images, p).detach(), DenseCRF(iterations=2)(images, p), tolerance=1e-5)


def test_compatibilities_agree_where_they_say_the_same():
    images, p = draw_images(7)
    by = {
        "number": 2.0,
        "tensor": torch.tensor(2.0),
        "classes": torch.full((3,), 2.0),
        "diagonal": -2 * torch.eye(3),
        "penalty": 2 * (1 - torch.eye(3)),
        "asymmetric": -2 * torch.eye(3) + torch.tensor([[0, 1, 0], [-1, 0, 0], [0, 0, 0.0]]),
    }
    results = {
        name: dense_crf(images, p, terms=[PairwiseTerm(weight, 4, 30)])
        for name, weight in by.items()
    }
    for name, q in results.items():
        # Penalties of unlike labels differ from Potts by a constant only if all pixels are alike
        # in number; symmetric normalisation makes the messages sum to less than 1.
        if name != "penalty":
            close(q, results["number"])
    close(results["penalty"], results["number"])


def test_terms_are_the_settings():
    images, p = draw_images(8)
    terms = [PairwiseTerm(3, xy=3), PairwiseTerm(4, xy=55, guidance=3)]
    close(dense_crf(images, p, terms=terms), dense_crf(images, p))
    close(DenseCRF(terms=terms)(images, p), dense_crf(images, p))
    widths = [PairwiseTerm(3, xy=3), PairwiseTerm(4, xy=55, guidance=[3, 3.0, 3])]
    close(dense_crf(images.double(), p, terms=widths), dense_crf(images, p), tolerance=1e-4)
    twice = [PairwiseTerm(2, xy=3), PairwiseTerm(1, xy=3), *terms[1:]]
    close(dense_crf(images, p, terms=twice), dense_crf(images, p))
    close(dense_crf(images, p, terms=[]), dense_crf(images, p, iterations=0))


def test_any_guidance():
    images, p = draw_images(9)
    depth = images[:, :1].float()
    q = dense_crf(depth, p, terms=[PairwiseTerm(4, xy=9, guidance=20)])
    grey = dense_crf(
        torch.cat([depth, torch.zeros_like(depth)], 1),
        p,
        terms=[PairwiseTerm(4, xy=9, guidance=[20.0, 1])],
    )
    close(q.sum(1), torch.ones(2, 9, 12))
    assert not torch.allclose(q, p)
    assert grey.shape == q.shape
    features = torch.randn(2, 7, 9, 12, generator=seeded(1))
    close(
        dense_crf(features, p, terms=[PairwiseTerm(4, guidance=1.0)]),
        dense_crf(features.half().float(), p, terms=[PairwiseTerm(4, guidance=1.0)]),
        tolerance=0.1,
    )
    without = torch.zeros(2, 0, 9, 12)
    close(
        dense_crf(without, p, terms=[PairwiseTerm(3, xy=3)]),
        dense_crf(images, p, bilateral_weight=0),
    )


@given(st.integers(0, 2**20))
def test_a_image_is_the_same_alone_and_in_a_batch(seed):
    images, p = draw_images(seed, 3, 2, (5, 7))
    q = dense_crf(images, p)
    for b in range(3):
        assert torch.equal(q[b : b + 1], dense_crf(images[b : b + 1], p[b : b + 1]))


def test_side_by_side_is_one_after_the_other():
    """What a GPU does, the whole batch in one lattice, on the CPU."""
    images, p = draw_images(10, 3)
    valid = torch.rand(3, 9, 12, generator=seeded(1)) < 0.8
    logits = p.clamp(1e-5, 1).log()
    terms = mean_field.common_terms(4, 55, 3, 3, 3)
    absent = logits.clone()
    absent[0, 2] = -torch.inf  # the first image has two classes only
    two = p[:1, :2] / p[:1, :2].sum(1, keepdim=True)
    for half in (False, True):
        settings = mean_field.checked_settings(terms, True, 10, "torch", half)
        for drop in (False, True):
            for mask in (None, valid):
                q = mean_field.side_by_side(images, logits, mask, settings, {}, drop=drop)
                close(q, dense_crf(images, p, mask, half_resolution=half))
            q = mean_field.side_by_side(images, absent, None, settings, {}, drop=drop)
            alone = dense_crf(images[:1], two, half_resolution=half)
            close(q[0, :2], alone[0], tolerance=1e-3)
            close(q[0, 2], torch.zeros(9, 12))
            close(q[1:], dense_crf(images, p, half_resolution=half)[1:])
        absent[:, 2] = -torch.inf
        most = torch.tensor(2)
        q = mean_field.side_by_side(images, absent, None, settings, {}, most)
        close(q[0, :2], alone[0], tolerance=1e-3)
        close(q[:, 2], torch.zeros(3, 9, 12))
        absent[1:, 2] = logits[1:, 2]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (15, 20), (16, 21)])
def test_half_resolution(size):
    images, p = draw_images(24, 2, 3, size)
    q = dense_crf(images, p, half_resolution=True)
    assert q.shape == p.shape
    close(q.sum(1), torch.ones(2, *size))
    assert torch.equal(q, DenseCRF(half_resolution=True)(images, p))
    small = dense_crf(images[..., ::2, ::2], p[..., ::2, ::2], bilateral_xy=27.5, gaussian_xy=1.5)
    close(q[..., ::2, ::2], small)
    close(
        dense_crf(images, p, half_resolution=True, iterations=0), dense_crf(images, p, iterations=0)
    )


def test_half_resolution_is_near_the_full_one():
    """On an image with structure and scores that are smooth, as a network's are."""
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    inside = ((x - 40) ** 2 + (y - 30) ** 2) < 300
    image = torch.where(inside, 180, 60) + (x * 7 + y * 13) % 5
    image = image.byte().expand(1, 3, 60, 80)
    p = torch.sigmoid((24 - ((x - 43) ** 2 + (y - 28) ** 2).float().sqrt()) / 8)
    p = torch.stack([p, 1 - p])[None]
    q, fast = dense_crf(image, p), dense_crf(image, p, half_resolution=True)
    assert (q.argmax(1) == fast.argmax(1)).double().mean() > 0.98
    assert "half_resolution=True" in repr(DenseCRF(half_resolution=True))


def test_half_resolution_with_padding_and_gradients():
    images, p = draw_images(25, 2, 3, (8, 9))
    valid = torch.zeros(2, 8, 9, dtype=torch.bool)
    valid[:, :6, :7] = True
    q = dense_crf(images, p, valid, half_resolution=True)
    # Beyond the last even row of the image there is none to interpolate with.
    close(
        q[..., :5, :7],
        dense_crf(images[..., :6, :7], p[..., :6, :7], half_resolution=True)[..., :5, :],
    )
    outside = ~valid[:, None].expand_as(p)
    close(q[outside], dense_crf(images, p, iterations=0)[outside])
    p.requires_grad_()
    dense_crf(images, p, half_resolution=True)[:, 0].sum().backward()
    finite(p.grad)
    assert (p.grad != 0).any()


def test_images_with_fewer_classes():
    images, p = draw_images(11, 3)
    p[0, 1:] = 0
    p[0, 0] = 1
    p[1, 2] = 0
    p /= p.sum(1, keepdim=True)
    for counts in ([1, 2, 3], torch.tensor([1, 2, 3])):
        q = dense_crf(images, p, num_classes=counts)
        for b, count in enumerate([1, 2, 3]):
            close(q[b, :count], dense_crf(images[b : b + 1], p[b : b + 1, :count])[0])
            close(q[b, count:], torch.zeros(3 - count, 9, 12))
        assert torch.equal(q, DenseCRF()(images, p, num_classes=counts))
    weighted = [
        PairwiseTerm(torch.tensor([1.0, 2.0, 3.0]), xy=3),
        PairwiseTerm(-torch.eye(3), xy=2),
    ]
    close(
        dense_crf(images, p, terms=weighted, num_classes=[1, 2, 3])[1, :2],
        dense_crf(
            images[1:2],
            p[1:2, :2],
            terms=[
                PairwiseTerm(torch.tensor([1.0, 2.0]), xy=3),
                PairwiseTerm(-torch.eye(2), xy=2),
            ],
        )[0],
    )


@given(st.integers(0, 2**20))
def test_permuting_classes_permutes_marginals(seed):
    images, p = draw_images(seed, 1, 4, (6, 6))
    order = torch.randperm(4, generator=seeded(seed))
    close(dense_crf(images, p[:, order]), dense_crf(images, p)[:, order])


def test_flipping_flips_nearly():
    """The lattice lies askew in the image, so a flip moves points between simplices."""
    images, p = draw_images(12, 1, 3, (20, 24))
    flipped = dense_crf(images.flip(3), p.flip(3)).flip(3)
    q = dense_crf(images, p)
    assert (flipped - q).abs().mean() < 0.05
    assert (flipped.argmax(1) == q.argmax(1)).double().mean() > 0.95


def test_padding_takes_no_part():
    images, p = draw_images(13, 2, 3, (8, 9))
    valid = torch.zeros(2, 8, 9, dtype=torch.bool)
    valid[:, :6, :7] = True
    q = dense_crf(images, p, valid)
    close(q[..., :6, :7], dense_crf(images[..., :6, :7], p[..., :6, :7]))
    outside = ~valid[:, None].expand_as(p)
    close(q[outside], dense_crf(images, p, iterations=0)[outside])
    images[(~valid)[:, None].expand_as(images)] = 7
    p = p.masked_fill(outside, 0.0)
    changed = dense_crf(images, p, valid)
    close(changed[..., :6, :7], q[..., :6, :7])
    close(changed[outside], torch.full_like(changed[outside], 1 / 3))
    nothing = torch.zeros_like(valid)
    close(dense_crf(images, p, nothing), dense_crf(images, p, nothing, iterations=0))
    everything = torch.ones_like(valid)
    images, p = draw_images(13, 2, 3, (8, 9))
    assert torch.equal(dense_crf(images, p, everything), dense_crf(images, p))
