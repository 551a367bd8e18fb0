"""Unaries over the whole range of floats."""

import itertools

import pytest
import torch

from assertions import Largest, close, finite
from bapnal import PRESETS, pseudo_labels
from labelling import fixed, images_of, labels_of, weight_of
from strategies import seeded

TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
CORNERS = (
    {},
    {"unary_softmax": 9.0, "background_minmax": False},
    {"foreground": "cam", "cam_normalization": "box"},
    {**PRESETS["paper"]},
    {**PRESETS["released"], "background": "both"},
    {"valid": torch.zeros(2, 8, 8, dtype=torch.bool)},
)


def corner(features, weight, boxes, kwargs):
    """Labels of two images of 8 x 8, whose unaries must be in [0, 1]."""
    labels = [torch.arange(len(x)) + 1 for x in boxes]
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    seen = []

    def crf(images, probabilities, valid=None):
        seen.append(probabilities)
        return probabilities

    y = pseudo_labels(images, features, weight, boxes, labels, crf=crf, **kwargs)
    for part in (y.background_unary, y.foreground_unary, *seen):
        finite(part)
        assert part.min() >= 0
        assert part.max() <= 1
    for p in seen:
        close(p.sum(1), torch.ones_like(p[:, 0]), tolerance=1e-6)
    assert set(y.crf.unique().tolist()) <= {0, 1, 2, 255}
    assert set(y.retrieval.unique().tolist()) <= {0, 1, 2, 255}
    return y


@pytest.mark.parametrize("kwargs", CORNERS)
def test_corners_are_finite(kwargs):
    generator = seeded(7)
    for features in (
        torch.zeros(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4),
        -torch.ones(2, 3, 4, 4),
        torch.rand(2, 3, 4, 4, generator=generator) * 1e-30,
        torch.rand(2, 3, 4, 4, generator=generator) * 1e15,
        torch.rand(2, 3, 1, 1, generator=generator),
    ):
        for weight in (torch.zeros(4, 3), torch.rand(4, 3), -torch.rand(4, 4), None):
            for boxes in (
                [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.zeros(0, 4)],
                [torch.tensor([[3.0, 3.0, 3.0, 3.0], [50, 50, 60, 60]]), torch.zeros(0, 4)],
            ):
                y = corner(features, weight, boxes, kwargs)
                if "valid" in kwargs:
                    assert (y.crf == 255).all()


@pytest.mark.parametrize("kwargs", CORNERS[:5])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (1e-45, 1e-42, TINY, 1e-30, 1e-20, 1e20, 1e30, HUGE)),
        (torch.float16, (6e-8, 6e-5, 1.0, 65504.0)),
        (torch.bfloat16, (1e-40, TINY, 1e20, 3e38)),
        (torch.float64, (5e-324, 1e-300, 1e-160, 1e160, 1e308)),
    ],
)
def test_unaries_are_finite_over_the_whole_range(dtype, sizes, kwargs):
    """Features and weights of any size, their products beyond the range, peaks below it."""
    generator = seeded(8)
    signs = torch.rand(2, 5, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    rows = torch.rand(4, 6, generator=generator, dtype=torch.float64) * 2 - 1
    boxes = [torch.tensor([[1.0, 1, 6, 7], [3, 2, 8, 6]]), torch.tensor([[2.0, 1, 7, 7]])]
    for a, b in itertools.product(sizes, sizes):
        for weight in ((rows[:, :5] * b).to(dtype), (rows * b).to(dtype)):
            corner((signs * a).to(dtype), weight, boxes, kwargs)
    for a in sizes:
        corner((signs * a).to(dtype), None, boxes, {**kwargs, "background": "both"})


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("preset", [{}, PRESETS["paper"], PRESETS["released"]])
def test_labels_are_the_same_at_any_size_of_the_features(size, preset):
    """Scores are compared with each other only, so their size says nothing."""
    scene = fixed()
    cells = (scene.features * 64).round().clamp(-200, 200)  # few digits: as exact when denormal
    weight = weight_of(scene).float()
    small = scene.replace(features=(cells / 256).float())
    expected = labels_of(small, weight, **preset)
    found = labels_of(
        scene.replace(features=(cells.double() / 256 * size).float()), weight, **preset
    )
    tolerance = 0.05 if size < 1e-40 else 1e-5
    if size > 1e-37:  # shorter vectors count as zero, so their cosines are 0
        close(found.background_unary, expected.background_unary, tolerance=tolerance)
    if preset:
        close(found.foreground_unary, expected.foreground_unary, tolerance=tolerance)


@pytest.mark.parametrize("peak", [1e-45, 1e-40, 2.9e-39, 1e-38])
def test_a_peak_of_any_size_becomes_one(peak):
    """The reciprocal of a denormal number is beyond the range of float32."""
    features = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
    weight = torch.tensor([[0.0], [peak]])
    for name in ("class", "box"):
        y = pseudo_labels(
            torch.zeros(1, 3, 1, 3, dtype=torch.uint8),
            features,
            weight,
            [torch.tensor([[0.0, 0.0, 3.0, 1.0]])],
            [torch.tensor([1])],
            crf=None,
            foreground="cam",
            cam_normalization=name,
        )
        u = y.foreground_unary.flatten()
        assert u[2] == 1
        assert u[0] == 0
        if peak > 1e-44:
            close(u[1], torch.tensor(0.5), tolerance=1e-4)


def test_a_constant_attention_scales_to_zero():
    """One direction everywhere: A = 1 in the box, up to rounding, and min-max scaling gives 0."""
    features = torch.ones(1, 3, 4, 4) * torch.rand(1, 1, 4, 4)
    boxes, labels = [torch.tensor([[3.0, 3.0, 10.0, 10.0]])], [torch.tensor([1])]
    images = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    for reduction in ("mean", "max"):
        y = pseudo_labels(
            images,
            features,
            None,
            boxes,
            labels,
            crf=None,
            attention_reduction=reduction,
            background_prior=0.0,
        )
        assert (y.background_unary[0, 3:10, 3:10] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_a_constant_is_not_scaled_up(dtype):
    """Beyond the last centre of a cell upsampling repeats a value, but rounds it each time anew."""
    features = torch.rand(20, 3, 2, 2, generator=seeded(6)).to(dtype)
    for weight in (None, torch.rand(2, 3, generator=seeded(7)).to(dtype)):
        y = pseudo_labels(
            torch.zeros(20, 3, 16, 16, dtype=torch.uint8),
            features,
            weight,
            [torch.tensor([[13.0, 13.0, 16.0, 16.0]])] * 20,
            [torch.tensor([1])] * 20,
            crf=None,
            background_prior=0.0,
        )
        assert (y.background_unary[:, 13:, 13:] == 0).all()


@pytest.mark.parametrize(
    "kwargs", [{}, {"foreground": "cam", "cam_normalization": "box"}, {"background_minmax": False}]
)
def test_features_are_never_upsampled(kwargs):
    """The largest tensor has a channel per class of the image, not one per feature or box."""
    scene = fixed(channels=200, image_size=(96, 96))
    many = [torch.cat([x] * 10) for x in scene.boxes]
    scene = scene.replace(boxes=many, labels=[torch.cat([x] * 10) for x in scene.labels])
    images, weight = images_of(scene), weight_of(scene)
    with Largest() as largest:
        pseudo_labels(images, scene.features, weight, scene.boxes, scene.labels, crf=None, **kwargs)
    assert largest.elements <= 2 * 3 * 96 * 96
