"""DenseCRF: the naive form, its laws, its corners, its errors."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from assertions import close, finite
from bapnal.crf import DenseCRF, PairwiseTerm, dense_crf, mean_field, points
from naive_crf import naive_mean_field
from strategies import seeded


def draw_images(seed, batch=2, classes=3, size=(9, 12), dtype=torch.float64):
    """Blocks of colour with some noise, and probabilities that follow them loosely."""
    generator = seeded(seed)
    height, width = size
    blocks = torch.rand(batch, 3, 3, 3, generator=generator) * 200
    images = nn.functional.interpolate(blocks, size, mode="nearest")
    images = (images + 40 * torch.rand(batch, 3, *size, generator=generator)).byte()
    scores = 2 * torch.randn(batch, classes, height, width, generator=generator, dtype=dtype)
    return images, scores.softmax(1)


def naive(image, p, terms, iterations=10):
    """One image by the naive form; ``terms`` are (weight, xy, rgb or None)."""
    _, height, width = p.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    xy = torch.stack([x, y], -1).reshape(-1, 2).float()
    rgb = image.flatten(1).T.float()
    points = [(w, xy / a if c is None else torch.cat([xy / a, rgb / c], 1)) for w, a, c in terms]
    logits = p.clamp(1e-5, 1).log().flatten(1).T
    return naive_mean_field(points, logits, iterations).T.reshape(p.shape)


DEFAULTS = [(3.0, 3.0, None), (4.0, 55.0, 3.0)]


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


def test_zero_iterations_return_the_clipped_input():
    images, p = draw_images(14)
    clipped = p.clamp(1e-5, 1)
    close(dense_crf(images, p, iterations=0), clipped / clipped.sum(1, keepdim=True))
    hard = torch.eye(3, dtype=torch.float64)[p.argmax(1)].movedim(-1, 1)
    q = dense_crf(images, hard)
    finite(q)
    close(q.sum(1), torch.ones(2, 9, 12))


def test_one_class_and_empty_batches_and_one_pixel():
    images, _ = draw_images(15)
    assert torch.equal(dense_crf(images, torch.ones(2, 1, 9, 12)), torch.ones(2, 1, 9, 12))
    assert dense_crf(images[:0], torch.zeros(0, 3, 9, 12)).shape == (0, 3, 9, 12)
    assert dense_crf(images[:0], torch.zeros(0, 3, 9, 12).half()).dtype == torch.float32
    p = torch.tensor([0.7, 0.3]).view(1, 2, 1, 1)
    q = dense_crf(images[:1, :, :1, :1], p)
    close(q.sum(), 1.0, tolerance=1e-6)
    assert q[0, 0] > 0.7  # it hears itself


@pytest.mark.parametrize("size", [(1, 30), (30, 1), (1, 2)])
def test_lines_of_pixels(size):
    images, p = draw_images(16, 1, 3, size)
    close(dense_crf(images, p)[0], naive(images[0], p[0], DEFAULTS))


@pytest.mark.parametrize("kind", ["constant", "grey", "noise"])
def test_plain_images(kind):
    images, p = draw_images(17, 1, 3, (10, 11))
    if kind == "constant":
        images[:] = 113
    elif kind == "grey":
        images = images[:, :1].expand(-1, 3, -1, -1)
    else:
        images = torch.randint(0, 256, images.shape, generator=seeded(1), dtype=torch.uint8)
    close(dense_crf(images, p)[0], naive(images[0], p[0], DEFAULTS))


def test_a_constant_image_with_equal_probabilities_stays():
    images = torch.full((1, 3, 8, 8), 50, dtype=torch.uint8)
    p = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    q = dense_crf(images, p)
    assert (q.argmax(1) == 0).all()
    close(q[:, 1], q[:, 2], tolerance=1e-5)


def test_edges_decide():
    """An image of two halves, and an unsure border that lies in the wrong place."""
    images = torch.zeros(1, 3, 12, 20, dtype=torch.uint8)
    images[..., 10:] = 200
    left = torch.cat([torch.full((7,), 0.8), torch.full((6,), 0.5), torch.full((7,), 0.2)])
    p = torch.stack([left, 1 - left]).view(1, 2, 1, 20).expand(1, 2, 12, 20)
    labels = dense_crf(images, p, gaussian_weight=0.5).argmax(1)
    assert (labels == torch.arange(20) // 10).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    images, p = draw_images(18)
    p = p.to(dtype)
    q = dense_crf(images, p)
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close(q.double(), dense_crf(images, p.double() / p.double().sum(1, True)), tolerance=0.02)
    close(q.sum(1), torch.ones(2, 9, 12), tolerance=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense_crf(images, p), q)


def test_memory_formats():
    images, p = draw_images(19)
    q = dense_crf(images, p)
    last = torch.channels_last
    assert torch.equal(dense_crf(images.to(memory_format=last), p.to(memory_format=last)), q)
    wide = p.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(dense_crf(images, wide), q)


def test_strong_weights_do_not_overflow():
    images, p = draw_images(20, dtype=torch.float32)
    for weight in (500.0, -500.0):
        q = dense_crf(images, p, bilateral_weight=weight)
        finite(q)
        close(q.sum(1), torch.ones(2, 9, 12), tolerance=1e-5)


def test_short_softmax_is_softmax():
    for scale in (1.0, 30.0, 1000.0):
        for classes in (1, 2, 5, 20):
            x = scale * torch.randn(50, classes, generator=seeded(classes), dtype=torch.float64)
            close(mean_field.short_softmax(x), x.softmax(1))
            x.requires_grad_()
            close(mean_field.short_softmax(x), x.softmax(1))


@pytest.mark.parametrize("terms", [0, 1, 2, 3])
@pytest.mark.parametrize("classes", [3, 17])
def test_steps_that_write_over_the_last_are_those_with_a_graph(terms, classes):
    images, p = draw_images(22, classes=classes)
    kept = p.clone()
    chosen = [PairwiseTerm(1.0, 2.0), PairwiseTerm(2.0, 5.0, 20.0), PairwiseTerm(0.5, None, 9.0)]
    settings = {"terms": chosen[:terms], "iterations": 4}
    found = dense_crf(images, p, **settings)
    expected = dense_crf(images, p.clone().requires_grad_(), **settings)
    assert torch.equal(p, kept)
    close(found, expected.detach(), tolerance=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_loss_takes_the_result_as_it_is(batch):
    """The backward pass of nll_loss refuses scores whose channels lie innermost."""
    images, p = draw_images(23, batch)
    p.requires_grad_()
    target = torch.zeros(batch, 9, 12, dtype=torch.long)
    nn.functional.nll_loss(dense_crf(images, p, iterations=1).log(), target).backward()
    finite(p.grad)


def test_no_graph_is_kept_without_need():
    images, p = draw_images(21)
    assert not dense_crf(images, p).requires_grad
    p.requires_grad_()
    assert dense_crf(images, p).requires_grad
    with torch.no_grad():
        assert not dense_crf(images, p).requires_grad
    with torch.inference_mode():
        inside = DenseCRF()
        inside(images, p)
    inside(images, p).sum().backward()  # lattices remembered in inference mode serve gradients
    finite(p.grad)


def test_inputs_are_left_alone():
    images, p = draw_images(22)
    before = images.clone(), p.clone()
    dense_crf(images, p)
    assert torch.equal(images, before[0])
    assert torch.equal(p, before[1])


def test_a_module_remembers_only_lattices():
    crf = DenseCRF(iterations=2)
    for width in range(1, 10):
        images, p = draw_images(23, 1, 3, (4, width))
        for _ in range(2):
            assert torch.equal(crf(images, p), dense_crf(images, p, iterations=2))
    assert len(crf._cache) == points.CACHED_SIZES
    assert not crf.state_dict()
    for twin in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert not twin._cache
        assert torch.equal(twin(images, p), crf(images, p))
    crf.gaussian_xy = 5.0  # settings can be changed; what is remembered does not stand in the way
    assert torch.equal(crf(images, p), dense_crf(images, p, iterations=2, gaussian_xy=5.0))


def test_repr_names_the_settings():
    assert repr(DenseCRF()) == (
        "DenseCRF(bilateral_weight=4.0, bilateral_xy=55.0, bilateral_rgb=3.0, "
        "gaussian_weight=3.0, gaussian_xy=3.0, iterations=10, backend='torch', "
        "half_resolution=False)"
    )
    assert "terms=[PairwiseTerm(weight=1, xy=2, guidance=None)]" in repr(
        DenseCRF(terms=[PairwiseTerm(1, xy=2)])
    )


IMAGES, P = draw_images(0, 2, 3, (4, 5), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": IMAGES.float()}, TypeError, "images must have dtype torch.uint8, got torch.fl"),
        ({"images": IMAGES[:, :1]}, ValueError, r"images must have shape \(B, 3, H, W\), got"),
        ({"images": IMAGES[:1]}, ValueError, r"images must have shape \(2, G, 4, 5\), got"),
        ({"images": IMAGES[..., 1:]}, ValueError, r"images must have shape \(2, G, 4, 5\), got"),
        ({"images": IMAGES.numpy()}, TypeError, "images must be a Tensor, got ndarray"),
        ({"probabilities": P[0]}, ValueError, r"probabilities must have shape \(B, C, H, W\), got"),
        ({"probabilities": P.long()}, TypeError, "probabilities must have a floating-point dtype"),
        ({"probabilities": P[:, :0]}, ValueError, "at least one class and one pixel, got"),
        ({"probabilities": P - 0.5}, ValueError, "probabilities must be >= 0, got -0"),
        ({"probabilities": P * torch.nan}, ValueError, "probabilities must be >= 0, got nan"),
        ({"probabilities": P * 1.1}, ValueError, "probabilities must sum to 1 .* got a sum of 1.1"),
        ({"probabilities": P * torch.inf}, ValueError, "probabilities must sum to 1"),
        ({"valid": torch.ones(2, 4, 5)}, TypeError, "valid must have dtype torch.bool"),
        ({"valid": torch.ones(2, 4, 4).bool()}, ValueError, r"valid must have shape \(2, 4, 5\)"),
        ({"bilateral_xy": 0}, ValueError, "bilateral_xy must be > 0, got 0"),
        ({"bilateral_rgb": -1.0}, ValueError, "bilateral_rgb must be > 0, got -1.0"),
        ({"gaussian_xy": float("nan")}, ValueError, "gaussian_xy must be > 0, got nan"),
        ({"gaussian_weight": "3"}, TypeError, "gaussian_weight must be a number, got str"),
        ({"bilateral_weight": torch.ones(2)}, ValueError, "one entry for each of 3 classes"),
        (
            {"bilateral_weight": torch.ones(2, 3)},
            ValueError,
            r"shape \(\), \(C,\) or \(C, C\), got",
        ),
        ({"bilateral_weight": torch.tensor(1)}, TypeError, "weight must have a floating"),
        ({"iterations": -1}, ValueError, "iterations must be >= 0, got -1"),
        ({"iterations": 1.5}, TypeError, "iterations must be an int, got float"),
        ({"backend": "numpy"}, ValueError, "backend must be one of 'torch', 'pydensecrf', got 'nu"),
        ({"num_classes": [1]}, ValueError, "num_classes must have one number for each of 2 images"),
        ({"num_classes": [1, 4]}, ValueError, "num_classes must be <= 3 channels, got 4"),
        ({"num_classes": [1, 0]}, ValueError, r"num_classes\[1\] must be >= 1, got 0"),
        ({"num_classes": [2, 2]}, ValueError, "probabilities must sum to 1"),
        ({"terms": [(4, 3, 3)]}, TypeError, r"terms\[0\] must be a PairwiseTerm, got tuple"),
        ({"terms": [PairwiseTerm(1.0)]}, ValueError, r"terms\[0\] must have a width over"),
        ({"terms": [PairwiseTerm(1.0, xy=0)]}, ValueError, r"terms\[0\].xy must be > 0, got 0"),
        ({"terms": [PairwiseTerm(1.0, 3, [1, 2])]}, ValueError, "one width for each of 3 channels"),
        ({"terms": [PairwiseTerm(1.0, 3, [1, 2, 0])]}, ValueError, r"guidance\[2\] must be > 0"),
        ({"terms": [PairwiseTerm(1.0, 3, -1)]}, ValueError, r"terms\[0\].guidance must be > 0"),
        (
            {"terms": [PairwiseTerm(1.0, 3)], "images": IMAGES.long()},
            TypeError,
            "images must have dtype torch.uint8 or floating, got torch.int64",
        ),
        (
            {"terms": [PairwiseTerm(1.0, 3, 1)], "images": IMAGES[:, :0]},
            ValueError,
            r"terms\[0\].guidance needs a guidance with channels, got 0",
        ),
        (
            {"terms": [PairwiseTerm(1.0, 3, 1)], "images": IMAGES / 0.0},
            ValueError,
            "images must be finite",
        ),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        dense_crf(**{"images": IMAGES, "probabilities": P, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bilateral_xy": -3}, ValueError, "bilateral_xy must be > 0, got -3"),
        ({"iterations": True}, TypeError, "iterations must be an int, got bool"),
        ({"backend": None}, ValueError, "backend must be one of"),
        ({"terms": [PairwiseTerm(1.0)]}, ValueError, r"terms\[0\] must have a width over"),
    ],
)
def test_a_module_checks_its_settings_at_once(changes, error, message):
    with pytest.raises(error, match=message):
        DenseCRF(**changes)


@pytest.mark.cuda
def test_cuda_is_cpu():
    images, p = draw_images(30, 3, 4, (40, 50), torch.float32)
    valid = torch.rand(3, 40, 50, generator=seeded(1)) < 0.9
    q = dense_crf(images.cuda(), p.cuda(), valid.cuda())
    assert (q.cpu() - dense_crf(images, p, valid)).abs().mean() < 1e-5
    two = p.clone()
    two[0, 2:] = 0
    two /= two.sum(1, keepdim=True)
    q = dense_crf(images.cuda(), two.cuda(), num_classes=[2, 4, 4])
    assert (q.cpu() - dense_crf(images, two, num_classes=[2, 4, 4])).abs().mean() < 1e-5
