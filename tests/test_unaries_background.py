"""Laws of u_0: which maps it is made of, how they are scaled, what small boxes add."""

import pytest
import torch

import reference
from assertions import close
from bapnal import definite_background, pseudo_labels
from labelling import EQUATIONS, fixed, labels_of


def test_the_threshold_is_relative_to_the_maximum_of_the_raw_map():
    """Before the 1s outside the boxes are set, over all pixels that show the image."""
    scene = fixed()
    raw = labels_of(scene, None, **{**EQUATIONS, "background_threshold": None})
    inside = ~definite_background(scene.boxes, scene.image_size)[:, 0].bool()
    wide = [torch.tensor([[-9.0, -9, 60, 60]], dtype=torch.float64)]
    for threshold in (0.3, 0.6, 0.9):
        for b in range(2):
            one = scene.replace(
                features=scene.features[b : b + 1],
                boxes=scene.boxes[b : b + 1],
                labels=scene.labels[b : b + 1],
            )
            features, boxes, _ = one.image(0)
            m = reference.definite_background(boxes, (24, 24), (6, 6))
            q, valid = reference.grid_prototypes(features, m, 1)
            cells = [
                [
                    reference.background_similarity(reference.vector_at(features, i, j), q, valid)
                    for j in range(6)
                ]
                for i in range(6)
            ]
            a = torch.tensor(reference.bilinear(cells, (24, 24)), dtype=torch.float64)
            assert a.max() < 0.999
            expected = torch.where(a >= threshold * a.max(), a, 0.0)
            cut = labels_of(one, **{**EQUATIONS, "background_threshold": threshold})
            close(cut.background_unary[0][inside[b]], expected[inside[b]])
            close(raw.background_unary[b][inside[b]], a[inside[b]])
            assert (cut.background_unary[0][~inside[b]] == 1).all()
    covered = scene.replace(boxes=wide * 2, labels=[torch.tensor([1])] * 2)
    none = labels_of(covered, **{**EQUATIONS, "background_threshold": 0.99})
    assert (none.background_unary == 0).all()  # no background, no attention


def test_a_threshold_does_not_see_padding():
    """The mean of the background is (1, 1) / 2, as the padding; in the image 0.8 is the maximum."""
    high, low = [0.99, 0.141], [1.0, 0.0]  # cosines with q of 0.8 and 0.707
    columns = torch.tensor([[1.0, 0.0], [0.0, 1.0], high, low, [5.0, 5.0]])
    features = columns.T.reshape(1, 2, 1, 5)
    valid = torch.tensor([[[True, True, True, True, False]]])
    args = (
        torch.zeros(1, 3, 1, 5, dtype=torch.uint8),
        features,
        None,
        [torch.tensor([[2.0, 0.0, 5.0, 1.0]])],
        [torch.tensor([1])],
    )
    for threshold, expected in [(None, [0.8, 0.707]), (0.85, [0.8, 0.707]), (0.95, [0.8, 0.0])]:
        options = {**EQUATIONS, "background_threshold": threshold}
        y = pseudo_labels(*args, crf=None, valid=valid, **options)
        close(y.background_unary[0, 0, 2:4], torch.tensor(expected), tolerance=1e-3)


def test_minmax_fills_the_unit_interval_inside_the_boxes():
    scene = fixed()
    for background, kind in [("attention", "plain"), ("both", "plain"), ("both", None)]:
        scaled = {"background": background, "background_otsu": False, "background_prior": 0.0}
        full = labels_of(scene, kind, **scaled).background_unary
        outside = definite_background(scene.boxes, scene.image_size)[:, 0].bool()
        for b in range(2):
            inside = full[b][~outside[b]]
            close(inside.min(), torch.tensor(0.0))
            close(inside.max(), torch.tensor(1.0))
        assert (full[outside] == 1).all()
    raw = {"background": "attention", "background_otsu": False, "background_prior": 0.0}
    plain = labels_of(scene, **raw, background_minmax=False).background_unary
    full = labels_of(scene, **raw).background_unary
    for b in range(2):
        before, after = plain[b][~outside[b]], full[b][~outside[b]]
        close(after, (before - before.min()) / (before.max() - before.min()))


