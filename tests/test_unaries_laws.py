"""Laws of the unaries, and what each of their options does."""

import pytest
import torch
from hypothesis import given

from assertions import close, finite
from bapnal import PRESETS, definite_background, pseudo_labels
from labelling import EQUATIONS, blurring, fixed, labels_of, options, weight_of, weights
from strategies import scenes


@given(scene=scenes(max_image=9), kwargs=options, kind=weights)
def test_unaries_are_in_the_unit_interval(scene, kwargs, kind):
    if kind is None and kwargs["background"] == "cam":
        kwargs["background"] = "both"
    y = labels_of(scene, kind, **kwargs)
    for u in (y.background_unary, y.foreground_unary):
        finite(u)
        if u.numel():
            assert u.min() >= 0
            assert u.max() <= 1 + 1e-12


def test_each_class_peaks_at_one_in_its_boxes():
    scene = fixed()
    y = labels_of(scene, foreground="cam")
    assert y.classes.tolist() == [[1, 3], [2, 0]]
    peaks = y.foreground_unary.amax((2, 3))
    close(peaks, [[1.0, 1.0], [1.0, 0.0]])
    by_box = labels_of(scene, foreground="cam", cam_normalization="box")
    for box in scene.boxes[0][[0, 2]]:
        x1, y1, x2, y2 = box.long().tolist()
        close(by_box.foreground_unary[0, 1, y1:y2, x1:x2].max(), torch.tensor(1.0))


def test_where_boxes_of_one_class_overlap_the_larger_value_counts():
    """Activations 1, 2, 4; the first box peaks at 2, the second at 4, in either order."""
    features = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 1, 3)
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0]])
    image = torch.zeros(1, 3, 1, 3, dtype=torch.uint8)
    for rows in (boxes, boxes.flip(0)):
        y = pseudo_labels(
            image,
            features,
            torch.ones(2, 1),
            [rows],
            [torch.tensor([1, 1])],
            crf=None,
            foreground="cam",
            cam_normalization="box",
        )
        assert y.foreground_unary.tolist() == [[[[0.5, 1.0, 1.0]]]]


@pytest.mark.parametrize("preset", [{}, PRESETS["paper"], PRESETS["released"]])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_features_or_weights_changes_nothing(scale, preset):
    """Maps are divided by their maximum or their range, the rest are cosines."""
    scene = fixed()
    weight = weight_of(scene)
    plain = labels_of(scene, weight, crf=blurring, **preset)
    others = [
        labels_of(scene.replace(features=scale * scene.features), weight, crf=blurring, **preset),
        labels_of(scene, scale * weight, crf=blurring, **preset),
    ]
    if preset:  # Eq. 5 divides each class by its own maximum
        each = weight * torch.tensor([[1.0], [scale], [2], [3]])
        others.append(labels_of(scene, each, crf=blurring, **preset))
    for other in others:
        assert torch.equal(other.crf, plain.crf)
        assert torch.equal(other.retrieval, plain.retrieval)
        close(other.background_unary, plain.background_unary)
        close(other.foreground_unary, plain.foreground_unary)


def in_front(x1, y1, x2, y2, size=24):
    """By size and ellipse; ``(size, size)``, 0 outside the box, which is of whole pixels."""
    centres = torch.arange(size, dtype=torch.float64) + 0.5
    u = (2 * centres - x1 - x2) / (x2 - x1)
    v = (2 * centres - y1 - y2) / (y2 - y1)
    inside = (u.abs() < 1) & (v.abs() < 1)[:, None]
    return inside * torch.sigmoid(3 * (1 - u**2 - v[:, None] ** 2)) / inside.sum()


