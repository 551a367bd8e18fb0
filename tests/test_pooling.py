"""Background-aware pooling (Eq. 4) and the box classification loss: the oracle and the laws."""

import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from assertions import close, close_gradients, compiles, finite, finite_gradients
from bapnal import (
    BackgroundAwarePooling,
    PooledFeatures,
    background_attention,
    background_aware_pooling,
    box_classification_loss,
)
from strategies import Scene, random_boxes, scenes, seeded, seeds

options = st.fixed_dictionaries(
    {
        "grid_size": st.integers(1, 4),
        "output_size": st.integers(1, 3),
        "min_background": st.sampled_from([0.0, 0.0, 0.125, 0.3, 0.5, 1.0]),
        "attention": st.sampled_from([True, True, False]),
    }
)


def binned(scene, bins):
    """Boxes whose bin edges are quarters of a pixel, so that the oracle has no ties to itself."""
    unit = bins / 4
    return scene.replace(boxes=[(boxes / unit).round() * unit for boxes in scene.boxes])


def pool(scene, features=None, boxes=None, **kwargs):
    return background_aware_pooling(
        scene.features if features is None else features,
        scene.boxes if boxes is None else boxes,
        scene.image_size,
        valid=scene.valid,
        **kwargs,
    )


def oracle_of(scene, features, kwargs):
    """The oracle's results, image by image."""
    renamed = {("n" if name == "grid_size" else name): value for name, value in kwargs.items()}
    results = []
    for b in range(scene.batch):
        _, boxes, valid = scene.image(b)
        results.append(
            reference.background_aware_pooling(
                features[b].tolist(), boxes, scene.image_size, valid=valid, **renamed
            )
        )
    return results


def rois(boxes):
    return torch.cat(
        [torch.cat([torch.full((len(b), 1), float(i)).to(b), b], 1) for i, b in enumerate(boxes)]
    )


def fixed(seed=0, batch=2, size=(5, 6), channels=3, count=2, image_size=(20, 24)) -> Scene:
    """A scene of one's own choice."""
    generator = seeded(seed)
    return Scene(
        features=torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64),
        boxes=[random_boxes(generator, count, image_size) / 1.5 for _ in range(batch)],
        labels=[torch.randint(1, 4, (count,), generator=generator) for _ in range(batch)],
        image_size=image_size,
        valid=None,
        classes=3,
        generator=generator,
    )


# --------------------------------------------------------------------------- against the oracle


@settings(max_examples=60)
@given(scene=scenes(), kwargs=options)
def test_values_agree_with_the_oracle(scene, kwargs):
    scene = binned(scene, kwargs["output_size"])
    found = pool(scene, **kwargs)
    expected = oracle_of(scene, scene.features, kwargs)
    together = [vectors for pooled, *_ in expected for vectors in pooled]
    bins = kwargs["output_size"] ** 2
    assert found.foreground.shape == (len(together), bins, scene.features.shape[1])
    close(found.foreground, together)
    for b, (_, q, q_valid, a) in enumerate(expected):
        close(found.background[b], q)
        assert found.background_valid[b].tolist() == q_valid
        close(found.attention[b, 0], a)


@settings(max_examples=12)
@given(scene=scenes(max_batch=2), kwargs=options)
def test_gradients_agree_with_differences_of_the_oracle(scene, kwargs):
    scene = binned(scene, kwargs["output_size"])
    shape = pool(scene, **kwargs).foreground.shape
    mix = scene.normal(*shape)

    def oracle(x):
        rows = [vectors for pooled, *_ in oracle_of(scene, x, kwargs) for vectors in pooled]
        return (torch.tensor(rows, dtype=torch.float64).reshape(shape) * mix).sum().item()

    close_gradients(
        lambda x: (pool(scene, x, **kwargs).foreground * mix).sum(),
        oracle,
        [scene.features],
        scene.generator,
        entries=4,
    )


