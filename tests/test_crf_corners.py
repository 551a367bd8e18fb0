"""DenseCRF at its corners: small and plain images, dtypes, memory, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from assertions import close, finite
from bapnal.crf import DenseCRF, PairwiseTerm, dense_crf, mean_field, points
from bapnal.crf.lattice import build_lattices
from crf_images import DEFAULTS, draw_images, naive
from strategies import seeded


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


@pytest.fixture
def built(monkeypatch):
    """A function that counts the lattices that a module makes for an image of some width."""
    counts = []

    def counted(features, *args):
        counts.append(len(features))
        return build_lattices(features, *args)

    monkeypatch.setattr(points, "build_lattices", counted)

    def run(crf, width):
        counts.clear()
        images, p = draw_images(23, 1, 3, (4, width))
        crf(images, p)
        return sum(counts)

    return run


def test_a_module_remembers_a_few_lattices_of_positions(built):
    crf = DenseCRF(iterations=2)
    assert [built(crf, width) for width in range(1, 10)] == [2] * 9
    kept = range(10 - points.CACHED_SIZES, 10)
    assert [built(crf, width) for width in kept] == [1] * points.CACHED_SIZES
    assert built(crf, kept[0] - 1) == 2
    for twin in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert built(crf, 9) == 1
        assert built(twin, 9) == 2


def test_what_a_module_remembers_changes_no_result():
    crf = DenseCRF(iterations=2)
    for width in range(1, 10):
        images, p = draw_images(23, 1, 3, (4, width))
        for _ in range(2):
            assert torch.equal(crf(images, p), dense_crf(images, p, iterations=2))
    assert not crf.state_dict()
    for twin in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
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