def test_class_agnostic_labels():
    """One class in a box: 1 - u_0. Two classes on a pixel: by the sizes and ellipses of boxes."""
    scene = fixed()
    y = labels_of(scene, None)
    inside = ~definite_background([scene.boxes[1]], scene.image_size)[0, 0].bool()
    close(y.foreground_unary[1, 0], (1 - y.background_unary[1]) * inside)
    masks = [
        ~definite_background([scene.boxes[0][scene.labels[0] == c]], (24, 24))[0, 0].bool()
        for c in (1, 3)
    ]
    both = masks[0] & masks[1]
    assert both.any()
    equal = labels_of(scene, None, overlaps="equal")
    for slot in (0, 1):
        close(equal.foreground_unary[0, slot][both], (1 - y.background_unary[0][both]) / 2)
    front = torch.stack([in_front(*box) for box in scene.boxes[0].tolist()])
    first, second = front[1][both], torch.maximum(front[0], front[2])[both]
    share = first / (first + second)  # of class 1
    close(y.foreground_unary[0, 0][both], (1 - y.background_unary[0][both]) * share)
    close(y.foreground_unary[0, 1][both], (1 - y.background_unary[0][both]) * (1 - share))
    assert ((front[2] > front[0]) & both).any()
    assert ((front[2] < front[0]) & both).any()
    close(y.foreground_unary.sum(1)[1], (1 - y.background_unary[1]) * inside)
    alone = masks[0] & ~masks[1]
    close(y.foreground_unary[0, 0][alone], 1 - y.background_unary[0][alone])
    for name in ("cam", "complement"):
        close(labels_of(scene, None, foreground=name).foreground_unary, y.foreground_unary)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_smaller_of_two_objects_is_in_front(scale):
    """A box of 4 pixels in one of 8: it gets some two thirds, and the odds count twice."""
    a, b = 0.3, 0.9  # cosines with the background, which minmax takes to 0 and 1
    cosines = torch.tensor([1.0, 1, b, a, a, a, a, a, a, b])
    features = torch.stack([cosines, (1 - cosines.square()).sqrt()]).reshape(1, 2, 1, 10)
    large, small = [2.0, 0.0, 10.0, 1.0], [3.0, 0.0, 7.0, 1.0]
    seen = []
    for boxes, classes in ([large, small], [2, 1]), ([small, large], [1, 2]):
        y = pseudo_labels(
            torch.zeros(1, 3, 1, 10, dtype=torch.uint8),
            features,
            None,
            [torch.tensor(boxes)],
            [torch.tensor(classes)],
            crf=lambda _, p: seen.append(p) or p,
            background_otsu=False,
            background_prior=0.0,
            unary_softmax=scale,
        )
        assert y.crf[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 0]
    assert torch.equal(seen[0], seen[1])
    odds = torch.tensor(-scale, dtype=torch.float64).exp()  # u_0 = 0 against 1
    p_0 = float(odds / (1 + odds))
    inner, outer = seen[0][0, :, 0, 4], seen[0][0, :, 0, 8]
    # A quarter of the way from its centre to its side, and three eighths of the large one's.
    of_small, of_large = (
        torch.sigmoid(torch.tensor(3 * (1 - u**2))) / n for u, n in ((2 / 8, 4), (3 / 8, 8))
    )
    share = float(of_small / (of_small + of_large))
    close(inner, [p_0**2, (1 - p_0**2) * share, (1 - p_0**2) * (1 - share)], tolerance=1e-6)
    close(outer, [p_0, 0.0, 1 - p_0], tolerance=1e-6)


def test_a_class_of_zeros_counts_as_unseen():
    """Alone in a box it takes all that is not background, beside another class its share of it."""
    scene = fixed()
    unseen = weight_of(scene, "unseen")  # class 2, which the second image shows
    y = labels_of(scene, unseen, foreground="cam")
    inside = ~definite_background([scene.boxes[1]], scene.image_size)[0, 0].bool()
    close(y.foreground_unary[1, 0], (1 - y.background_unary[1]) * inside)
    joined = scene.replace(labels=[torch.tensor([3, 2, 3]), torch.tensor([2])])
    y = labels_of(joined, unseen, overlaps="equal")
    masks = [
        ~definite_background([joined.boxes[0][joined.labels[0] == c]], (24, 24))[0, 0].bool()
        for c in (2, 3)
    ]
    both = masks[0] & masks[1]
    for slot in (0, 1):
        close(y.foreground_unary[0, slot][both], (1 - y.background_unary[0][both]) / 2)
    # A bias alone makes a class seen.
    seen = unseen.clone()
    seen[2, -1] = 1
    y_seen = labels_of(joined, seen, overlaps="equal")
    assert not torch.allclose(y_seen.foreground_unary, y.foreground_unary)
    share, without = (
        (y.foreground_unary[0, 0] / (1 - y.background_unary[0]))[both]
        for y in (labels_of(joined, unseen), labels_of(joined, None))
    )
    close(share, without)
    assert share.max() > 0.8  # where its own box is the smaller one
    assert share.min() < 0.2