@settings(max_examples=40)
@given(scene=scenes(padding=False, outside=1.0), kwargs=options, roi_size=st.integers(1, 7))
def test_roi_align_agrees_with_the_oracle(scene, kwargs, roi_size):
    pytest.importorskip("torchvision")
    found = pool(scene, **kwargs, sampling="roi_align", roi_size=roi_size)
    renamed = {("n" if name == "grid_size" else name): value for name, value in kwargs.items()}
    together = []
    for b in range(scene.batch):
        features, boxes, _ = scene.image(b)
        together += reference.roi_pooling(
            features, boxes, scene.image_size, roi_size=roi_size, **renamed
        )
    close(found.foreground, together, tolerance=1e-8)


@settings(max_examples=8)
@given(scene=scenes(padding=False, max_batch=2, outside=1.0), bins=st.integers(1, 2))
def test_roi_align_gradients_agree_with_differences_of_the_oracle(scene, bins):
    pytest.importorskip("torchvision")
    shape = (sum(map(len, scene.boxes)), bins**2, scene.features.shape[1])
    mix = scene.normal(*shape)

    def oracle(x):
        rows = []
        for b in range(scene.batch):
            rows += reference.roi_pooling(
                x[b].tolist(), scene.boxes[b].tolist(), scene.image_size, 2, bins, roi_size=3
            )
        return (torch.tensor(rows, dtype=torch.float64).reshape(shape) * mix).sum().item()

    def function(x):
        out = pool(scene, x, grid_size=2, output_size=bins, sampling="roi_align", roi_size=3)
        return (out.foreground * mix).sum()

    close_gradients(function, oracle, [scene.features], scene.generator)


@given(scene=scenes(min_batch=0), bins=st.integers(1, 2), grid=st.integers(1, 3))
def test_loss_agrees_with_the_oracle(scene, bins, grid):
    weight = scene.normal(scene.classes + 1, scene.features.shape[1])
    out = pool(scene, grid_size=grid, output_size=bins)
    labels = [label for row in scene.labels for label in row.tolist()]
    expected = reference.box_classification_loss(
        out.foreground.tolist(),
        labels,
        out.background.tolist(),
        out.background_valid.tolist(),
        weight.tolist(),
    )
    loss = box_classification_loss(out, weight, scene.labels)
    assert loss.shape == ()
    close(loss, expected)
    joined = torch.cat(scene.labels) if scene.labels else torch.zeros(0, dtype=torch.long)
    close(box_classification_loss(out, weight, joined), expected)


@settings(max_examples=15)
@given(scene=scenes(max_batch=2), bins=st.integers(1, 2))
def test_loss_gradients_agree_with_differences_of_the_oracle(scene, bins):
    scene = binned(scene, bins)
    weight = scene.normal(scene.classes + 1, scene.features.shape[1])
    labels = [label for row in scene.labels for label in row.tolist()]
    kwargs = {"grid_size": 2, "output_size": bins}

    def oracle(x, w):
        results = oracle_of(scene, x, kwargs)
        return reference.box_classification_loss(
            [vectors for pooled, *_ in results for vectors in pooled],
            labels,
            [q for _, q, *_ in results],
            [valid for _, _, valid, _ in results],
            w.tolist(),
        )

    close_gradients(
        lambda x, w: box_classification_loss(pool(scene, x, **kwargs), w, scene.labels),
        oracle,
        [scene.features, weight],
        scene.generator,
    )


def test_gradcheck():
    scene = fixed(size=(4, 4), image_size=(8, 8))
    x = scene.features.requires_grad_()
    for kwargs in ({}, {"output_size": 2}, {"sampling": "roi_align", "roi_size": 2}):
        if "sampling" in kwargs:
            pytest.importorskip("torchvision")
        assert torch.autograd.gradcheck(
            lambda f, k=kwargs: (lambda out: (out[0], out[1], out[3]))(
                pool(scene, f, grid_size=2, **k)
            ),
            [x],
        )


# ---------------------------------------------------------------------------------------- laws


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


# ------------------------------------------------------------------------------------- corners


def corner_features():
    generic = torch.randn(2, 3, 4, 4, generator=seeded(5), dtype=torch.float64)
    return [
        torch.zeros_like(generic),
        torch.ones_like(generic),  # all alike: A = 1 everywhere, no weight in any box
        -generic.abs(),
        generic * (torch.arange(16).reshape(4, 4) % 2),
        1e-30 * generic,
        1e15 * generic,
    ]


