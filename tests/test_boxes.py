"""Boxes to cells, bins, validity and the definite background M."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from bapnal.boxes import (
    box_bins,
    box_cells,
    box_masks,
    definite_background,
    pad_boxes,
    paint_boxes,
    valid_cells,
)
from strategies import random_boxes, scenes, seeded, seeds, sizes

image_sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))


def as_rois(boxes):
    """The same boxes in torchvision's RoI form."""
    return torch.cat(
        [torch.cat([torch.full((len(b), 1), float(i)).to(b), b], 1) for i, b in enumerate(boxes)]
    )


@given(seed=seeds, image_size=image_sizes, map_size=sizes)
def test_cells_agree_with_the_oracle(seed, image_size, map_size):
    boxes = random_boxes(seeded(seed), 6, image_size)
    cells = box_cells(boxes, image_size, map_size)
    assert cells.dtype == torch.bool
    assert cells.tolist() == [
        reference.box_cells(box, image_size, map_size) for box in boxes.tolist()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds, image_size=image_sizes, map_size=sizes, bins=st.integers(1, 4))
def test_bins_agree_with_the_oracle(dtype, seed, image_size, map_size, bins):
    # Multiples of bins / 4: the edges of all bins are quarters, which floats hold exactly.
    boxes = random_boxes(seeded(seed), 6, image_size).to(dtype) * bins
    parts = box_bins(boxes, bins)
    assert parts.shape == (6, bins * bins, 4)
    image_size = (image_size[0] * bins, image_size[1] * bins)
    cells = box_cells(parts, image_size, map_size).tolist()
    for box, found, corners in zip(boxes.tolist(), cells, parts.tolist(), strict=True):
        expected = reference.box_bins(box, bins)
        for part, exact in zip(corners, expected, strict=True):
            assert part == pytest.approx([float(x) for x in exact], abs=1e-5)
        assert found == [reference.box_cells(part, image_size, map_size) for part in expected]


@given(seed=seeds, image_size=image_sizes, map_size=sizes, bins=st.integers(1, 4))
def test_every_box_and_every_bin_owns_a_cell(seed, image_size, map_size, bins):
    boxes = random_boxes(seeded(seed), 6, image_size, outside=5.0)
    assert box_cells(boxes, image_size, map_size).flatten(1).any(1).all()
    assert box_cells(box_bins(boxes, bins), image_size, map_size).flatten(2).any(2).all()


@given(seed=seeds, size=st.integers(1, 8), bins=st.integers(1, 4))
def test_integer_boxes_are_pixels_and_bins_of_divisible_boxes_partition_them(seed, size, bins):
    generator = seeded(seed)
    x1, y1 = torch.randint(0, 5, (2,), generator=generator).tolist()
    w, h = (torch.randint(1, size + 1, (2,), generator=generator) * bins).tolist()
    box = torch.tensor([x1, y1, x1 + w, y1 + h], dtype=torch.float32)
    image_size = (y1 + h + 2, x1 + w + 1)
    cells = box_cells(box, image_size, image_size)
    expected = torch.zeros(image_size, dtype=torch.bool)
    expected[y1 : y1 + h, x1 : x1 + w] = True
    assert torch.equal(cells, expected)
    parts = box_cells(box_bins(box, bins), image_size, image_size)
    assert torch.equal(parts.sum(0), expected.long())
    first = torch.zeros(image_size, dtype=torch.bool)
    first[y1 : y1 + h // bins, x1 : x1 + w // bins] = True
    assert torch.equal(parts[0], first)


@given(seed=seeds, map_size=sizes, factor=st.integers(1, 4))
def test_cells_are_nearest_neighbour_resizing_of_the_box_mask(seed, map_size, factor):
    """Sec. 3.1: boxes are resized to the feature map by nearest-neighbour interpolation."""
    image_size = (map_size[0] * (2 * factor + 1), map_size[1] * (2 * factor + 1))
    draw = torch.randint(0, 100, (4,), generator=seeded(seed)) % (max(image_size) + 1)
    x1, x2 = sorted(draw[:2].clamp(max=image_size[1]).tolist())
    y1, y2 = sorted(draw[2:].clamp(max=image_size[0]).tolist())
    mask = torch.zeros(image_size)
    mask[y1:y2, x1:x2] = 1
    resized = torch.nn.functional.interpolate(mask[None, None], map_size, mode="nearest-exact")
    cells = box_cells(torch.tensor([x1, y1, x2, y2], dtype=torch.float32), image_size, map_size)
    if resized.any():
        extra = cells.float() - resized[0, 0]
        assert extra.min() == 0
        assert extra.sum() <= 1  # the cell under the centre
    else:
        assert cells.sum() == 1


def test_borders_are_half_open():
    cells = box_cells(torch.tensor([0.5, 1.5, 2.5, 3.5]), (4, 4), (4, 4))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 0:2] = True
    assert torch.equal(cells, expected)