def test_the_fewer_cells_a_box_has_the_more_its_ellipse_counts():
    """Cells of 2 x 2 pixels; boxes of 4 cells and of a quarter, of which the least value counts."""
    features = torch.ones(1, 2, 4, 8)  # nothing to tell pixels by: u_0 is 0 without a prior
    large, small = [2.0, 0.0, 6.0, 4.0], [5.0, 1.0, 6.0, 2.0]
    args = (torch.zeros(1, 3, 8, 16, dtype=torch.uint8), features, None)

    def unary(*boxes, prior):
        labels = [torch.ones(len(boxes), dtype=torch.long)]
        y = pseudo_labels(
            *args,
            [torch.tensor(boxes)],
            labels,
            crf=None,
            background_prior=prior,
            background_otsu=False,
        )
        return y.background_unary[0]

    assert (unary(large, prior=0.0)[:4, 2:6] == 0).all()
    share = torch.tensor([9.0, 1.0, 1.0, 9.0]) / 16  # (3 / 4)^2 and (1 / 4)^2
    ellipse = (share[:, None] + share[None, :]) / 2
    close(unary(large, prior=12.0)[:4, 2:6], ellipse * 12 / (12 + 4), tolerance=1e-6)
    both = unary(large, small, prior=12.0)[:4, 2:6]
    assert both[1, 3] == 0  # the centre of the small one, which is a pixel
    both[1, 3] = ellipse[1, 3] * 12 / 16
    close(both, ellipse * 12 / 16, tolerance=1e-6)


@pytest.mark.parametrize("foreground", ["complement", "cam"])
def test_the_ellipse_of_a_small_box_sharpens_the_softmax(foreground):
    """By its weight, 12 / (12 + 4) here: log-odds are 1 + 3 / 4 times what they would be."""
    found = []

    def crf(images, probabilities):
        found.append(probabilities)
        return probabilities

    y = pseudo_labels(
        torch.zeros(1, 3, 8, 16, dtype=torch.uint8),
        torch.ones(1, 2, 4, 8),
        torch.ones(2, 2),
        [torch.tensor([[2.0, 0.0, 6.0, 4.0]])],
        [torch.tensor([1])],
        crf=crf,
        background_prior=12.0,
        foreground=foreground,
        unary_softmax=3.0,
    )
    inside = (slice(None, 4), slice(2, 6))
    odds = (found[0][0, 0] / found[0][0, 1]).log()[inside]
    lead = (y.background_unary[0] - y.foreground_unary[0, 0])[inside]
    assert lead.abs().max() > 0.3
    close(odds, 3 * (1 + 12 / 16) * lead, tolerance=1e-5)


def test_minmax_sees_the_scores_of_the_background_below_zero():
    """No ReLU and no maximum of the image: scores of -3, -2 and -1 in the box are 0, 1/2 and 1."""
    features = torch.tensor([5.0, -3.0, -2.0, -1.0]).reshape(1, 1, 1, 4)
    y = pseudo_labels(
        torch.zeros(1, 3, 1, 4, dtype=torch.uint8),
        features,
        torch.ones(2, 1),
        [torch.tensor([[1.0, 0.0, 4.0, 1.0]])],
        [torch.tensor([1])],
        crf=None,
        background="cam",
        background_prior=0.0,
    )
    close(y.background_unary[0, 0], [1.0, 0.0, 0.5, 1.0], tolerance=1e-6)


def test_backgrounds():
    scene = fixed()
    raw = {"background_otsu": False, "background_prior": 0.0}
    for minmax in (False, True):
        attention, cam, both = (
            labels_of(scene, background=name, background_minmax=minmax, **raw).background_unary
            for name in ("attention", "cam", "both")
        )
        outside = definite_background(scene.boxes, scene.image_size)[:, 0].bool()
        for b in range(2):
            mean = (attention[b] + cam[b])[~outside[b]] / 2
            if minmax:
                mean = (mean - mean.min()) / (mean.max() - mean.min())
            close(both[b][~outside[b]], mean)
        assert not torch.allclose(attention, cam)
        # The background's own map is not thresholded.
        without = {"background_minmax": minmax, **raw}
        cut = {**without, "background_threshold": 0.9}
        close(labels_of(scene, background="cam", **cut).background_unary, cam)
        for u_0 in (attention, cam, both):
            assert (u_0[outside] == 1).all()
        agnostic = labels_of(scene, None, background="both", **without).background_unary
        close(agnostic, attention)