CORNER_BOXES = [
    [torch.zeros(0, 4), torch.zeros(0, 4)],
    [torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.zeros(0, 4)],
    [
        torch.tensor([[3.0, 3.0, 3.0, 3.0], [90.0, 90.0, 99.0, 99.0]]),
        torch.tensor([[0.0, 0, 8, 8]]),
    ],
]


@pytest.mark.parametrize("sampling", ["cells", "roi_align"])
def test_corners_are_finite(sampling):
    if sampling == "roi_align":
        pytest.importorskip("torchvision")
    nothing = torch.zeros(2, 16, 16, dtype=torch.bool)
    weight = torch.randn(4, 3, generator=seeded(0))
    for features in corner_features():
        for boxes in CORNER_BOXES:
            for valid, bins in ((None, 1), (None, 2), (nothing, 1)):
                if valid is not None and sampling == "roi_align":
                    continue

                def loss(x, w, boxes=boxes, valid=valid, bins=bins):
                    out = background_aware_pooling(
                        x, boxes, (16, 16), output_size=bins, sampling=sampling, valid=valid
                    )
                    finite(*out)
                    labels = [torch.ones(len(row), dtype=torch.long) for row in boxes]
                    return box_classification_loss(out, w, labels)

                finite_gradients(loss, features.float(), weight)


def test_a_box_without_weight_pools_to_zero():
    """All features alike: A = 1 in the box as well."""
    features = torch.zeros(1, 3, 4, 4)
    features[:, 0] = 2.0
    out = background_aware_pooling(features, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], (16, 16))
    assert (out.attention == 1).all()
    assert (out.foreground == 0).all()


def test_no_images_and_no_boxes():
    weight = torch.ones(3, 5, requires_grad=True)
    x = torch.zeros(0, 5, 4, 4, requires_grad=True)
    for boxes, labels in [([], []), (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]:
        out = background_aware_pooling(x, boxes, (8, 8), output_size=2)
        assert out.foreground.shape == (0, 4, 5)
        assert out.background.shape == (0, 16, 5)
        assert out.background_valid.shape == (0, 16)
        assert out.attention.shape == (0, 1, 4, 4)
        loss = box_classification_loss(out, weight, labels)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, weight)
        assert (gradient == 0).all()
    x = torch.rand(2, 5, 4, 4)
    for boxes in ([torch.zeros(0, 4)] * 2, torch.zeros(0, 5)):
        out = background_aware_pooling(x, boxes, (8, 8))
        assert out.foreground.shape == (0, 1, 5)
        assert out.background_valid.all()
        assert (out.attention == 1).all()


def test_a_loss_without_terms_is_zero():
    out = PooledFeatures(
        torch.zeros(0, 1, 3),
        torch.zeros(2, 4, 3),
        torch.zeros(2, 4, dtype=torch.bool),
        torch.zeros(2, 1, 2, 2),
    )
    labels = [torch.zeros(0, dtype=torch.long)] * 2
    weight = torch.rand(4, 3, requires_grad=True)
    loss = box_classification_loss(out, weight, labels)
    assert loss.item() == 0
    loss.backward()
    assert (weight.grad == 0).all()


def test_invalid_queries_do_not_reach_the_loss():
    scene = fixed()
    out = pool(scene)
    weight = scene.normal(4, 3)
    out = out._replace(background_valid=torch.rand(2, 16, generator=scene.generator) < 0.5)
    noise = torch.where(out.background_valid[..., None], out.background, 1e3)
    close(
        box_classification_loss(out._replace(background=noise), weight, scene.labels),
        box_classification_loss(out, weight, scene.labels),
    )


def test_all_terms_count_the_same():
    """Two boxes of two bins each way and three queries make eleven terms."""
    generator = seeded(1)
    r = torch.randn(2, 4, 3, generator=generator)
    q = torch.randn(1, 4, 3, generator=generator)
    valid = torch.tensor([[True, False, True, True]])
    weight = torch.randn(5, 3, generator=generator)
    out = PooledFeatures(r, q, valid, torch.zeros(1, 1, 2, 2))
    vectors = torch.cat([r.flatten(0, 1), q[valid]])
    targets = torch.tensor([4] * 4 + [1] * 4 + [0] * 3)
    expected = torch.nn.functional.cross_entropy(vectors @ weight.T, targets)
    close(box_classification_loss(out, weight, [torch.tensor([4, 1])]), expected, tolerance=1e-6)