@pytest.mark.parametrize(
    ("box", "cell"),
    [
        ([0.0, 0.0, 0.1, 0.1], (0, 0)),
        ([3.9, 3.9, 4.0, 4.0], (1, 1)),
        ([1.9, 1.9, 2.1, 2.1], (1, 1)),  # its centre lies on the border: the next cell
        ([1.8, 0.2, 2.1, 0.4], (0, 0)),
        ([3.0, 1.0, 3.0, 1.0], (0, 1)),  # a point
        ([-9.0, -9.0, -8.0, -8.0], (0, 0)),  # outside: clamped to the map
        ([20.0, -3.0, 21.0, -2.0], (0, 1)),
        ([0.2, 20.0, 0.4, 21.0], (1, 0)),
    ],
)
def test_the_smallest_boxes_own_the_cell_under_their_centre(box, cell):
    cells = box_cells(torch.tensor(box), (4, 4), (2, 2))
    assert cells.nonzero().tolist() == [list(cell)]


@given(scene=scenes())
def test_definite_background_agrees_with_the_oracle(scene):
    found = definite_background(scene.boxes, scene.image_size, scene.map_size, valid=scene.valid)
    assert found.shape == (scene.batch, 1, *scene.map_size)
    for b in range(scene.batch):
        _, boxes, valid = scene.image(b)
        expected = reference.definite_background(boxes, scene.image_size, scene.map_size, valid)
        assert found[b, 0].tolist() == expected


@given(scene=scenes(padding=True))
def test_valid_cells_agree_with_the_oracle(scene):
    if scene.valid is None:
        return
    found = valid_cells(scene.valid, scene.map_size)
    for b in range(scene.batch):
        assert found[b].tolist() == reference.valid_cells(scene.valid[b].tolist(), scene.map_size)


@given(scene=scenes())
def test_masks_are_padded_rows_of_cells(scene):
    padded = pad_boxes(scene.boxes, scene.batch)
    masks = box_masks(padded, scene.image_size, scene.map_size, scene.valid)
    for b in range(scene.batch):
        _, boxes, valid = scene.image(b)
        shown = (
            torch.tensor(reference.valid_cells(valid, scene.map_size))
            if valid is not None
            else torch.ones(scene.map_size, dtype=torch.bool)
        )
        for k in range(masks.shape[1]):
            if k < len(boxes):
                cells = reference.box_cells(boxes[k], scene.image_size, scene.map_size)
                assert torch.equal(masks[b, k], torch.tensor(cells) & shown)
            else:
                assert not masks[b, k].any()


@given(scene=scenes(min_batch=0))
def test_restore_brings_back_the_order_of_the_boxes(scene):
    together = torch.cat(scene.boxes) if scene.boxes else torch.zeros(0, 4)
    for boxes in [scene.boxes, as_rois(scene.boxes)] if scene.boxes else [[], torch.zeros(0, 5)]:
        padded = pad_boxes(boxes, scene.batch)
        close = torch.equal(padded.restore(padded.corners).double(), together.double())
        assert close
        assert padded.present.sum() == len(together)


def test_rois_may_come_in_any_order_of_images():
    rois = torch.tensor([[1.0, 0, 0, 2, 2], [0, 1, 1, 3, 3], [1, 2, 2, 4, 4], [0, 0, 0, 1, 1]])
    padded = pad_boxes(rois, 3)
    assert padded.image.tolist() == [1, 0, 1, 0]
    assert torch.equal(padded.restore(padded.corners), rois[:, 1:])
    m = definite_background(rois, (4, 4), batch_size=3)
    listed = [rois[[1, 3], 1:], rois[[0, 2], 1:], torch.zeros(0, 4)]
    assert torch.equal(m, definite_background(listed, (4, 4)))


@given(scene=scenes())
def test_both_forms_of_boxes_mean_the_same(scene):
    kwargs = {"batch_size": scene.batch, "valid": scene.valid}
    a = definite_background(scene.boxes, scene.image_size, scene.map_size, **kwargs)
    b = definite_background(as_rois(scene.boxes), scene.image_size, scene.map_size, **kwargs)
    assert torch.equal(a, b)


def test_nothing_is_legal():
    assert definite_background([], (4, 6)).shape == (0, 1, 4, 6)
    assert definite_background(torch.zeros(0, 5), (4, 6), batch_size=0).shape == (0, 1, 4, 6)
    assert definite_background([torch.zeros(0, 4)], (4, 6)).all()
    assert definite_background(torch.zeros(0, 5), (4, 6), batch_size=2).shape == (2, 1, 4, 6)
    assert box_cells(torch.zeros(0, 4), (4, 4), (2, 2)).shape == (0, 2, 2)