def test_a_bias_is_a_channel_of_ones():
    scene = fixed()
    weight = weight_of(scene, "bias")
    ones = torch.ones_like(scene.features[:, :1])
    y = labels_of(scene, weight, foreground="cam", background="cam")
    wide = scene.replace(features=torch.cat([scene.features, ones], dim=1))
    expected = labels_of(wide, weight, foreground="cam", background="cam")
    close(y.background_unary, expected.background_unary)
    close(y.foreground_unary, expected.foreground_unary)
    other = labels_of(scene, weight[:, :-1], foreground="cam", background="cam")
    assert not torch.allclose(other.foreground_unary, expected.foreground_unary)


def test_the_scale_of_the_softmax():
    """Log odds are the difference of the unaries times the scale; with complements 2 u_0 - 1."""

    def seen(**kwargs):
        found = []
        y = labels_of(
            fixed(), crf=lambda _, p: found.append(p) or p, background_prior=0.0, **kwargs
        )
        return found[0][0], y.background_unary[1], y.foreground_unary[1, 0]

    for scale in (0.5, 1, 3.0):
        for kwargs in ({"foreground": "cam"}, {"foreground": "complement"}):
            p, u_0, u_1 = seen(unary_softmax=scale, **kwargs)
            inside = p[1] > 0
            assert inside.any()
            odds = (p[0] / p[1]).log()
            close(odds[inside], scale * (u_0 - u_1)[inside])
            assert (p[0][~inside] == 1).all()


def test_a_softmax_of_high_scale_is_the_argmax_of_the_unaries():
    scene = fixed()
    sharp = labels_of(scene, foreground="cam", unary_softmax=1e4)
    plain = labels_of(scene, foreground="cam")
    assert torch.equal(sharp.crf, plain.crf)
    close(sharp.foreground_unary, plain.foreground_unary)


def test_where_nothing_speaks_for_any_class_the_background_wins():
    """All unaries 0: the probabilities are even, and the first of the equals is the background."""
    features = torch.tensor([[0.0, 0.0, -1.0], [1.0, 1.0, 0.0]]).reshape(1, 2, 1, 3)
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    seen = []

    def crf(images, probabilities):
        seen.append(probabilities)
        return probabilities

    y = pseudo_labels(
        torch.zeros(1, 3, 1, 3, dtype=torch.uint8),
        features,
        weight,
        [torch.tensor([[2.0, 0.0, 3.0, 1.0]])],
        [torch.tensor([1])],
        crf=crf,
        **EQUATIONS,
    )
    assert y.background_unary.tolist() == [[[1.0, 1.0, 0.0]]]
    assert y.foreground_unary.tolist() == [[[[0.0, 0.0, 0.0]]]]
    assert seen[0][0, :, 0, 2].tolist() == [0.5, 0.5]
    assert seen[0][0, :, 0, 0].tolist() == [1.0, 0.0]
    assert y.crf.tolist() == [[[0, 0, 0]]]


def test_a_padded_pixel_is_not_a_maximum():
    """The largest activation lies in the padding: the class still peaks at 1 in the image."""
    features = torch.tensor([[1.0, 2.0, 9.0]]).reshape(1, 1, 1, 3)
    args = (
        torch.zeros(1, 3, 1, 3, dtype=torch.uint8),
        features,
        torch.ones(2, 1),
        [torch.tensor([[0.0, 0.0, 3.0, 1.0]])],
        [torch.tensor([1])],
    )
    valid = torch.tensor([[[True, True, False]]])
    for minmax, u_0 in [(False, [0.5, 1.0]), (True, [0.0, 1.0])]:
        y = pseudo_labels(
            *args,
            crf=None,
            background_prior=0.0,
            valid=valid,
            background="cam",
            foreground="cam",
            background_minmax=minmax,
            background_otsu=False,
        )
        assert y.foreground_unary.tolist() == [[[[0.5, 1.0, 0.0]]]]
        assert y.background_unary[0, 0, :2].tolist() == u_0
