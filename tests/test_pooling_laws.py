"""Laws of background-aware pooling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from assertions import close
from bapnal import BackgroundAwarePooling, background_attention, background_aware_pooling
from pooling_inputs import fixed, options, pool, rois
from strategies import random_boxes, scenes, seeded, seeds


@given(scene=scenes(), bins=st.integers(1, 2), sampling=st.sampled_from(["cells", "roi_align"]))
def test_without_attention_it_is_global_average_pooling(scene, bins, sampling):
    """A = 0 is GAP: the mean over the cells of the box."""
    if sampling == "roi_align":
        pytest.importorskip("torchvision")
    gap = pool(scene, attention=False, output_size=bins, sampling=sampling)
    forced = pool(scene, min_background=1.0, output_size=bins, sampling=sampling)
    close(forced.foreground, gap.foreground)
    close(forced.attention, gap.attention)
    close(forced.background, gap.background)
    assert torch.equal(forced.background_valid, gap.background_valid)
    if sampling == "roi_align" or bins > 1:
        return
    rows = []
    for b in range(scene.batch):
        _, boxes, valid = scene.image(b)
        for box in boxes:
            cells = torch.tensor(reference.box_cells(box, scene.image_size, scene.map_size))
            if valid is not None:
                cells &= torch.tensor(reference.valid_cells(valid, scene.map_size))
            some = scene.features[b][:, cells]
            rows.append(some.mean(1) if cells.any() else torch.zeros(some.shape[0]))
    if rows:
        close(gap.foreground[:, 0], torch.stack(rows))


@given(scene=scenes(padding=False))
def test_a_image_without_background_uses_global_average_pooling(scene):
    height, width = scene.image_size
    whole = torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64)
    boxes = [torch.cat([row, whole]) for row in scene.boxes]
    plain, gap = pool(scene, boxes=boxes), pool(scene, boxes=boxes, attention=False)
    assert not plain.background_valid.any()
    assert (plain.attention == 0).all()
    close(plain.foreground, gap.foreground)
    last = torch.tensor([len(row) for row in boxes]).cumsum(0) - 1
    close(plain.foreground[last, 0], scene.features.mean((2, 3)))


def test_min_background_is_a_share_not_to_be_passed():
    """Three of eight cells are background: 3/8 itself still means GAP."""
    scene = fixed(batch=1, size=(1, 8), image_size=(1, 8))
    boxes = [torch.tensor([[3.0, 0.0, 8.0, 1.0]])]
    gap = pool(scene, boxes=boxes, attention=False)
    bap = pool(scene, boxes=boxes)
    assert not torch.allclose(gap.foreground, bap.foreground)
    for share, expected in [(0.0, bap), (0.374, bap), (0.375, gap), (0.5, gap), (1.0, gap)]:
        found = pool(scene, boxes=boxes, min_background=share)
        close(found.foreground, expected.foreground)
        close(found.attention, expected.attention)
        # The queries of an image with too little background are still there for the loss.
        close(found.background, bap.background)
        assert torch.equal(found.background_valid, bap.background_valid)


def test_min_background_counts_the_image_not_the_padding():
    scene = fixed(batch=1, size=(1, 8), image_size=(1, 8))
    valid = torch.zeros(1, 1, 8, dtype=torch.bool)
    valid[..., :4] = True  # 3 of 4 cells
    boxes = [torch.tensor([[3.0, 0.0, 8.0, 1.0]])]
    scene = scene.replace(valid=valid)
    bap = pool(scene, boxes=boxes)
    gap = pool(scene, boxes=boxes, attention=False)
    # In the one cell the box still has, the weight does not matter; A does.
    assert bap.attention[0, 0, 0, 3] > 0 or gap.attention[0, 0, 0, 3] == 0
    close(pool(scene, boxes=boxes, min_background=0.7).attention, bap.attention)
    close(pool(scene, boxes=boxes, min_background=0.75).attention, gap.attention)
    counted = pool(scene, boxes=boxes, min_background=0.7, count_padding=True)
    close(counted.attention, gap.attention)


@given(scene=scenes(), bins=st.integers(1, 2))
def test_pooling_does_not_see_what_lies_outside_its_box(scene, bins):
    """With A = 0 (what lies outside shapes A), and with A too once other boxes hold the change."""
    for b in range(scene.batch):
        for k in range(len(scene.boxes[b])):
            one = [scene.boxes[i][k : k + 1] if i == b else scene.boxes[i][:0]
                   for i in range(scene.batch)]  # fmt: skip
            cells = torch.tensor(
                reference.box_cells(scene.boxes[b][k].tolist(), scene.image_size, scene.map_size)
            )
            parts = [
                torch.tensor(reference.box_cells(part, scene.image_size, scene.map_size))
                for part in reference.box_bins(scene.boxes[b][k].tolist(), bins)
            ]
            seen = cells | torch.stack(parts).any(0)
            noise = torch.where(seen, scene.features, scene.normal(*scene.features.shape))
            close(
                pool(scene, noise, one, attention=False, output_size=bins).foreground,
                pool(scene, boxes=one, attention=False, output_size=bins).foreground,
            )


@given(scene=scenes(padding=False))
def test_other_boxes_contents_do_not_matter(scene):
    """What lies only in other boxes is neither in this box nor in any query."""
    b = 0
    if len(scene.boxes[b]) < 2:
        return
    cells = [
        torch.tensor(reference.box_cells(box, scene.image_size, scene.map_size))
        for box in scene.boxes[b].tolist()
    ]
    others = torch.stack(cells[1:]).any(0) & ~cells[0]
    changed = scene.features.clone()
    changed[b] = torch.where(others, scene.normal(*changed[b].shape), changed[b])
    found, plain = pool(scene, changed), pool(scene)
    close(found.foreground[0], plain.foreground[0])
    close(found.background, plain.background)


@given(scene=scenes(), kwargs=options, seed=seeds)
def test_boxes_may_be_permuted(scene, kwargs, seed):
    plain = pool(scene, **kwargs)
    orders = [torch.randperm(len(row), generator=seeded(seed)) for row in scene.boxes]
    shuffled = pool(
        scene, boxes=[row[o] for row, o in zip(scene.boxes, orders, strict=True)], **kwargs
    )
    start, index = 0, []
    for order in orders:
        index.append(order + start)
        start += len(order)
    close(shuffled.foreground, plain.foreground[torch.cat(index)])
    close(shuffled.attention, plain.attention)


@given(scene=scenes(), kwargs=options)
def test_a_image_pools_alone_as_in_a_batch(scene, kwargs):
    together = pool(scene, **kwargs)
    start = 0
    for b in range(scene.batch):
        part = slice(b, b + 1)
        alone = background_aware_pooling(
            scene.features[part],
            scene.boxes[part],
            scene.image_size,
            valid=None if scene.valid is None else scene.valid[part],
            **kwargs,
        )
        stop = start + len(scene.boxes[b])
        close(alone.foreground, together.foreground[start:stop])
        close(alone.background[0], together.background[b])
        close(alone.attention[0], together.attention[b])
        start = stop


@given(scene=scenes(), kwargs=options, power=st.integers(-2, 2))
def test_pooling_is_homogeneous(scene, kwargs, power):
    """Scaling the features scales what is pooled: A stays."""
    plain, scaled = pool(scene, **kwargs), pool(scene, scene.features * 10.0**power, **kwargs)
    close(scaled.attention, plain.attention)
    close(scaled.foreground, 10.0**power * plain.foreground)


@given(scene=scenes(), kwargs=options)
def test_pooled_features_are_convex_combinations(scene, kwargs):
    found = pool(scene, **kwargs)
    owner = torch.tensor([b for b, row in enumerate(scene.boxes) for _ in row], dtype=torch.long)
    low = scene.features.amin((2, 3)).clamp(max=0)[owner][:, None] - 1e-9  # 0: without weight
    high = scene.features.amax((2, 3)).clamp(min=0)[owner][:, None] + 1e-9
    assert (found.foreground >= low).all()
    assert (found.foreground <= high).all()
    assert found.attention.min() >= 0
    assert found.attention.max() <= 1


@given(scene=scenes(), kwargs=options)
def test_both_forms_of_boxes_pool_the_same(scene, kwargs):
    for a, b in zip(pool(scene, **kwargs), pool(scene, boxes=rois(scene.boxes), **kwargs),
                    strict=True):  # fmt: skip
        close(a, b)


def test_rois_in_any_order_come_back_in_that_order():
    scene = fixed(count=3)
    form = rois(scene.boxes)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    close(pool(scene, boxes=form[order]).foreground, pool(scene).foreground[order])


@given(scene=scenes())
def test_padding_changes_nothing(scene):
    """An image in the corner of a larger, padded one: what the padding holds is not seen."""
    if scene.valid is None:
        return
    shown = torch.stack(
        [torch.tensor(reference.valid_cells(v.tolist(), scene.map_size)) for v in scene.valid]
    )
    noise = torch.where(shown[:, None], scene.features, 50 * scene.normal(*scene.features.shape))
    plain, found = pool(scene), pool(scene, noise)
    close(found.foreground, plain.foreground)
    close(found.background, plain.background)
    close(found.attention[:, 0][shown], plain.attention[:, 0][shown])


@given(
    seed=seeds,
    kwargs=options,
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
)
def test_a_padded_image_is_the_image_alone_where_the_grid_leaves_out_the_padding(
    seed, kwargs, sizes
):
    generator = seeded(seed)
    h, w = (max(side) + 2 for side in zip(*sizes, strict=True))
    features = torch.randn(len(sizes), 3, h, w, generator=generator, dtype=torch.float64)
    valid = torch.zeros(len(sizes), 4 * h, 4 * w, dtype=torch.bool)
    boxes = []
    for b, (rows, columns) in enumerate(sizes):
        valid[b, : 4 * rows, : 4 * columns] = True
        # Not up to the border, beyond which an empty box has its one cell in the padding.
        boxes.append(random_boxes(generator, 2, (4 * rows - 1, 4 * columns - 1), outside=0.0))
    kwargs = {**kwargs, "grid_padding": False}
    found = background_aware_pooling(features, boxes, (4 * h, 4 * w), valid=valid, **kwargs)
    module = BackgroundAwarePooling(**kwargs)
    for a, b in zip(module(features, boxes, (4 * h, 4 * w), valid), found, strict=True):
        assert torch.equal(a, b)
    for b, (rows, columns) in enumerate(sizes):
        own = features[b : b + 1, :, :rows, :columns]
        alone = background_aware_pooling(own, boxes[b : b + 1], (4 * rows, 4 * columns), **kwargs)
        close(found.foreground[2 * b : 2 * b + 2], alone.foreground)
        close(found.background[b], alone.background[0])
        assert torch.equal(found.background_valid[b], alone.background_valid[0])
        close(found.attention[b, :, :rows, :columns], alone.attention[0])


def test_one_worked_image():
    """Background (1, 0); the box holds (3, 4) with A = 0.6 and (0, 1) with A = 0."""
    features = torch.tensor([[[[1.0, 3.0, 0.0]], [[0.0, 4.0, 1.0]]]])
    out = background_aware_pooling(
        features, [torch.tensor([[1.0, 0.0, 3.0, 1.0]])], (1, 3), grid_size=1
    )
    close(out.attention, [[[[1.0, 0.6, 0.0]]]], tolerance=1e-6)
    # (0.4 (3, 4) + (0, 1)) / 1.4
    close(out.foreground, [[[1.2 / 1.4, 2.6 / 1.4]]], tolerance=1e-6)
    close(out.background, [[[1.0, 0.0]]])


def test_bins_come_row_by_row():
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
    found = background_aware_pooling(features, boxes, (4, 4), output_size=2)
    assert found.foreground[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    pytest.importorskip("torchvision")
    found = background_aware_pooling(
        features, boxes, (4, 4), output_size=2, sampling="roi_align", roi_size=4
    )
    assert (found.foreground[0, :, 0].diff() > 0).all()


def test_the_attention_is_the_one_of_the_attention_step():
    scene = fixed(batch=3)
    out = pool(scene, grid_size=3)
    m = torch.tensor(
        [
            [reference.definite_background(row.tolist(), scene.image_size, scene.map_size)]
            for row in scene.boxes
        ]
    )
    found = background_attention(scene.features, m, grid_size=3)
    close(out.attention, found.map)
    close(out.background, found.prototypes)
    assert torch.equal(out.background_valid, found.valid)