# -------------------------------------------------------------------------- dtypes and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bins", [1, 2])
def test_half_precision_is_computed_in_float32(dtype, bins):
    scene = fixed()
    half = scene.features.to(dtype)
    found = pool(scene, half, output_size=bins)
    exact = pool(scene, half.double(), output_size=bins)
    resolution = torch.finfo(dtype).eps
    for part in (0, 1, 3):
        assert found[part].dtype == dtype
        torch.testing.assert_close(found[part].double(), exact[part], rtol=resolution, atol=1e-4)
    weight = scene.normal(4, 3).to(dtype)
    loss = box_classification_loss(found, weight, scene.labels)
    assert loss.dtype == torch.float32
    exact_loss = box_classification_loss(
        PooledFeatures(*(x.double() if x.is_floating_point() else x for x in found)),
        weight.double(),
        scene.labels,
    )
    close(loss, exact_loss, tolerance=1e-5)
    gradients = finite_gradients(
        lambda x, w: box_classification_loss(pool(scene, x), w, scene.labels), half, weight
    )
    assert [g.dtype for g in gradients] == [dtype, dtype]


def test_many_cells_do_not_overflow_half_precision():
    features = torch.full((1, 4, 64, 64), 200.0, dtype=torch.float16)
    features[:, 0] = -200
    boxes = [torch.tensor([[0.0, 0.0, 512.0, 256.0]])]
    out = background_aware_pooling(features, boxes, (512, 512), attention=False)
    assert out.foreground[0, 0].tolist() == [-200, 200, 200, 200]
    assert out.background[0, 8].tolist() == [-200, 200, 200, 200]


def test_float32_boxes_serve_float64_features():
    scene = fixed()
    boxes = [row.float() for row in scene.boxes]
    out = pool(scene, boxes=boxes)
    assert out.foreground.dtype == torch.float64
    close(out.foreground, pool(scene, boxes=[row.double() for row in boxes]).foreground)


def test_integer_boxes_are_boxes():
    scene = fixed()
    boxes = [row.round().long() for row in scene.boxes]
    close(
        pool(scene, boxes=boxes).foreground,
        pool(scene, boxes=[row.double() for row in boxes]).foreground,
    )


@pytest.mark.parametrize("sampling", ["cells", "roi_align"])
def test_autocast_changes_nothing(sampling):
    if sampling == "roi_align":
        pytest.importorskip("torchvision")
    scene = fixed()
    x, weight = scene.features.float(), scene.normal(4, 3).float()
    plain = pool(scene, x, output_size=2, sampling=sampling)
    loss = box_classification_loss(plain, weight, scene.labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = pool(scene, x, output_size=2, sampling=sampling)
        cast_loss = box_classification_loss(cast, weight, scene.labels)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loss, cast_loss)


def test_layouts():
    scene = fixed(channels=4)
    plain = pool(scene)
    spread = torch.zeros(2, 8, 6, 5, dtype=torch.float64)[:, ::2].mT
    spread.copy_(scene.features)
    for other in (scene.features.to(memory_format=torch.channels_last), spread):
        assert not other.is_contiguous()
        for a, b in zip(pool(scene, other), plain, strict=True):
            close(a, b)
    boxes = [row.T.contiguous().T for row in scene.boxes]
    close(pool(scene, boxes=boxes).foreground, plain.foreground)


def test_inputs_are_not_written_to():
    scene = fixed()
    before = scene.features.clone(), [row.clone() for row in scene.boxes]
    pool(scene, output_size=2)
    assert torch.equal(scene.features, before[0])
    assert all(torch.equal(a, b) for a, b in zip(scene.boxes, before[1], strict=True))


# ----------------------------------------------------------------------- transforms of functions


