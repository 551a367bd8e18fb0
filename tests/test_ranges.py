"""Values of any size: the whole range of each dtype, boxes of half precision, far coordinates."""

import math

import pytest
import torch

from assertions import Largest, close, finite, finite_gradients
from bapnal import (
    PRESETS,
    CosineClassifier,
    DenseCRF,
    NoiseAwareLoss,
    PairwiseTerm,
    PermutohedralLattice,
    _checks,
    background_attention,
    background_aware_pooling,
    box_bins,
    box_cells,
    box_classification_loss,
    box_targets,
    cosine_similarity,
    definite_background,
    dense_crf,
    paint_boxes,
    pseudo_labels,
)
from strategies import seeded

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def powers(dtype):
    """Powers of ten from the subnormal numbers of a dtype to the end of its range."""
    info = torch.finfo(dtype)
    low, high = math.floor(math.log10(info.tiny)) - 3, math.floor(math.log10(info.max))
    return range(low, high + 1, max((high - low) // 40, 1))


def directions(seed, *shape):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=1
    )


# ------------------------------------------------------------------------- lengths of vectors


@pytest.mark.parametrize("length", [1e-23, 1e-20, 1e-15, 3e-14, 1e-12, 1.8e19, 3e38])
def test_attention_of_short_and_long_vectors_has_a_gradient(length):
    x = torch.full((1, 2, 1, 2), length)
    background = torch.tensor([[[[1.0, 0.0]]]])
    (gradient,) = finite_gradients(lambda f: background_attention(f, background).map[..., 0], x)
    assert (gradient == 0).all()
    found = background_attention(x, background, grid_size=1).map
    assert found[..., 1].item() == pytest.approx(float(length >= 1e-12), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_cosines_do_not_depend_on_length(dtype):
    unit = directions(1, 2, 4, 3, 3)
    weight = directions(2, 3, 4)
    background = (torch.rand(2, 1, 3, 3, generator=seeded(3)) < 0.4).double()
    attention = background_attention(unit, background, grid_size=2).map
    cosine = cosine_similarity(unit, weight)
    for power in powers(dtype):
        x = (unit * 10.0**power).to(dtype)
        w = (weight * 10.0**power).to(dtype)
        found = background_attention(x, background, grid_size=2)
        finite(*found[:2])
        finite(cosine_similarity(x, w))
        finite_gradients(lambda f: background_attention(f, background, grid_size=2).map, x)
        finite_gradients(cosine_similarity, x, w)
        if power >= -11 and power > math.log10(torch.finfo(dtype).tiny) + 1:
            tolerance = 0.03 if dtype in (torch.float16, torch.bfloat16) else 1e-5
            close(found.map.double(), attention, tolerance=tolerance)
            close(cosine_similarity(x, w).double(), cosine, tolerance=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_vectors_scale_with_the_features(dtype):
    unit = directions(1, 2, 4, 6, 6)
    boxes = [torch.tensor([[1.0, 1.0, 4.0, 5.0], [0.0, 0.0, 6.0, 3.0]]), torch.zeros(0, 4)]
    for output_size in (1, 2):
        expected = background_aware_pooling(unit, boxes, (6, 6), output_size=output_size)
        for power in powers(dtype):
            x = (unit * 10.0**power).to(dtype)
            out = background_aware_pooling(x, boxes, (6, 6), output_size=output_size)
            finite(*(part for part in out if part.is_floating_point()))
            if power <= math.log10(torch.finfo(dtype).max) / 2:  # beyond, r times r overflows
                finite_gradients(lambda f: background_aware_pooling(f, boxes, (6, 6)).foreground, x)
            if power >= -11 and power > math.log10(torch.finfo(dtype).tiny) + 1:
                tolerance = 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-5
                found = out.foreground.double() / 10.0**power
                close(found, expected.foreground, tolerance=tolerance)


@pytest.mark.parametrize("length", [1e-38, 1e-23, 1e-14, 1e-12, 1e-6, 1e6, 1e19, 1e38])
def test_the_noise_aware_loss_of_a_cosine_classifier_has_a_gradient(length):
    classifier = CosineClassifier(4, 3)
    nal = NoiseAwareLoss()
    x = (directions(1, 2, 4, 3, 3) * length).float()
    y_crf, y_ret = torch.randint(0, 3, (2, 2, 5, 5), generator=seeded(2))
    finite_gradients(
        lambda f: nal(classifier(f), classifier.similarity(f), y_crf, y_ret),
        x,
    )


def test_a_gradient_that_comes_in_large_goes_out_finite():
    """As under a scaler of losses: 2^16 times 1e12, the inverse of the shortest length."""
    x = torch.full((1, 4), 2e-12)
    x[:, 0] = 1e-12
    finite_gradients(lambda f: 65536.0 * cosine_similarity(f, torch.eye(4)), x)


# -------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_boxes_are_rasterised_in_float32(dtype):
    box = torch.tensor([100.0, 100.0, 200.0, 200.0], dtype=dtype)
    assert box_cells(box, (500, 500), (500, 500)).sum() == 10_000
    assert definite_background([box[None]], (500, 500)).sum() == 500 * 500 - 10_000
    assert (paint_boxes(box[None], torch.tensor([3]), (500, 500)) == 3).sum() == 10_000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2, 3, 7])
def test_bins_of_boxes_of_any_size_are_finite(dtype, bins):
    most = torch.finfo(dtype).max
    box = torch.tensor([-most, 0.0, most, most], dtype=dtype)
    found = box_bins(box, bins)
    finite(found)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found[0, 0] == box[0]
    assert found[-1, 2:].tolist() == box[2:].tolist()
    if bins == 1:
        assert found[0].tolist() == box.tolist()


def test_integer_boxes_are_boxes():
    box = torch.tensor([1, 2, 5, 4])
    assert torch.equal(box_cells(box, (6, 6), (6, 6)), box_cells(box.float(), (6, 6), (6, 6)))
    assert torch.equal(box_bins(box, 2), box_bins(box.float(), 2))


def test_half_boxes_under_autocast():
    x = torch.rand(2, 3, 4, 4)
    boxes = [torch.tensor([[4.0, 4.0, 12.0, 12.0]]).half(), torch.zeros(0, 4).half()]
    expected = background_aware_pooling(x, boxes, (16, 16)).foreground
    with torch.autocast("cpu", torch.bfloat16):
        found = background_aware_pooling(x, boxes, (16, 16)).foreground
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------- losses and settings


def test_a_loss_of_boxes_keeps_the_precision_of_its_features():
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=seeded(0))
    boxes, labels = [torch.tensor([[4.0, 4.0, 12.0, 12.0]])], [torch.tensor([1])]
    out = background_aware_pooling(x, boxes, (16, 16))
    weight = torch.rand(3, 3, generator=seeded(1))
    loss = box_classification_loss(out, weight, labels)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, box_classification_loss(out, weight.double(), labels))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: NoiseAwareLoss(balance=v), "balance"),
        (lambda v: NoiseAwareLoss(gamma=v), "gamma"),
        (lambda v: CosineClassifier(4, 3, scale=v), "scale"),
        (lambda v: DenseCRF(bilateral_weight=v), "bilateral_weight"),
        (lambda v: DenseCRF(gaussian_weight=v), "gaussian_weight"),
        (lambda v: DenseCRF(bilateral_xy=v), "bilateral_xy"),
        (lambda v: DenseCRF(terms=[PairwiseTerm(v, xy=3)]), r"terms\[0\].weight"),
        (lambda v: DenseCRF(terms=[PairwiseTerm(1.0, xy=v)]), r"terms\[0\].xy"),
        (lambda v: DenseCRF(terms=[PairwiseTerm(1.0, None, [v])]), r"terms\[0\].guidance\[0\]"),
    ],
)
@pytest.mark.parametrize("value", [math.inf, 1e39, 10**400], ids=["inf", "1e39", "10^400"])
def test_settings_are_finite(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        make(value)


# ------------------------------------------------------------------------------ the lattice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 1])
def test_points_too_far_to_tell_apart_are_refused(dtype, place):
    bound = {torch.float32: 2**18, torch.float64: 2**28}[dtype]
    f = torch.zeros(3, 2, dtype=dtype)
    for far in (bound, -bound):
        f[1, place] = far
        out = PermutohedralLattice(f).filter(torch.ones(3, 1, dtype=dtype))
        finite(out)
        alone = PermutohedralLattice(f[1:2]).filter(torch.ones(1, 1, dtype=dtype))
        close(out[1], alone[0], tolerance=1e-5)
    for far in (1.01 * bound, 1e30):
        f[1, place] = far
        with pytest.raises(ValueError, match="features must be finite and lie within"):
            PermutohedralLattice(f)


SMALL = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
SMALL[..., 2:] = 200
EVEN = torch.full((1, 2, 4, 5), 0.5)


@pytest.mark.parametrize("tiny", [1e-7, 1e-39, 1e-300])
@pytest.mark.parametrize("name", ["bilateral_rgb", "bilateral_xy", "gaussian_xy"])
def test_widths_too_small_for_the_image_are_named(name, tiny):
    with pytest.raises(ValueError, match=rf"^{name} must be >= .* got {tiny}"):
        dense_crf(SMALL, EVEN, **{name: tiny})


@pytest.mark.parametrize("width", [1e-6, [1.0, 1.0, 1e-6]])
@pytest.mark.parametrize("images", [SMALL, SMALL.float(), SMALL.double() * 1e6])
def test_guidance_too_far_for_its_width_is_named(width, images):
    with pytest.raises(ValueError, match=r"^terms\[0\].guidance must be >= "):
        dense_crf(images, EVEN, terms=[PairwiseTerm(1.0, 3.0, width)])
    finite(dense_crf(SMALL * 0.0, EVEN, terms=[PairwiseTerm(1.0, 3.0, width)]))


def test_widths_at_the_bound_still_compute():
    q = dense_crf(SMALL, EVEN, bilateral_rgb=255 / 2**18, gaussian_xy=4 / 2**18)
    finite(q)
    close(q, EVEN)


def test_far_groups_do_not_see_each_other():
    f = torch.zeros(4, 2)
    v = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    for groups in ([0, 1, 2**30, 2**31], [5, 6, 2**62, 2**62 + 1], [3, 2, 1, 0]):
        out = PermutohedralLattice(f, torch.tensor(groups)).filter(v)
        alone = PermutohedralLattice(f[:1]).filter(v[:1])
        close(out, v * alone, tolerance=1e-6)
    groups = torch.tensor([0, 2**30, 2**30, 0])
    out = PermutohedralLattice(torch.randn(4, 5, generator=seeded(0)) * 1e4, groups).filter(v)
    finite(out)
    with pytest.raises(ValueError, match=r"groups must be in 0..9223372036854775807, got -1"):
        PermutohedralLattice(f, torch.tensor([0, -1, 0, 1]))


@pytest.mark.parametrize("weight", [1e30, -1e30])
def test_the_largest_weights_give_finite_marginals(weight):
    p = torch.rand(1, 3, 4, 5, generator=seeded(0)).softmax(1)
    q = dense_crf(SMALL, p, bilateral_weight=weight, gaussian_weight=weight)
    finite(q)
    close(q.sum(1), torch.ones(1, 4, 5), tolerance=1e-5)


# ----------------------------------------------------------------------------- pseudo labels


def labelled(labels, weight=None, **options):
    """Labels of one image with three boxes side by side."""
    boxes = [torch.tensor([[0.0, 0.0, 4.0, 8.0], [4.0, 0.0, 8.0, 8.0], [9.0, 0.0, 12.0, 8.0]])]
    images = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    x = torch.randn(1, 3, 2, 4, generator=seeded(1))
    return pseudo_labels(images, x, weight, boxes, [labels], crf=None, **options)


@pytest.mark.parametrize("most", [10**6, 10**8, 2**31 - 1])
def test_memory_follows_the_boxes_not_the_labels(most):
    small, large = torch.tensor([3, 1, 3]), torch.tensor([most, 1, most])
    expected = labelled(small)
    with Largest() as largest:
        found = labelled(large)
    assert largest.elements < 10_000
    assert found.classes.tolist() == [[1, most]]
    for a, b in ((found.crf, expected.crf), (found.retrieval, expected.retrieval)):
        assert torch.equal(a, torch.where(b == 3, most, b))


def test_classes_need_not_be_counted(monkeypatch):
    """Where the host cannot look, as on a GPU, there are as many channels as boxes."""
    labels = torch.tensor([3, 1, 3])
    weight = torch.randn(4, 3, generator=seeded(2))
    for w in (None, weight):
        expected = labelled(labels, w)
        with monkeypatch.context() as patch:
            patch.setattr(_checks, "readable", lambda x: False)
            found = labelled(labels, w)
        assert expected.classes.tolist() == [[1, 3]]
        assert found.classes.tolist() == [[1, 3, 0]]
        assert torch.equal(found.crf, expected.crf)
        assert torch.equal(found.retrieval, expected.retrieval)
        close(found.foreground_unary[:, :2], expected.foreground_unary, tolerance=1e-6)
        assert (found.foreground_unary[:, 2] == 0).all()


@pytest.mark.parametrize("normalization", ["class", "box"])
@pytest.mark.parametrize("peak", [1e-45, 3e-39, 1e-30, 1.0, 1e30])
def test_activations_of_any_size_peak_at_one(normalization, peak):
    x = torch.ones(1, 1, 1, 2)
    weight = torch.tensor([[0.0], [peak]])
    y = pseudo_labels(
        torch.zeros(1, 3, 1, 4, dtype=torch.uint8),
        x,
        weight,
        [torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0]])],
        [torch.tensor([1, 1])],
        crf=None,
        **{**PRESETS["paper"], "cam_normalization": normalization},
    )
    finite(y.background_unary, y.foreground_unary)
    close(y.foreground_unary.flatten(), [1.0, 1.0, 1.0, 0.0], tolerance=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_unaries_of_features_of_any_size_are_finite(dtype, weighted):
    labels = torch.tensor([3, 1, 3])
    unit = directions(1, 1, 3, 2, 4)
    boxes = [torch.tensor([[0.0, 0.0, 4.0, 8.0], [4.0, 0.0, 8.0, 8.0], [9.0, 0.0, 12.0, 8.0]])]
    images = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    weight = torch.randn(4, 3, generator=seeded(2)).to(dtype) if weighted else None
    for options in ({}, PRESETS["paper"], PRESETS["released"]):
        for power in powers(dtype)[:-1]:  # scores of the largest features are infinite
            x = (unit * 10.0**power).to(dtype)
            y = pseudo_labels(images, x, weight, boxes, [labels], crf=None, **options)
            finite(y.background_unary, y.foreground_unary)
            assert set(y.crf.unique().tolist()) <= {0, 1, 3}
            assert set(y.retrieval.unique().tolist()) <= {0, 1, 3}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", ["one", "all"])
@pytest.mark.parametrize("weighted", [True, False])
def test_features_that_are_not_finite_still_give_labels_of_the_image(wrong, share, weighted):
    """NaN has no bin of a histogram; on a GPU an index outside of it ends the process."""
    labels = torch.tensor([3, 1, 3])
    boxes = [torch.tensor([[0.0, 0.0, 4.0, 8.0], [4.0, 0.0, 8.0, 8.0], [9.0, 0.0, 12.0, 8.0]])]
    images = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    weight = torch.randn(4, 3, generator=seeded(2)) if weighted else None
    x = torch.randn(1, 3, 2, 4, generator=seeded(1))
    x[(..., 0, 0) if share == "one" else ...] = wrong
    for options in ({}, PRESETS["paper"], PRESETS["released"]):
        y = pseudo_labels(images, x, weight, boxes, [labels], crf=None, **options)
        assert set(y.crf.unique().tolist()) <= {0, 1, 3}
        assert set(y.retrieval.unique().tolist()) <= {0, 1, 3}
    targets, known = box_targets(x, boxes, [labels], (8, 16), 4)
    assert targets.shape == (1, 4, 2, 4)
    assert known.any()
