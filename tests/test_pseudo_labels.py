"""Unaries, Y_crf and Y_ret (Eq. 5-9) against the oracle, and their laws."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from assertions import Largest, close, finite
from bapnal import PseudoLabelGenerator, PseudoLabels, definite_background, pseudo_labels
from strategies import Scene, scenes, seeded

options = st.fixed_dictionaries(
    {
        "grid_size": st.integers(1, 3),
        "background_threshold": st.sampled_from([None, 0.5, 0.99]),
        "background": st.sampled_from(["attention", "attention", "cam", "both"]),
        "attention_minmax": st.booleans(),
        "cam_normalization": st.sampled_from(["class", "box"]),
        "unary_softmax": st.sampled_from([None, None, 5.0]),
        "align_corners": st.booleans(),
    }
)


def images_of(scene):
    shape = (scene.batch, 3, *scene.image_size)
    return torch.randint(256, shape, generator=seeded(1), dtype=torch.uint8)


def weight_of(scene):
    generator = seeded(2)
    return torch.randn(
        scene.classes + 1, scene.features.shape[1], generator=generator, dtype=torch.float64
    )


def labels_of(scene, weight="drawn", crf=None, **kwargs):
    weight = weight_of(scene) if isinstance(weight, str) else weight
    return pseudo_labels(
        images_of(scene),
        scene.features,
        weight,
        scene.boxes,
        scene.labels,
        crf=crf,
        valid=scene.valid,
        **kwargs,
    )


def blurring(images, probabilities, valid=None):
    """Stands in for a CRF: mixes neighbours, as far as the red of the image says."""
    mix = images[:, :1].to(probabilities.dtype) / 255
    return (1 - mix) * probabilities + mix * probabilities.roll(1, dims=3)


def oracle_blurring(image, p):  # image: [3][H][W], p: [H][W] of {class: probability}
    size = reference.size_of(p)

    def value(i, j):
        mix, left = image[0][i][j] / 255, p[i][j - 1]
        classes = set(p[i][j]) | set(left)
        return {c: (1 - mix) * p[i][j].get(c, 0.0) + mix * left.get(c, 0.0) for c in classes}

    return reference.plane_of(size, value)


def oracle_of(scene, b, weight, kwargs):
    """u_0, u_c and the probabilities of one image."""
    renamed = dict(kwargs)
    names = {
        "grid_size": "n",
        "background_threshold": "threshold",
        "cam_normalization": "normalization",
        "unary_softmax": "softmax_scale",
    }
    minmax = renamed.pop("attention_minmax", False)
    renamed = {names.get(name, name): value for name, value in renamed.items()}
    features, boxes, valid = scene.image(b)
    return reference.unaries(
        features,
        None if weight is None else weight.tolist(),
        boxes,
        scene.labels[b].tolist(),
        scene.image_size,
        scene.classes,
        scaling="minmax" if minmax else None,
        valid=valid,
        **renamed,
    )


def same_labels(found, scores, candidates, shown, ignore_index=255):
    """Each label is a candidate with the highest score, up to rounding."""
    for i, j in reference.positions(reference.size_of(found)):
        label = found[i][j]
        if not shown[i][j]:
            assert label == ignore_index
            continue
        here = {c: scores[i][j].get(c, 0.0) for c in candidates[i][j] if c in scores[i][j]}
        assert label in candidates[i][j]
        assert here[label] >= max(here.values()) - 1e-9


# ---------------------------------------------------------------------------- against the oracle


@settings(max_examples=80)
@given(scene=scenes(max_batch=2, max_image=9), kwargs=options, agnostic=st.booleans())
def test_labels_agree_with_the_oracle(scene, kwargs, agnostic):
    if agnostic:
        kwargs["background"] = "attention"
    weight = None if agnostic else weight_of(scene)
    y = labels_of(scene, weight, crf=blurring, **kwargs)
    for b in range(scene.batch):
        u_0, u, p = oracle_of(scene, b, weight, kwargs)
        named = sorted(set(scene.labels[b].tolist()))
        close(y.background_unary[b], u_0)
        assert y.classes[b].tolist() == named + [0] * (y.classes.shape[1] - len(named))
        for slot, c in enumerate(y.classes[b].tolist()):
            expected = u[c] if c else torch.zeros(scene.image_size)
            close(y.foreground_unary[b, slot], expected)
        shown = (
            scene.valid[b].tolist()
            if scene.valid is not None
            else reference.everywhere(scene.image_size)
        )
        candidates = reference.plane_of(scene.image_size, lambda i, j, p=p: list(p[i][j]))
        q = oracle_blurring(images_of(scene)[b].tolist(), p) if named else p
        same_labels(y.crf[b].tolist(), q, candidates, shown)
        maps = reference.retrieval(
            scene.features[b].tolist(),
            None if agnostic else weight.tolist(),
            y.crf[b].tolist(),
            scene.classes,
            kwargs["align_corners"],
        )
        scores = reference.plane_of(
            scene.image_size, lambda i, j, maps=maps: {c: maps[c][i][j] for c in maps}
        )
        same_labels(y.retrieval[b].tolist(), scores, candidates, shown)
    assert torch.equal(y.reliable, (y.crf == y.retrieval) & (y.crf != 255))
    assert y.crf.dtype == y.retrieval.dtype == y.classes.dtype == torch.long
    assert y.reliable.dtype == torch.bool


@given(scene=scenes(max_batch=2, max_image=9), kwargs=options, agnostic=st.booleans())
def test_the_crf_sees_the_probabilities_of_the_oracle(scene, kwargs, agnostic):
    if agnostic:
        kwargs["background"] = "attention"
    weight = None if agnostic else weight_of(scene)
    calls = []

    def crf(images, probabilities, valid=None):
        calls.append((images, probabilities, valid))
        return probabilities

    y = labels_of(scene, weight, crf=crf, **kwargs)
    plain = labels_of(scene, weight, crf=None, **kwargs)
    for a, b in zip(y, plain, strict=True):
        assert torch.equal(a, b)
    seen = 0
    for images, probabilities, valid in calls:
        assert not probabilities.requires_grad
        close(probabilities.sum(1), torch.ones(()).expand(probabilities[:, 0].shape))
        for row in range(len(images)):
            same = (images_of(scene) == images[row]).flatten(1).all(1)
            if same.sum() != 1:
                continue  # one-pixel images may be alike
            b = same.nonzero().item()
            named = sorted(set(scene.labels[b].tolist()))
            assert probabilities.shape[1] == 1 + len(named)
            if scene.valid is not None:
                assert torch.equal(valid[row], scene.valid[b])
            else:
                assert valid is None
            _, _, p = oracle_of(scene, b, weight, kwargs)
            for channel, c in enumerate([0, *named]):
                expected = reference.plane_of(
                    scene.image_size, lambda i, j, p=p, c=c: p[i][j].get(c, 0.0)
                )
                close(probabilities[row, channel], expected)
        seen += len(images)
    assert seen == sum(len(row) > 0 for row in scene.labels)


def fixed(seed=0, batch=2, channels=4, map_size=(6, 6), image_size=(24, 24), **changes) -> Scene:
    generator = seeded(seed)
    boxes = [
        # Odd, so that no border passes through the centre of a cell of 4 x 4 pixels.
        torch.tensor([[3.0, 3, 15, 17], [9, 1, 21, 13], [5, 11, 21, 23]], dtype=torch.float64),
        torch.tensor([[5.0, 5, 19, 21]], dtype=torch.float64),
        torch.zeros(0, 4, dtype=torch.float64),
    ]
    labels = [torch.tensor([3, 1, 3]), torch.tensor([2]), torch.zeros(0, dtype=torch.long)]
    features = torch.randn(batch, channels, *map_size, generator=generator, dtype=torch.float64)
    scene = Scene(
        features=features + 0.5,
        boxes=boxes[:batch],
        labels=labels[:batch],
        image_size=image_size,
        valid=None,
        classes=3,
        generator=generator,
    )
    return scene.replace(**changes)


# ------------------------------------------------------------------------------------------ laws


@given(scene=scenes(max_image=9), kwargs=options)
def test_labels_stay_in_the_boxes_of_their_class(scene, kwargs):
    """Whatever the CRF says: background outside all boxes, no class outside its own."""

    def shuffling(images, probabilities, valid=None):
        return torch.rand(probabilities.shape, generator=seeded(5))

    y = labels_of(scene, crf=shuffling, **kwargs)
    outside = definite_background(scene.boxes, scene.image_size).bool()[:, 0]
    for maps in (y.crf, y.retrieval):
        shown = maps != 255
        assert (maps[outside & shown] == 0).all()
        for b in range(scene.batch):
            for c in range(1, scene.classes + 1):
                mine = scene.boxes[b][scene.labels[b] == c]
                inside = ~definite_background([mine], scene.image_size).bool()[0, 0]
                assert not ((maps[b] == c) & ~inside).any()
    assert (y.background_unary[outside] == 1).all()


@given(scene=scenes(max_image=9), kwargs=options)
def test_unaries_are_in_the_unit_interval(scene, kwargs):
    y = labels_of(scene, **kwargs)
    for u in (y.background_unary, y.foreground_unary):
        finite(u)
        if u.numel():
            assert u.min() >= 0
            assert u.max() <= 1 + 1e-12


def test_each_class_peaks_at_one_in_its_boxes():
    scene = fixed()
    y = labels_of(scene)
    assert y.classes.tolist() == [[1, 3], [2, 0]]
    peaks = y.foreground_unary.amax((2, 3))
    close(peaks, [[1.0, 1.0], [1.0, 0.0]])
    by_box = labels_of(scene, cam_normalization="box")
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
            cam_normalization="box",
        )
        assert y.foreground_unary.tolist() == [[[[0.5, 1.0, 1.0]]]]


@given(scene=scenes(max_image=9, padding=False), kwargs=options)
def test_a_image_gets_the_same_labels_alone_and_in_a_batch(scene, kwargs):
    together = labels_of(scene, crf=blurring, **kwargs)
    images = images_of(scene)
    for b in range(scene.batch):
        part = slice(b, b + 1)
        alone = pseudo_labels(
            images[part],
            scene.features[part],
            weight_of(scene),
            scene.boxes[part],
            scene.labels[part],
            crf=blurring,
            **kwargs,
        )
        close(alone.background_unary[0], together.background_unary[b])
        count = alone.classes.shape[1]
        close(alone.foreground_unary[0], together.foreground_unary[b, :count])
        assert (together.foreground_unary[b, count:] == 0).all()
        assert (alone.crf[0] == together.crf[b]).float().mean() > 0.95  # ties may fall


def test_boxes_may_be_permuted_and_come_in_either_form():
    scene = fixed()
    plain = labels_of(scene, crf=blurring)
    order = torch.tensor([2, 0, 1])
    shuffled = scene.replace(
        boxes=[scene.boxes[0][order], scene.boxes[1]],
        labels=[scene.labels[0][order], scene.labels[1]],
    )
    rois = torch.cat(
        [torch.cat([torch.full((len(x), 1), b), x], 1) for b, x in enumerate(scene.boxes)]
    )
    joined = scene.replace(boxes=rois, labels=torch.cat(scene.labels))
    mixed = torch.tensor([3, 1, 0, 2])
    turned = scene.replace(boxes=rois[mixed], labels=torch.cat(scene.labels)[mixed])
    for other in (shuffled, joined, turned):
        for a, b in zip(labels_of(other, crf=blurring), plain, strict=True):
            close(a, b)


def test_swapping_classes_permutes_the_maps():
    scene = fixed()
    weight = weight_of(scene)
    plain = labels_of(scene, weight, crf=blurring)
    table = torch.tensor([0, 3, 1, 2])  # old class -> new class
    moved = torch.empty_like(weight)
    moved[table] = weight
    other = labels_of(scene.replace(labels=[table[x] for x in scene.labels]), moved, blurring)
    assert torch.equal(other.crf, table[plain.crf])
    assert torch.equal(other.retrieval, table[plain.retrieval])
    for b in range(2):
        for slot, c in enumerate(plain.classes[b].tolist()):
            if c:
                there = other.classes[b].tolist().index(table[c])
                close(other.foreground_unary[b, there], plain.foreground_unary[b, slot])


@given(kwargs=options)
def test_flipping_the_image_flips_the_labels(kwargs):
    """The grid must be symmetric on a map of 6 x 6, which 1 to 3 are."""
    scene = fixed()

    def reflect(boxes):
        return torch.stack([24 - boxes[:, 2], boxes[:, 1], 24 - boxes[:, 0], boxes[:, 3]], 1)

    flipped = scene.replace(
        features=scene.features.flip(3), boxes=[reflect(x) for x in scene.boxes]
    )
    plain, other = labels_of(scene, **kwargs), labels_of(flipped, **kwargs)
    assert torch.equal(other.crf.flip(2), plain.crf)
    assert torch.equal(other.retrieval.flip(2), plain.retrieval)
    close(other.background_unary.flip(2), plain.background_unary)
    close(other.foreground_unary.flip(3), plain.foreground_unary)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_features_or_weights_changes_nothing(scale):
    """Activation maps are divided by their maximum, the rest are cosines."""
    scene = fixed()
    weight = weight_of(scene)
    plain = labels_of(scene, weight, crf=blurring)
    for other in (
        labels_of(scene.replace(features=scale * scene.features), weight, crf=blurring),
        labels_of(scene, scale * weight, crf=blurring),
        labels_of(scene, weight * torch.tensor([[1.0], [scale], [2], [3]]), crf=blurring),
    ):
        assert torch.equal(other.crf, plain.crf)
        assert torch.equal(other.retrieval, plain.retrieval)
        close(other.background_unary, plain.background_unary)
        close(other.foreground_unary, plain.foreground_unary)


def test_the_threshold_is_relative_to_the_maximum():
    """Outside all boxes A is 1, so the maximum is 1 unless the boxes cover the image."""
    scene = fixed()
    plain = labels_of(scene, background_threshold=None).background_unary
    for threshold in (0.3, 0.6, 0.99):
        cut = labels_of(scene, background_threshold=threshold).background_unary
        close(cut, plain * (plain >= threshold))
        assert (cut > 0).any()
    default = labels_of(scene).background_unary
    close(default, labels_of(scene, background_threshold=0.99).background_unary)


def test_the_maximum_of_attention_may_be_less_than_one():
    """The cells between two boxes are background, but no pixel is: the threshold follows max(A)."""
    # Cells have their centres at 2, 6, 10; pixels at 5.5 and 6.5 lie in the boxes, 6 does not.
    boxes = [torch.tensor([[0.0, 0, 5.75, 12], [6.25, 0, 12, 12]])]
    features = torch.randn(1, 4, 3, 3, generator=seeded(3)).abs()
    image = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    plain, cut = (
        pseudo_labels(
            image,
            features,
            None,
            boxes,
            [torch.tensor([1, 1])],
            crf=None,
            background_threshold=threshold,
        ).background_unary
        for threshold in (None, 0.9)
    )
    assert 0.5 < plain.max() < 0.98
    expected = plain * (plain >= 0.9 * plain.max())
    close(cut, expected)
    assert not torch.equal(expected, plain * (plain >= 0.9))


def test_minmax_fills_the_unit_interval_inside_the_boxes():
    scene = fixed()
    plain = labels_of(scene, background_threshold=None).background_unary
    full = labels_of(scene, background_threshold=None, attention_minmax=True).background_unary
    outside = definite_background(scene.boxes, scene.image_size)[:, 0].bool()
    for b in range(2):
        inside = full[b][~outside[b]]
        before = plain[b][~outside[b]]
        close(inside.min(), torch.tensor(0.0))
        close(inside.max(), torch.tensor(1.0))
        close(inside, (before - before.min()) / (before.max() - before.min()))
    assert (full[outside] == 1).all()
    # The threshold comes after the scaling.
    cut = labels_of(scene, background_threshold=0.5, attention_minmax=True).background_unary
    close(cut, full * (full >= 0.5))


def test_backgrounds():
    scene = fixed()
    attention, cam, both = (
        labels_of(scene, background=name).background_unary for name in ("attention", "cam", "both")
    )
    close(both, (attention + cam) / 2)
    assert not torch.allclose(attention, cam)
    # The background's own map is not thresholded, and its maximum is over the whole image.
    close(labels_of(scene, background="cam", background_threshold=None).background_unary, cam)
    outside = definite_background(scene.boxes, scene.image_size)[:, 0].bool()
    assert (cam[outside] == 1).all()


def test_class_agnostic_labels():
    """One class in a box: 1 - u_0. Two classes on a pixel: half each."""
    scene = fixed()
    y = labels_of(scene, None, background_threshold=None)
    inside = ~definite_background([scene.boxes[1]], scene.image_size)[0, 0].bool()
    close(y.foreground_unary[1, 0], (1 - y.background_unary[1]) * inside)
    masks = [
        ~definite_background([scene.boxes[0][scene.labels[0] == c]], (24, 24))[0, 0].bool()
        for c in (1, 3)
    ]
    both = masks[0] & masks[1]
    assert both.any()
    close(y.foreground_unary[0, 0][both], (1 - y.background_unary[0][both]) / 2)
    close(y.foreground_unary[0, 1][both], (1 - y.background_unary[0][both]) / 2)
    close(y.foreground_unary.sum(1)[1], (1 - y.background_unary[1]) * inside)
    alone = masks[0] & ~masks[1]
    close(y.foreground_unary[0, 0][alone], 1 - y.background_unary[0][alone])


def test_a_softmax_may_be_asked_for_by_a_flag():
    def seen(**options):
        found = []
        labels_of(fixed(), crf=lambda _, p: found.append(p) or p, **options)
        return torch.cat([p.flatten() for p in found])

    assert torch.equal(seen(unary_softmax=True), seen(unary_softmax=1.0))
    assert torch.equal(seen(unary_softmax=False), seen())
    assert not torch.equal(seen(unary_softmax=True), seen())


def test_a_softmax_of_high_scale_is_the_argmax_of_the_unaries():
    scene = fixed()
    sharp = labels_of(scene, unary_softmax=1e4)
    plain = labels_of(scene)
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
    )
    assert y.background_unary.tolist() == [[[1.0, 1.0, 0.0]]]
    assert y.foreground_unary.tolist() == [[[[0.0, 0.0, 0.0]]]]
    assert seen[0][0, :, 0, 2].tolist() == [0.5, 0.5]
    assert seen[0][0, :, 0, 0].tolist() == [1.0, 0.0]
    assert y.crf.tolist() == [[[0, 0, 0]]]


def test_a_class_that_the_crf_lost_is_retrieved_by_its_weight():
    """Its activation is highest in its box, but the CRF gives all to the background."""
    features = torch.eye(2)[torch.tensor([0, 0, 1, 0])].T.reshape(1, 2, 1, 4)
    image = torch.zeros(1, 3, 1, 4, dtype=torch.uint8)
    boxes, labels = [torch.tensor([[1.0, 0.0, 4.0, 1.0]])], [torch.tensor([2])]

    def only_background(images, probabilities):
        zeros = torch.zeros_like(probabilities)
        zeros[:, 0] = 1
        return zeros

    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    y = pseudo_labels(image, features, weight, boxes, labels, crf=only_background)
    assert y.crf.tolist() == [[[0, 0, 0, 0]]]
    assert y.retrieval.tolist() == [[[0, 0, 2, 0]]]
    assert y.reliable.tolist() == [[[True, True, False, True]]]
    y = pseudo_labels(image, features, None, boxes, labels, crf=only_background)
    assert y.retrieval.tolist() == [[[0, 0, 0, 0]]]


def test_a_background_that_the_crf_lost_is_retrieved_by_its_weight():
    features = torch.eye(2)[torch.tensor([0, 1, 1])].T.reshape(1, 2, 1, 3)
    image = torch.zeros(1, 3, 1, 3, dtype=torch.uint8)
    boxes, labels = [torch.tensor([[0.0, 0.0, 3.0, 1.0]])], [torch.tensor([1])]

    def only_object(images, probabilities):
        zeros = torch.zeros_like(probabilities)
        zeros[:, 1] = 1
        return zeros

    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    y = pseudo_labels(image, features, weight, boxes, labels, crf=only_object)
    assert y.crf.tolist() == [[[1, 1, 1]]]
    assert y.retrieval.tolist() == [[[0, 1, 1]]]  # q_1 = (1, 2) / 3, w_0 = (1, 0)
    y = pseudo_labels(image, features, None, boxes, labels, crf=only_object)
    assert y.retrieval.tolist() == [[[1, 1, 1]]]


def test_prototypes_are_means_of_upsampled_features():
    """Eq. 8 at the resolution of the labels: a mask between cells takes a share of each."""
    scene = fixed(batch=1)
    y = labels_of(scene, crf=blurring)
    large = torch.nn.functional.interpolate(scene.features, (24, 24), mode="bilinear")
    cosines = torch.full((1, 4, 24, 24), -2.0, dtype=torch.float64)
    weight = weight_of(scene)
    unit = torch.nn.functional.normalize
    for c in (0, 1, 3):
        mask = y.crf[0] == c
        q = large[0][:, mask].mean(1) if mask.any() else weight[c]
        cosine = torch.einsum("d,dhw->hw", unit(q, dim=0), unit(scene.features[0], dim=0))
        allowed = (
            ~definite_background([scene.boxes[0][scene.labels[0] == c]], (24, 24))[0, 0].bool()
            if c
            else torch.ones(24, 24, dtype=torch.bool)
        )
        up = torch.nn.functional.interpolate(cosine[None, None], (24, 24), mode="bilinear")[0, 0]
        cosines[0, c] = torch.where(allowed, up, -2.0)
    assert torch.equal(y.retrieval, cosines.argmax(1))


# --------------------------------------------------------------------------------------- padding


def test_padding_changes_nothing():
    """What the padding holds is not seen, and has no label."""
    scene = fixed(batch=1)
    valid = torch.zeros(1, 24, 24, dtype=torch.bool)
    valid[:, :16, :20] = True
    scene = scene.replace(valid=valid)
    for kwargs in (
        {"background_threshold": None},
        {"attention_minmax": True, "background_threshold": None},
        {"background": "cam", "cam_normalization": "box"},
    ):
        y = labels_of(scene, crf=blurring, **kwargs)
        assert (y.crf[~valid] == 255).all()
        assert (y.retrieval[~valid] == 255).all()
        assert not y.reliable[~valid].any()
        assert ((y.crf == 255) == ~valid).all()
        assert (y.foreground_unary[0][:, ~valid[0]] == 0).all()
        other = labels_of(scene, crf=blurring, ignore_index=77, **kwargs)
        assert torch.equal(other.crf, torch.where(valid, y.crf, 77))
        assert torch.equal(other.retrieval, torch.where(valid, y.retrieval, 77))


def test_a_padded_pixel_is_not_a_maximum():
    """The largest activation lies in the padding: the class still peaks at 1 in the image."""
    features = torch.tensor([[1.0, 2.0, 9.0]]).reshape(1, 1, 1, 3)
    valid = torch.tensor([[[True, True, False]]])
    y = pseudo_labels(
        torch.zeros(1, 3, 1, 3, dtype=torch.uint8),
        features,
        torch.ones(2, 1),
        [torch.tensor([[0.0, 0.0, 3.0, 1.0]])],
        [torch.tensor([1])],
        crf=None,
        valid=valid,
        background="cam",
    )
    assert y.foreground_unary.tolist() == [[[[0.5, 1.0, 0.0]]]]
    assert y.background_unary[0, 0, :2].tolist() == [0.5, 1.0]


def test_the_crf_gets_the_validity_of_its_images():
    """Images are handed over by their number of classes: first the second, then the first."""
    scene = fixed()
    valid = torch.rand(2, 24, 24, generator=seeded(4)) < 0.7
    calls = []

    def crf(images, probabilities, valid):
        calls.append((images, valid))
        return probabilities

    labels_of(scene.replace(valid=valid), crf=crf)
    images = images_of(scene)
    assert len(calls) == 2
    for (seen, shown), b in zip(calls, (1, 0), strict=True):
        assert torch.equal(seen, images[b : b + 1])
        assert torch.equal(shown, valid[b : b + 1])


# --------------------------------------------------------------------------------------- corners


def test_corners_are_finite():
    for features in (
        torch.zeros(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4),
        -torch.ones(2, 3, 4, 4),
        torch.rand(2, 3, 4, 4) * 1e-30,
        torch.rand(2, 3, 4, 4) * 1e15,
        torch.rand(2, 3, 1, 1),
    ):
        for weight in (torch.zeros(4, 3), torch.rand(4, 3), -torch.rand(4, 3), None):
            for boxes in (
                [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.zeros(0, 4)],
                [torch.tensor([[3.0, 3.0, 3.0, 3.0], [50, 50, 60, 60]]), torch.zeros(0, 4)],
            ):
                labels = [torch.arange(len(x)) + 1 for x in boxes]
                for kwargs in (
                    {},
                    {"attention_minmax": True, "unary_softmax": 9.0},
                    {"background": "both", "cam_normalization": "box"},
                    {"valid": torch.zeros(2, 8, 8, dtype=torch.bool)},
                ):
                    if weight is None and "background" in kwargs:
                        continue
                    y = pseudo_labels(
                        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
                        features,
                        weight,
                        boxes,
                        labels,
                        crf=None,
                        **kwargs,
                    )
                    finite(y.background_unary, y.foreground_unary)
                    assert set(y.crf.unique().tolist()) <= {0, 1, 2, 255}
                    assert set(y.retrieval.unique().tolist()) <= {0, 1, 2, 255}
                    if "valid" in kwargs:
                        assert (y.crf == 255).all()


def test_a_constant_attention_scales_to_zero():
    """One direction everywhere: A = 1 in the box, up to rounding, and min-max scaling gives 0."""
    features = torch.ones(1, 3, 4, 4) * torch.rand(1, 1, 4, 4)
    boxes, labels = [torch.tensor([[3.0, 3.0, 10.0, 10.0]])], [torch.tensor([1])]
    y = pseudo_labels(
        torch.zeros(1, 3, 12, 12, dtype=torch.uint8),
        features,
        None,
        boxes,
        labels,
        crf=None,
        attention_minmax=True,
        background_threshold=None,
    )
    assert (y.background_unary[0, 3:10, 3:10] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_a_constant_is_not_scaled_up(dtype):
    """Beyond the last centre of a cell upsampling repeats a value, but rounds it each time anew."""
    features = torch.rand(20, 3, 2, 2, generator=seeded(6)).to(dtype)
    y = pseudo_labels(
        torch.zeros(20, 3, 16, 16, dtype=torch.uint8),
        features,
        None,
        [torch.tensor([[13.0, 13.0, 16.0, 16.0]])] * 20,
        [torch.tensor([1])] * 20,
        crf=None,
        attention_minmax=True,
        background_threshold=None,
    )
    assert (y.background_unary[:, 13:, 13:] == 0).all()


@pytest.mark.parametrize("agnostic", [False, True])
def test_no_images_and_no_boxes(agnostic):
    weight = None if agnostic else torch.rand(4, 3)
    for boxes, labels in [([], []), (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]:
        y = pseudo_labels(
            torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(0, 3, 4, 4),
            weight,
            boxes,
            labels,
            crf=blurring,
        )
        assert y.crf.shape == y.retrieval.shape == y.reliable.shape == (0, 8, 8)
        assert y.background_unary.shape == (0, 8, 8)
        assert y.foreground_unary.shape == (0, 0, 8, 8)
        assert y.classes.shape == (0, 0)
    empty = torch.zeros(0, dtype=torch.long)
    for boxes, labels in [
        ([torch.zeros(0, 4)] * 2, [empty] * 2),
        (torch.zeros(0, 5), empty),
    ]:
        y = pseudo_labels(
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            torch.rand(2, 3, 4, 4),
            weight,
            boxes,
            labels,
            crf=blurring,
        )
        assert (y.crf == 0).all()
        assert (y.retrieval == 0).all()
        assert y.reliable.all()
        assert (y.background_unary == 1).all()
        assert y.foreground_unary.shape == (2, 0, 8, 8)


# ------------------------------------------------------------------------------ dtypes and memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    scene = fixed(channels=16)
    low = scene.replace(features=scene.features.to(dtype))
    weight = weight_of(low).to(dtype)
    y = labels_of(low, weight, crf=blurring, background_threshold=0.5)
    exact = labels_of(
        low.replace(features=low.features.double()),
        weight.double(),
        crf=blurring,
        background_threshold=0.5,
    )
    assert y.background_unary.dtype == y.foreground_unary.dtype == dtype
    assert (y.crf == exact.crf).float().mean() > 0.99
    assert (y.retrieval == exact.retrieval).float().mean() > 0.99
    mixed = labels_of(low, weight.float(), crf=blurring, background_threshold=0.5)
    assert torch.equal(mixed.crf, y.crf)


def test_autocast_changes_nothing():
    scene = fixed()
    scene = scene.replace(features=scene.features.float())
    weight = weight_of(scene).float()
    plain = labels_of(scene, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = labels_of(scene, weight)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_layouts():
    scene = fixed()
    plain = labels_of(scene, crf=blurring)
    last = scene.features.to(memory_format=torch.channels_last)
    for features in (last, scene.features.mT.contiguous().mT):
        other = labels_of(scene.replace(features=features), crf=blurring)
        for a, b in zip(plain, other, strict=True):
            close(a, b)


def test_no_gradient_is_kept():
    scene = fixed()
    leaf = scene.features.requires_grad_()
    weight = weight_of(scene).requires_grad_()
    y = labels_of(scene.replace(features=leaf), weight)
    assert not any(part.requires_grad for part in y)


def test_inputs_are_not_written_to():
    scene = fixed()
    weight, images = weight_of(scene), images_of(scene)
    before = scene.features.clone(), weight.clone(), images.clone()
    for kwargs in ({}, {"background": "both", "attention_minmax": True}):
        pseudo_labels(images, scene.features, weight, scene.boxes, scene.labels, crf=None, **kwargs)
    for a, b in zip(before, (scene.features, weight, images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kwargs", [{}, {"background": "both", "cam_normalization": "box"}])
def test_features_are_never_upsampled(kwargs):
    """The largest tensor has a channel a class of the image, not one a feature or a box."""
    scene = fixed(channels=200, image_size=(96, 96))
    many = [torch.cat([x] * 10) for x in scene.boxes]
    scene = scene.replace(boxes=many, labels=[torch.cat([x] * 10) for x in scene.labels])
    images, weight = images_of(scene), weight_of(scene)
    with Largest() as largest:
        pseudo_labels(images, scene.features, weight, scene.boxes, scene.labels, crf=None, **kwargs)
    assert largest.elements <= 2 * 3 * 96 * 96


# ------------------------------------------------------------------------------- module and errors


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"grid_size": 3, "background_threshold": None},
        {"background_threshold": 0.4},
        {"background": "cam"},
        {"background": "both"},
        {"attention_minmax": True},
        {"cam_normalization": "box"},
        {"unary_softmax": 3.0},
        {"align_corners": True},
        {"ignore_index": 99},
    ],
)
def test_the_module_is_the_function(kwargs):
    scene = fixed()
    valid = torch.ones(2, 24, 24, dtype=torch.bool)
    valid[:, :, 20:] = False
    scene = scene.replace(valid=valid)
    module = PseudoLabelGenerator(blurring, **kwargs)
    copy = pickle.loads(pickle.dumps(module))
    args = (images_of(scene), scene.features, weight_of(scene), scene.boxes, scene.labels)
    expected = labels_of(scene, crf=blurring, **kwargs)
    assert isinstance(expected, PseudoLabels)
    for found in (module(*args, valid), copy(*args, valid=valid)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert not module.state_dict()
    for name, value in kwargs.items():
        if name not in ("align_corners", "ignore_index"):
            assert f"{name}={value!r}" in repr(module)
    if kwargs:
        default = labels_of(scene, crf=blurring)
        assert any(not torch.equal(a, b) for a, b in zip(expected, default, strict=True)), (
            "an option without an effect"
        )


def test_a_crf_module_is_part_of_the_generator():
    class Crf(torch.nn.Module):
        def forward(self, images, probabilities):
            return probabilities

    generate = PseudoLabelGenerator(Crf())
    assert [name for name, _ in generate.named_children()] == ["crf"]
    assert PseudoLabelGenerator().crf is None
    assert (PseudoLabelGenerator().grid_size, PseudoLabelGenerator().background_threshold) == (
        1,
        0.99,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kwargs", [{}, {"background": "both", "cam_normalization": "box"}])
def test_cuda(kwargs):
    scene = fixed()
    expected = labels_of(scene, crf=blurring, **kwargs)
    found = pseudo_labels(
        images_of(scene).cuda(),
        scene.features.cuda(),
        weight_of(scene).cuda(),
        [x.cuda() for x in scene.boxes],
        [x.cuda() for x in scene.labels],
        crf=blurring,
        **kwargs,
    )
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        close(a.cpu(), b)


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


def test_errors():
    scene = fixed()
    good = {
        "images": images_of(scene),
        "features": scene.features,
        "weight": weight_of(scene),
        "boxes": scene.boxes,
        "labels": scene.labels,
    }
    generate = PseudoLabelGenerator()

    def fails(kind, text, **changes):
        raises(kind, text, pseudo_labels, **{**good, **changes}, crf=None)
        raises(kind, text, generate, **{**good, **changes})

    images, x, w = good["images"], good["features"], good["weight"]
    fails(TypeError, "images must have dtype torch.uint8 (RGB), got torch.float32",
          images=images.float())  # fmt: skip
    fails(ValueError, "images must have shape (B, 3, H, W), got (2, 1, 24, 24)",
          images=images[:, :1])  # fmt: skip
    fails(ValueError, "images must have shape (B, 3, H, W), got (2, 24, 24, 3)",
          images=images.permute(0, 2, 3, 1))  # fmt: skip
    fails(TypeError, "images must be a Tensor, got ndarray", images=images.numpy())
    fails(ValueError, "features must have shape (2, D, h, w), got (1, 4, 6, 6)", features=x[:1])
    fails(TypeError, "features must have a floating-point dtype, got torch.int64",
          features=x.long())  # fmt: skip
    fails(ValueError, "weight must have shape (L + 1, 4), got (4, 3)", weight=w[:, :3])
    fails(TypeError, "weight must have a floating-point dtype, got torch.int64", weight=w.long())
    fails(ValueError, "boxes must have one entry per image (2), got 1 entries",
          boxes=scene.boxes[:1])  # fmt: skip
    fails(
        ValueError,
        "boxes must have x1 <= x2 and y1 <= y2, got [9.0, 0.0, 1.0, 4.0]",
        boxes=[scene.boxes[0], torch.tensor([[9.0, 0, 1, 4]])],
    )
    fails(
        ValueError,
        "boxes must be finite, got [nan, 0.0, 1.0, 4.0]",
        boxes=[scene.boxes[0], torch.tensor([[float("nan"), 0, 1, 4]])],
    )
    fails(ValueError, "labels must have one entry per image (2), got 1 entries",
          labels=scene.labels[:1])  # fmt: skip
    fails(ValueError, "labels must have shape (4,), got (3,)", labels=torch.tensor([1, 2, 3]))
    fails(TypeError, "labels must be a list of Tensors or a Tensor, got int", labels=3)
    fails(TypeError, "labels[0] must have an integer dtype, got torch.float32",
          labels=[scene.labels[0].float(), scene.labels[1]])  # fmt: skip
    fails(ValueError, "labels must be in 1..3, got 4", labels=torch.tensor([1, 4, 1, 1]))
    fails(ValueError, "labels must be in 1..3, got 0", labels=torch.tensor([1, 0, 1, 1]))
    fails(ValueError, "valid must have shape (2, 24, 24), got (2, 6, 6)",
          valid=torch.ones(2, 6, 6, dtype=torch.bool))  # fmt: skip
    fails(TypeError, "valid must have dtype torch.bool, got torch.uint8",
          valid=torch.ones(2, 24, 24, dtype=torch.uint8))  # fmt: skip
    for name in ("features", "weight", "labels", "valid"):
        value = torch.ones(2, 24, 24, dtype=torch.bool) if name == "valid" else good[name]
        value = torch.cat(value) if name == "labels" else value
        with pytest.raises(ValueError, match=rf"{name}.* on .*meta|{name} .*got meta"):
            pseudo_labels(**{**good, name: value.to("meta")}, crf=None)


def test_labels_must_fit_the_boxes_image_by_image():
    """Three boxes and one label, then one box and three labels, add up, but do not fit."""
    scene = fixed()
    with pytest.raises(ValueError, match=r"labels\[0\] must have shape \(3,\), got \(1,\)"):
        labels_of(scene.replace(labels=[torch.tensor([1]), torch.tensor([1, 2, 3])]))


def test_errors_of_options():
    scene = fixed()
    for wrong, kind, text in [
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
        ({"grid_size": None}, TypeError, "grid_size must be an int, got NoneType"),
        (
            {"background": "none"},
            ValueError,
            "background must be one of 'attention', 'cam', 'both', got 'none'",
        ),
        (
            {"background_threshold": 1.5},
            ValueError,
            "background_threshold must be >= 0 and <= 1, got 1.5",
        ),
        (
            {"background_threshold": "0.99"},
            TypeError,
            "background_threshold must be a number, got str",
        ),
        (
            {"cam_normalization": "image"},
            ValueError,
            "cam_normalization must be one of 'class', 'box', got 'image'",
        ),
        ({"unary_softmax": 0}, ValueError, "unary_softmax must be > 0, got 0"),
        ({"unary_softmax": "1"}, TypeError, "unary_softmax must be a number, got str"),
    ]:
        with pytest.raises(kind) as caught:
            labels_of(scene, **wrong)
        assert str(caught.value) == text
        with pytest.raises(kind) as caught:
            PseudoLabelGenerator(**wrong)
        assert str(caught.value) == text
    for name in ("cam", "both"):
        text = f"background must be \"attention\" where weight is None, got '{name}'"
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            labels_of(scene, None, background=name)
        assert str(caught.value) == text
    with pytest.raises(TypeError, match="crf must be callable or None, got str"):
        PseudoLabelGenerator("densecrf")