def test_the_map_size_is_the_image_size_by_default():
    boxes = [torch.tensor([[1.0, 2.0, 3.0, 5.0]])]
    m = definite_background(boxes, (6, 4))
    expected = torch.ones(6, 4)
    expected[2:5, 1:3] = 0
    assert torch.equal(m, expected[None, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_coarse_dtypes_are_widened_before_any_arithmetic(dtype):
    """Half precision cannot tell 900.5 from 900; the centre of a cell must not be rounded so."""
    corners = (torch.rand(40, 2, generator=seeded(0)) * 1000).sort(dim=1).values
    boxes = torch.stack([corners[:, 0], 0 * corners[:, 0], corners[:, 1], corners[:, 1]], 1)
    for box in boxes.to(dtype):
        exact = definite_background([box[None].double()], (1000, 1000), (30, 300))
        found = definite_background([box[None]], (1000, 1000), (30, 300))
        assert found.dtype == torch.float32
        assert torch.equal(found, exact.float())


def error(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


@given(seed=seeds, image_size=image_sizes, masked=st.booleans())
def test_smaller_boxes_are_painted_on_larger_ones(seed, image_size, masked):
    generator = seeded(seed)
    boxes = random_boxes(generator, 5, image_size)
    labels = torch.randint(1, 9, (5,), generator=generator)
    masks = torch.rand(5, *image_size, generator=generator) < 0.5 if masked else None
    painted = paint_boxes(boxes, labels, image_size, masks=masks, background=7)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    first = sorted(range(5), key=lambda i: (areas[i], -i))  # the topmost
    cells = [reference.box_cells(box, image_size, image_size) for box in boxes.tolist()]
    for y in range(image_size[0]):
        for x in range(image_size[1]):
            over = (
                int(labels[i])
                for i in first
                if cells[i][y][x] and (masks is None or masks[i, y, x])
            )
            assert painted[y, x] == next(over, 7)


def test_errors_of_boxes():
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    error(
        TypeError,
        "boxes must be a list of Tensors or a Tensor, got float",
        pad_boxes,
        3.0,
        1,
    )
    error(
        ValueError,
        "boxes must have one entry per image (2), got 1 entries",
        pad_boxes,
        [box],
        2,
    )
    error(TypeError, "boxes[1] must be a Tensor, got list", pad_boxes, [box, [[0, 0, 1, 1]]], 2)
    error(ValueError, "boxes[0] must have shape (K, 4), got (4,)", pad_boxes, [box[0]], 1)
    error(ValueError, "boxes must have shape (K, 5), got (1, 4)", pad_boxes, box, 1)
    nan = torch.tensor([[0.0, float("nan"), 2.0, 2.0]])
    error(ValueError, "boxes must be finite, got [0.0, nan, 2.0, 2.0]", pad_boxes, [nan], 1)
    far = torch.tensor([[0.0, 0.0, float("inf"), 2.0]])
    error(ValueError, "boxes must be finite, got [0.0, 0.0, inf, 2.0]", pad_boxes, [far], 1)
    for wrong in ([3.0, 0.0, 2.0, 2.0], [0.0, 3.0, 2.0, 2.0]):
        error(
            ValueError,
            f"boxes must have x1 <= x2 and y1 <= y2, got {wrong}",
            pad_boxes,
            [torch.cat([box, torch.tensor([wrong])])],
            1,
        )


def test_errors_of_batch_indices():
    error(
        ValueError,
        "boxes[:, 0] must be in 0..1, got 2",
        pad_boxes,
        torch.tensor([[2.0, 0.0, 0.0, 1.0, 1.0]]),
        2,
    )
    error(
        ValueError,
        "boxes must be finite, got a batch index that is not",
        pad_boxes,
        torch.tensor([[float("nan"), 0.0, 0.0, 1.0, 1.0]]),
        2,
    )


def test_errors_of_sizes():
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    size = (4, 4)
    error(
        ValueError,
        "corners must have shape (*, 4), got (2, 3)",
        box_cells,
        torch.zeros(2, 3),
        size,
        size,
    )
    error(TypeError, "corners must be a Tensor, got list", box_cells, [0, 0, 1, 1], size, size)
    error(ValueError, "image_size must be (height, width), got 4", definite_background, [box], 4)
    error(
        TypeError,
        "image_size[1] must be an int, got float",
        definite_background,
        [box],
        (4, 4.0),
    )
    error(ValueError, "image_size[0] must be >= 1, got 0", definite_background, [box], (0, 4))
    error(ValueError, "map_size[0] must be >= 1, got 0", definite_background, [box], size, (0, 4))


def test_errors_of_definite_background():
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    size = (4, 4)
    error(
        ValueError,
        "batch_size must be given with boxes of shape (K, 5), got None",
        definite_background,
        torch.zeros(1, 5),
        size,
    )
    error(
        ValueError,
        "valid must have shape (1, 4, 4), got (1, 4, 5)",
        definite_background,
        [box],
        size,
        valid=torch.ones(1, 4, 5, dtype=torch.bool),
    )
    error(
        TypeError,
        "valid must have dtype torch.bool, got torch.float32",
        definite_background,
        [box],
        size,
        valid=torch.ones(1, 4, 4),
    )