@pytest.mark.parametrize("objects", [2, 5, 8])
def test_the_threshold_of_otsu_parts_objects_from_background_whatever_their_share(objects):
    """Scores near 1 and near 3 in a box of ten pixels: 1/2 lies between them, not at the middle."""
    scores = torch.cat([torch.linspace(0.8, 1.2, objects), torch.linspace(2.2, 3, 10 - objects)])
    args = (
        torch.zeros(1, 3, 1, 12, dtype=torch.uint8),
        torch.cat([torch.tensor([5.0, 5.0]), scores]).reshape(1, 1, 1, 12),
        torch.ones(2, 1),
        [torch.tensor([[2.0, 0.0, 12.0, 1.0]])],
        [torch.tensor([1])],
    )
    options = {"background": "cam", "background_prior": 0.0}
    y = pseudo_labels(*args, crf=None, **options)
    assert y.crf[0, 0].tolist() == [0, 0] + [1] * objects + [0] * (10 - objects)
    u_0 = y.background_unary[0, 0, 2:]
    unshifted = pseudo_labels(*args, crf=None, background_otsu=False, **options)
    shift = u_0 - unshifted.background_unary[0, 0, 2:]
    inner = (u_0 > 0) & (u_0 < 1)
    close(shift[inner], shift[inner][:1].expand(int(inner.sum())), tolerance=1e-6)


def test_a_map_that_tells_nothing_is_not_shifted():
    features = torch.ones(1, 3, 4, 4)
    y = pseudo_labels(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        features,
        None,
        [torch.tensor([[2.0, 2.0, 6.0, 6.0]])],
        [torch.tensor([1])],
        crf=None,
        background_prior=0.0,
    )
    assert (y.background_unary[0, 2:6, 2:6] == 0).all()


def test_boxes_without_background_fall_back_on_the_border():
    """Class-agnostic only: objects lie in the middle of their boxes. Weights know better."""
    features = torch.zeros(1, 2, 4, 4)
    features[:, 0] = 1
    features[:, :, 1:3, 1:3] = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
    args = (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), features)
    boxes, labels = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], [torch.tensor([1])]
    y = pseudo_labels(*args, None, boxes, labels, crf=None, background_prior=0.0)
    expected = torch.zeros(4, 4, dtype=torch.long)
    expected[1:3, 1:3] = 1
    assert torch.equal(y.crf[0], expected)
    options = {"background": "attention", "background_prior": 0.0}
    y = pseudo_labels(*args, torch.eye(2), boxes, labels, crf=None, **options)
    assert (y.background_unary == 0).all()


def test_the_border_is_that_of_the_image_not_of_its_padding():
    scene = fixed(batch=1, map_size=(4, 4), image_size=(16, 16))
    scene = scene.replace(boxes=[torch.tensor([[0.0, 0, 16, 16]])], labels=[torch.tensor([1])])
    options = {"grid_size": 1, "background_prior": 0.0}  # the grid is laid over padding, too
    alone = labels_of(scene, None, **options)
    # Repeated, as upsampling does beyond the last centres of cells.
    features = torch.nn.functional.pad(scene.features, (0, 3, 0, 2), mode="replicate")
    valid = torch.zeros(1, 24, 28, dtype=torch.bool)
    valid[:, :16, :16] = True
    padded = scene.replace(
        features=features,
        image_size=(24, 28),
        valid=valid,
        boxes=[torch.tensor([[0.0, 0, 28, 24]])],
    )
    found = labels_of(padded, None, **options)
    close(found.background_unary[:, :16, :16], alone.background_unary)
    assert alone.background_unary.std() > 0.1
