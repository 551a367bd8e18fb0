"""Y_crf and Y_ret (Eq. 5-9) against the oracle, and their laws."""

import torch
from hypothesis import given, settings

import reference
import reference_labels
from assertions import close
from bapnal import definite_background, pseudo_labels
from labelling import (
    blurring,
    fixed,
    images_of,
    labels_of,
    options,
    oracle_blurring,
    oracle_of,
    weight_of,
    weights,
)
from strategies import scenes, seeded


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
@given(scene=scenes(max_batch=2, max_image=9), kwargs=options, kind=weights)
def test_labels_agree_with_the_oracle(scene, kwargs, kind):
    if kind is None and kwargs["background"] == "cam":
        kwargs["background"] = "attention"
    weight = weight_of(scene, kind)
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
        maps = reference_labels.retrieval(
            scene.features[b].tolist(),
            None if weight is None else weight.tolist(),
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
    # All activations positive: where two are 0, the classes are equal and the first is taken.
    scene = fixed()
    scene = scene.replace(features=scene.features.abs())
    weight = weight_of(scene).abs()
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
        {},
        {"background": "attention", "foreground": "cam", "background_threshold": 0.9},
        {"background": "cam", "foreground": "cam", "cam_normalization": "box"},
        {"background_minmax": False},
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