def test_vmap_and_func_grad():
    """Over several feature maps of the same image and boxes."""
    scene = fixed(batch=1)
    maps = scene.normal(4, *scene.features.shape)

    def one(x):
        return pool(scene, x, output_size=2).foreground

    close(torch.func.vmap(one)(maps), torch.stack([one(x) for x in maps]))

    def total(x):
        return one(x).square().sum()

    expected = []
    for x in maps:
        leaf = x.clone().requires_grad_()
        expected.append(torch.autograd.grad(total(leaf), leaf)[0])
    close(torch.func.vmap(torch.func.grad(total))(maps), torch.stack(expected))


@pytest.mark.parametrize(
    ("backend", "form"), [("eager", "list"), ("eager", "rois"), ("inductor", "list")]
)
@pytest.mark.parametrize("bins", [1, 2])
@compiles
def test_compiles_without_a_graph_break(backend, form, bins):
    if backend == "inductor" and bins == 1:
        pytest.skip("one with bins is enough")
    torch._dynamo.reset()
    scene = fixed()
    boxes = scene.boxes if form == "list" else rois(scene.boxes)
    labels = scene.labels if form == "list" else torch.cat(scene.labels)
    weight = scene.normal(4, 3)
    module = BackgroundAwarePooling(grid_size=2, output_size=bins, min_background=0.125)

    def step(x, w, boxes, labels):
        out = module(x, boxes, scene.image_size)
        return out, box_classification_loss(out, w, labels)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    leaf, twin = (scene.features.clone().requires_grad_() for _ in range(2))
    found, loss = compiled(leaf, weight, boxes, labels)
    expected, expected_loss = step(twin, weight, boxes, labels)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    close(leaf.grad, twin.grad)


# ---------------------------------------------------------------------------- modules and errors


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"grid_size": 2},
        {"output_size": 2},
        {"min_background": 0.9},
        {"attention": False},
        {"min_background": 0.4, "count_padding": True},
        {"grid_size": 3, "grid_padding": False},
        {"sampling": "roi_align", "roi_size": 5},
        {"sampling": "roi_align", "attention": False, "output_size": 2},
    ],
)
def test_the_module_is_the_function(kwargs):
    if "sampling" in kwargs:
        pytest.importorskip("torchvision")
    scene = fixed()
    module = BackgroundAwarePooling(**kwargs)
    copy = pickle.loads(pickle.dumps(module))
    expected = background_aware_pooling(scene.features, scene.boxes, scene.image_size, **kwargs)
    valid = torch.ones(2, *scene.image_size, dtype=torch.bool)
    for found in (
        module(scene.features, scene.boxes, scene.image_size),
        copy(scene.features, scene.boxes, scene.image_size, valid=valid),
    ):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert not module.state_dict()
    for name, value in kwargs.items():
        if name != "roi_size":
            assert f"{name}={value!r}" in repr(module)


def test_the_module_passes_valid_on():
    scene = fixed()
    valid = torch.ones(2, *scene.image_size, dtype=torch.bool)
    valid[:, 10:] = False
    found = BackgroundAwarePooling()(scene.features, scene.boxes, scene.image_size, valid=valid)
    expected = pool(scene.replace(valid=valid))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("bins", [1, 2])
def test_cuda(bins):
    scene = fixed(batch=3)
    weight = scene.normal(4, 3)
    expected = pool(scene, output_size=bins)
    expected_loss = box_classification_loss(expected, weight, scene.labels)
    boxes = [row.cuda() for row in scene.boxes]
    for form in (boxes, rois(boxes)):
        found = pool(scene, scene.features.cuda(), form, output_size=bins)
        for a, b in zip(found, expected, strict=True):
            assert a.is_cuda
            close(a.cpu(), b)
        labels = [row.cuda() for row in scene.labels]
        close(box_classification_loss(found, weight.cuda(), labels).cpu(), expected_loss)


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


