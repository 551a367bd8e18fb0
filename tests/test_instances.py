"""A mask for every box: the oracle in loops, laws, corners, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import reference_instances as reference
from assertions import close
from bapnal import FeatureHead, box_log_odds, instance_labels, pseudo_labels
from bapnal.boxes import box_cells
from instance_scenes import RNG, SIDE, colours, label, scene


def colours_in_loops(image):
    def block(channel, i, j):
        values = [channel[8 * i + y][8 * j + x] - 100 for y in range(8) for x in range(8)]
        return sum(values) / 64

    size = len(image[0]) // 8, len(image[0][0]) // 8
    return [
        reference.plane(size, lambda i, j, c=channel: block(c, i, j))  # one channel each
        for channel in image
    ]


def unchanged(guidance, probabilities):
    return probabilities


def pixels(mask):
    return {tuple(p) for p in mask.nonzero().tolist()}


# ------------------------------------------------------------------------------------------- oracle


@settings(max_examples=8)
@given(st.integers(0, 10**6))
def test_agrees_with_loops(seed):
    generator = RNG().manual_seed(seed)
    height, width = torch.randint(20, 80, (2,), generator=generator).tolist()
    count = 1 + seed % 3
    image = torch.randint(0, 200, (3, height, width), generator=generator, dtype=torch.uint8)
    image[:, height // 3 : 2 * height // 3, width // 4 : 2 * width // 3] += 55
    a = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64)
    a = a.sort(1).values.flatten(1) * torch.tensor([width, height]).repeat(2) * 1.1 - 2
    labels = torch.randint(1, 3, (count,), generator=generator)
    y = label(image, a, labels, crf=unchanged)
    masks, retrieved, odds, classes, reliable = reference.instances(
        image.tolist(), a.tolist(), labels.tolist(), colours_in_loops, lambda q: q, SIDE
    )
    # A crop may differ by one grey level where the antialiased value lies between two.
    for k in range(count):
        found = y.log_odds[k].double()
        expected = torch.full((height, width), -torch.inf, dtype=torch.float64)
        for (i, j), value in odds[k].items():
            expected[i, j] = value
        assert torch.equal(found.isinf(), expected.isinf())
        gap = (found - expected)[~expected.isinf()].abs()
        assert gap.max() < 0.25
        assert gap.median() < 0.02
    wrong = sum(len(pixels(y.masks[k]) ^ masks[k]) for k in range(count))
    wrong += sum(len(pixels(y.retrieval[k]) ^ retrieved[k]) for k in range(count))
    wrong += int((y.semantic[0] != torch.tensor(classes)).sum())
    wrong += int((y.semantic_reliable[0] != torch.tensor(reliable)).sum())
    assert wrong <= 0.02 * height * width


def test_agrees_with_loops_to_rounding_where_no_crop_is_resized():
    image, boxes, labels = scene(size=(64, 64))
    boxes = boxes.clamp(max=64).double()
    y = label(image, boxes, labels, crf=unchanged)
    masks, retrieved, odds, classes, reliable = reference.instances(
        image.tolist(), boxes.tolist(), labels.tolist(), colours_in_loops, lambda q: q, SIDE
    )
    for k in range(3):
        assert pixels(y.masks[k]) == masks[k]
        assert pixels(y.retrieval[k]) == retrieved[k]
        inside = box_cells(boxes[k], (64, 64), (64, 64))
        close(y.log_odds[k][inside].double(), list(odds[k].values()), tolerance=1e-4)
    assert y.semantic[0].tolist() == classes
    assert y.semantic_reliable[0].tolist() == reliable


@pytest.mark.parametrize("bias", [0, 1])
def test_weights_agree_with_loops(bias):
    image, boxes, labels = scene(size=(64, 64))
    boxes = boxes.clamp(max=64).double()
    weight = torch.randn(3, 3 + bias, generator=RNG().manual_seed(bias), dtype=torch.float64)
    y = label(image, boxes, labels, crf=unchanged, classifier=weight)
    masks, _, odds, classes, _ = reference.instances(
        *(image.tolist(), boxes.tolist(), labels.tolist(), colours_in_loops, lambda q: q, SIDE),
        weight=weight.tolist(),
    )
    for k in range(3):
        assert pixels(y.masks[k]) == masks[k]
        inside = box_cells(boxes[k], (64, 64), (64, 64))
        close(y.log_odds[k][inside].double(), list(odds[k].values()), tolerance=1e-4)
    assert y.semantic[0].tolist() == classes
    plain = label(image, boxes, labels, crf=unchanged)
    assert not torch.equal(y.log_odds, plain.log_odds)


def test_log_odds_of_the_image_are_those_of_the_label_maps():
    """A box of a quarter of the image on which crop and image agree follows the label maps."""
    image = torch.full((3, 64, 64), 40, dtype=torch.uint8)
    image[:, 8:40, 24:48] = 200
    box, labels = torch.tensor([[16.0, 0, 56, 48]]), torch.tensor([1])
    seen = []
    label(image, box, labels, head=lambda zoomed: seen.append(zoomed) or zoomed.z)
    (zoomed,) = seen
    close(zoomed.agreement, torch.ones(1), tolerance=0.1)
    args = (image[None], colours(image[None]), None, [box], [labels])
    u_0 = pseudo_labels(*args, crf=None, grid_size=4, background_prior=0.0).background_unary
    assert u_0.shape == (1, 64, 64)
    own = (0, slice(0, 24), slice(8, 28))  # the box in pixels of the CRF
    raised = zoomed.whole[own] - F.avg_pool2d(3 - 6 * u_0, 2)[own]
    close(raised, raised.mean().expand_as(raised), tolerance=1e-6)
    assert raised.mean() > 1  # the object fills less than a half
    assert (zoomed.whole[own] >= 0).double().mean() >= 0.6


def test_gaps_that_the_whole_image_knows_of_are_kept():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 8:56, 18:46] = 200
    box, labels = torch.tensor([[16.0, 8, 48, 56]]), torch.tensor([1])

    def head(zoomed):
        return torch.where(zoomed.u.abs() < 0.8, 5.0, -5.0)

    def width(**options):
        mask = label(image, box, labels, head=head, crf=unchanged, side=128, **options).masks[0]
        return int(mask.any(0).sum())

    assert width() <= width(stretch=0.0) + 1 < 32
    dull = torch.zeros_like(image)
    unknown = label(dull, box, labels, head=head, crf=unchanged, side=128).masks[0]
    assert int(unknown.any(0).sum()) == 32


def test_classes_without_agreement_leave_the_prior():
    image, boxes, labels = scene()
    seen = []
    label(image, boxes, labels, head=lambda zoomed: seen.append(zoomed) or zoomed.z)
    for zoomed in seen:
        alone = zoomed._replace(agreement=torch.zeros_like(zoomed.agreement))
        prior = 3 * (1 - zoomed.u**2 - zoomed.v**2) + 1
        close(box_log_odds(alone), prior + zoomed.z)


def test_a_feature_head_takes_the_place_of_weights():
    image = scene(size=(64, 64))[0]
    box, labels = torch.tensor([[16.0, 0, 56, 48]]), torch.tensor([1])
    torch.manual_seed(0)
    head = FeatureHead(3, 3, width=8)
    seen = []
    label(
        *(image, box, labels), classifier=head, head=lambda zoomed: seen.append(zoomed) or zoomed.z
    )
    activations = head(colours(image[None]))
    args = (image[None], activations, head.weight, [box], [labels])
    u_0 = pseudo_labels(*args, crf=None, grid_size=4, background_prior=0.0).background_unary
    own = (0, slice(0, 24), slice(8, 28))  # the box in pixels of the CRF
    raised = seen[0].whole[own] - F.avg_pool2d(3 - 6 * u_0, 2)[own]
    close(raised, raised.mean().expand_as(raised), tolerance=1e-4)


def test_crf_gets_positions_relative_to_the_box_and_the_crop():
    seen = []

    def crf(guidance, probabilities):
        seen.append((guidance, probabilities))
        return probabilities

    image, boxes, labels = scene()
    label(image, boxes[:1], labels[:1], crf=crf, head=lambda zoomed: torch.zeros_like(zoomed.z))
    guidance, probabilities = seen[0]
    close(probabilities.sum(1), torch.ones(1, *probabilities.shape[2:]), tolerance=1e-6)
    step = guidance[0, 0, 0, 1] - guidance[0, 0, 0, 0]
    pixels_in_box = (probabilities[0, 1] == 0.5).sum()
    close(step, float(pixels_in_box) ** -0.5, tolerance=1e-6)
    assert guidance[0, 2:].min() >= 0
    assert guidance[0, 2:].max() > 100


# --------------------------------------------------------------------------------------------- laws


def random_boxes(seed, size, count):
    generator = RNG().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(1).values
    scale = torch.tensor([size[1], size[0]], dtype=torch.float32)
    return (corners * scale * 1.2 - 0.1 * scale).flatten(1)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.booleans())
def test_every_box_gets_a_mask_inside_it(seed, dull):
    image, _, _ = scene(seed)
    if dull:
        image = torch.full_like(image, 7)
    boxes = random_boxes(seed, (72, 88), 4)
    boxes[3, 2:] = boxes[3, :2]  # no area at all
    y = label(image, boxes, torch.tensor([1, 1, 2, 2]))
    inside = box_cells(boxes, (72, 88), (72, 88))
    assert y.masks.flatten(1).any(1).all()
    assert not (y.masks & ~inside).any()
    assert not (y.retrieval & ~inside).any()
    assert torch.equal(y.log_odds > -torch.inf, inside)
    assert torch.equal(y.reliable, y.masks == y.retrieval)
    assert torch.equal(y.semantic[0] > 0, y.masks.any(0))
    for c in (1, 2):
        own = y.masks[torch.tensor([1, 1, 2, 2]) == c].any(0)
        assert not ((y.semantic[0] == c) & ~own).any()
    assert not (y.semantic_reliable[0] & ~y.reliable.all(0)).any()
    assert bool(((y.doubt >= 0) & (y.doubt <= 1)).all())


def test_a_head_that_sees_nothing_leaves_the_ellipse():
    image, boxes, _ = scene()
    y = label(
        image, boxes, torch.tensor([1, 2, 3]), head=lambda zoomed: torch.full_like(zoomed.z, -4.0)
    )
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        i, j = torch.meshgrid(torch.arange(72) + 0.5, torch.arange(88) + 0.5, indexing="ij")
        radius = ((2 * j - x1 - x2) / (x2 - x1)) ** 2 + ((2 * i - y1 - y2) / (y2 - y1)) ** 2
        assert torch.equal(y.masks[k], (radius < 4 / 3) & box_cells(boxes[k], (72, 88), (72, 88)))


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_order_of_boxes_does_not_matter(seed):
    image, _, _ = scene(seed)
    boxes, labels = random_boxes(seed, (72, 88), 4), torch.tensor([1, 2, 1, 3])
    order = torch.randperm(4, generator=RNG().manual_seed(seed))
    # The lattice rounds sums of a batch differently in another order.
    one = label(image, boxes, labels, crf=unchanged)
    other = label(image, boxes[order], labels[order], crf=unchanged)
    assert (one.masks[order] ^ other.masks).float().mean() < 1e-3
    assert (one.semantic != other.semantic).float().mean() < 1e-3
    close(one.doubt[order], other.doubt, tolerance=0.05)


def test_alone_as_in_a_batch():
    first, second = scene(0), scene(1)
    boxes, labels = [first[1], second[1][:2]], [first[2], second[2][:2]]
    images = torch.stack([first[0], second[0]])
    both = instance_labels(images, boxes, labels, colours, side=SIDE)
    for i, own in ((0, slice(0, 3)), (1, slice(3, 5))):
        alone = instance_labels(images[i : i + 1], boxes[i : i + 1], labels[i], colours, side=SIDE)
        assert torch.equal(alone.masks, both.masks[own])
        assert torch.equal(alone.semantic[0], both.semantic[i])
        assert torch.equal(alone.semantic_reliable[0], both.semantic_reliable[i])
    rois = torch.cat([torch.tensor([[0.0], [0], [0], [1], [1]]), torch.cat(boxes)], dim=1)
    again = instance_labels(images, rois, torch.cat(labels), colours, side=SIDE, batch_size=1)
    assert torch.equal(again.masks, both.masks)


def test_small_gaps_are_stretched_away_and_large_ones_are_kept():
    image = torch.zeros(3, 288, 352, dtype=torch.uint8)
    box, one = torch.tensor([[50.0, 60, 110, 120]]), torch.tensor([1])

    def columns(gap):  # of a head that leaves this share of the box empty on either side
        def head(zoomed):
            return torch.where(zoomed.u.abs() < 1 - 2 * gap, 5.0, -5.0)

        mask = label(image, box, one, head=head, crf=unchanged, side=128).masks[0]
        return mask.any(0).nonzero()[[0, -1], 0].tolist()

    assert columns(0.05) == [50, 109]
    first, last = columns(0.18)
    assert first in (60, 61)
    assert last in (98, 99)


def test_boxes_of_one_class_share_pixels_unless_one_would_be_empty():
    image, boxes, _ = scene()
    twice = boxes[[0, 0]]
    same = label(image, twice, torch.tensor([1, 1]))
    assert torch.equal(same.masks[0], same.masks[1]) or not (same.masks[0] & same.masks[1]).any()
    assert same.masks.flatten(1).any(1).all()
    overlapping = torch.tensor([[10.0, 15, 50, 50], [30, 20, 70, 60]])
    shared = label(image, overlapping, torch.tensor([1, 1])).masks
    apart = label(image, overlapping, torch.tensor([1, 2])).masks
    assert (apart[0] & apart[1]).any()
    assert not (shared[0] & shared[1]).any()
    assert torch.equal(shared.any(0), apart.any(0))


def test_pixels_that_two_classes_hold_are_unreliable():
    image, _, _ = scene()
    overlapping = torch.tensor([[10.0, 15, 50, 50], [30, 20, 70, 60]])
    y = label(image, overlapping, torch.tensor([1, 2]))
    both = y.masks.all(0)
    assert both.any()
    assert not y.semantic_reliable[0][both].any()


def test_an_object_of_its_own_colour_is_found():
    image = torch.full((3, 96, 96), 40, dtype=torch.uint8)
    truth = torch.zeros(96, 96, dtype=torch.bool)
    truth[30:60, 30:45] = truth[45:60, 30:66] = True  # an L
    image[:, truth] = 200
    y = label(image, torch.tensor([[30.0, 30, 66, 60]]), torch.tensor([4]), side=256)
    union = (y.masks[0] | truth).sum()
    assert (y.masks[0] & truth).sum() > 0.9 * union
    assert y.semantic[0].unique().tolist() == [0, 4]
    assert not bool(y.doubtful[0])