def test_errors_of_pooling():
    x, box, size = torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), (8, 8)
    boxes = [box, box]
    run = background_aware_pooling
    raises(
        ValueError, "features must have shape (B, D, h, w), got (3, 4, 4)", run, x[0], boxes, size
    )
    raises(
        TypeError,
        "features must have a floating-point dtype, got torch.int64",
        run,
        x.long(),
        boxes,
        size,
    )
    raises(
        ValueError, "boxes must have one entry per image (2), got 1 entries", run, x, [box], size
    )
    raises(
        ValueError,
        "boxes must have x1 <= x2 and y1 <= y2, got [4.0, 0.0, 2.0, 2.0]",
        run,
        x,
        [box, torch.tensor([[4.0, 0.0, 2.0, 2.0]])],
        size,
    )
    raises(
        ValueError,
        "boxes must be finite, got [nan, 0.0, 2.0, 2.0]",
        run,
        x,
        [box, torch.tensor([[float("nan"), 0.0, 2.0, 2.0]])],
        size,
    )
    raises(ValueError, "image_size must be (height, width), got 8", run, x, boxes, 8)
    raises(ValueError, "image_size[1] must be >= 1, got 0", run, x, boxes, (8, 0))
    raises(
        ValueError,
        "valid must have shape (2, 8, 8), got (2, 4, 4)",
        run,
        x,
        boxes,
        size,
        valid=torch.ones(2, 4, 4, dtype=torch.bool),
    )
    raises(
        TypeError,
        "valid must have dtype torch.bool, got torch.uint8",
        run,
        x,
        boxes,
        size,
        valid=torch.ones(2, 8, 8, dtype=torch.uint8),
    )
    raises(
        ValueError,
        "features, boxes must be on one device, got features on meta, boxes on cpu",
        run,
        x.to("meta"),
        boxes,
        size,
    )
    with pytest.raises(ValueError, match=r"valid.* on .*meta"):
        run(x, boxes, size, valid=torch.ones(2, 8, 8, dtype=torch.bool, device="meta"))
    for wrong, kind, text in [
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
        ({"grid_size": 1.5}, TypeError, "grid_size must be an int, got float"),
        ({"output_size": 0}, ValueError, "output_size must be >= 1, got 0"),
        (
            {"min_background": -0.1},
            ValueError,
            "min_background must be >= 0 and <= 1, got -0.1",
        ),
        ({"min_background": 1.1}, ValueError, "min_background must be >= 0 and <= 1, got 1.1"),
        ({"min_background": "0"}, TypeError, "min_background must be a number, got str"),
        (
            {"sampling": "roialign"},
            ValueError,
            "sampling must be one of 'cells', 'roi_align', got 'roialign'",
        ),
        ({"roi_size": 0}, ValueError, "roi_size must be >= 1, got 0"),
    ]:
        raises(kind, text, run, x, boxes, size, **wrong)
        raises(kind, text, BackgroundAwarePooling, **wrong)


def test_the_error_without_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    scene = fixed()
    with pytest.raises(ImportError, match=r"needs torchvision: .*bapnal\[align\]"):
        pool(scene, sampling="roi_align")


def test_errors_of_the_loss():
    scene = fixed()
    out, w, labels = pool(scene), torch.zeros(4, 3), scene.labels
    run = box_classification_loss
    raises(
        ValueError, "classifier_weight must have shape (L + 1, 3), got (4, 2)", run, out,
        w[:, :2], labels,
    )  # fmt: skip
    raises(
        TypeError,
        "classifier_weight must have a floating-point dtype, got torch.int64",
        run,
        out,
        w.long(),
        labels,
    )
    raises(
        ValueError, "labels must have one entry per image (2), got 1 entries", run, out, w,
        labels[:1],
    )  # fmt: skip
    raises(ValueError, "labels[1] must have shape (K,), got (1, 2)", run, out, w,
           [labels[0], labels[1][None]])  # fmt: skip
    raises(TypeError, "labels[0] must have an integer dtype, got torch.float32", run, out, w,
           [labels[0].float(), labels[1]])  # fmt: skip
    raises(TypeError, "labels must be a list of Tensors or a Tensor, got str", run, out, w, "12")
    raises(ValueError, "labels must have shape (4,), got (3,)", run, out, w, torch.ones(3).long())
    raises(ValueError, "labels must be in 1..3, got 4", run, out, w, torch.tensor([1, 2, 3, 4]))
    raises(ValueError, "labels must be in 1..3, got 0", run, out, w, torch.tensor([1, 2, 3, 0]))
    with pytest.raises(ValueError, match="labels must be on cpu like the features, got meta"):
        run(out, w, torch.ones(4, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match=r"classifier_weight.* on .*meta"):
        run(out, w.to("meta"), labels)
