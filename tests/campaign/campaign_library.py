"""Random draws against the whole library: finite, bounded, the same alone and in a batch.

    BAPNAL_DRAWS=10000 python -m pytest tests/campaign/campaign_library.py \
        --hypothesis-profile=campaign

Not part of the tests: it takes as long as it is given, and draws anew each time. ``BAPNAL_DRAWS``
is the number of draws of each test; the end says how many there were.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bapnal
from assertions import close, finite, finite_gradients
from bapnal import PRESETS, DenseCRF, PairwiseTerm, PermutohedralLattice
from bapnal.losses import noise_aware_loss
from strategies import seeded

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
seeds = st.integers(0, 2**40)
sides = st.integers(1, 7)


def any_size(draw, dtype, shape, *, dim=1, largest=1.0):
    """Vectors along ``dim`` whose lengths spread over the range of a dtype, some exactly zero.

    ``largest`` is the share of the exponents above 0 that is used.
    """
    generator = seeded(draw(seeds))
    info = torch.finfo(dtype)
    low, high = math.log10(info.tiny) - 3, largest * (math.log10(info.max) - 1)
    kind = draw(st.sampled_from(["same", "each", "plain", "sparse"]))
    rest = [1 if i == dim else n for i, n in enumerate(shape)]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "same":
        x *= 10.0 ** draw(st.floats(low, high))
    elif kind != "plain":
        power = torch.rand(rest, generator=generator, dtype=torch.float64) * (high - low) + low
        x *= 10.0**power
    if kind == "sparse":
        x *= torch.rand(rest, generator=generator) < 0.6
        x *= torch.rand(shape, generator=generator) < 0.6
    return x.clamp(-info.max / 8, info.max / 8).to(dtype)


def boxes_of(draw, batch, size, *, most=4):
    """Boxes of a batch in any dtype: inside, outside, empty, huge."""
    height, width = size
    generator = seeded(draw(seeds))
    dtype = draw(st.sampled_from([*DTYPES, torch.int32, torch.int64]))
    scale = draw(st.sampled_from([1.0, 1.0, 3.0, 1e4]))
    found = []
    for _ in range(batch):
        count = draw(st.integers(0, most))
        draws = torch.rand(2, count, 2, generator=generator, dtype=torch.float64)
        points = (draws * 1.4 - 0.2) * torch.tensor([width, height], dtype=torch.float64) * scale
        points = (points * draw(st.sampled_from([1, 4]))).round() / 4
        end = torch.finfo(dtype).max if dtype.is_floating_point else 2**30
        corners = torch.cat([points.amin(0), points.amax(0)], dim=1).clamp(-end, end).to(dtype)
        found.append(corners)
    return found


def mask_of(draw, batch, size):
    if not draw(st.booleans()):
        return None
    share = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return torch.rand(batch, *size, generator=seeded(draw(seeds))) < share


def rois_of(boxes):
    rows = [torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)]
    return torch.cat(rows)


def last_digits(dtype):
    """What MKL may change: the order of its sums depends on where a tensor lies in memory."""
    return 64 * torch.finfo(dtype).eps


@given(data=st.data())
def test_attention(data, drawn):
    drawn()
    draw = data.draw
    dtype, batch = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    shape = (batch, draw(st.integers(1, 5)), draw(sides), draw(sides))
    x = any_size(draw, dtype, shape)
    m = torch.rand(batch, 1, *shape[2:], generator=seeded(draw(seeds))) < draw(st.floats(0, 1))
    options = {
        "grid_size": draw(st.integers(1, 5)),
        "reduction": draw(st.sampled_from(["mean", "max"])),
    }
    found = bapnal.background_attention(x, m, **options)
    finite(found.map, found.prototypes)
    assert found.map.min() >= 0
    assert found.map.max() <= 1
    assert (found.map[m] == 1).all()
    assert ((found.prototypes == 0).all(-1) | found.valid).all()
    finite_gradients(lambda f: bapnal.background_attention(f, m, **options).map, x)
    b = draw(st.integers(0, batch - 1))
    alone = bapnal.background_attention(x[b : b + 1], m[b : b + 1], **options)
    close(alone.map[0], found.map[b], tolerance=last_digits(dtype))


@given(data=st.data())
def test_cosines(data, drawn):
    drawn()
    draw = data.draw
    dtype, d = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 6))
    rest = draw(st.sampled_from([(), (3,), (2, 3), (1, 2, 2)]))
    x = any_size(draw, dtype, (draw(st.integers(0, 3)), d, *rest))
    w = any_size(draw, draw(st.sampled_from(DTYPES)), (draw(st.integers(1, 4)), d))
    cosine = bapnal.cosine_similarity(x, w)
    finite(cosine)
    assert (cosine.abs() <= 1.01).all()
    if x.numel() > 0:
        finite_gradients(bapnal.cosine_similarity, x, w)


@given(data=st.data())
def test_pooling(data, drawn):
    drawn()
    draw = data.draw
    dtype, batch = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    size = draw(sides) * 3, draw(sides) * 3
    x = any_size(draw, dtype, (batch, draw(st.integers(1, 4)), draw(sides), draw(sides)))
    boxes = boxes_of(draw, batch, size)
    valid = mask_of(draw, batch, size)
    options = {
        "grid_size": draw(st.integers(1, 4)),
        "output_size": draw(st.integers(1, 3)),
        "min_background": draw(st.sampled_from([0.0, 0.125, 1.0])),
        "attention": draw(st.booleans()),
        "sampling": draw(st.sampled_from(["cells", "cells", "cells", "roi_align"])),
        "valid": valid,
    }
    if options["sampling"] == "roi_align":
        pytest.importorskip("torchvision")
        boxes = [b.clamp(-1000, 1000) for b in boxes]
        x = x.clamp(-1000, 1000)
    out = bapnal.background_aware_pooling(x, boxes, size, **options)
    finite(out.foreground, out.background, out.attention)
    wide = [b.float() if b.dtype in DTYPES[:2] else b for b in boxes]
    by_rois = bapnal.background_aware_pooling(x, rois_of(wide), size, **options)
    if options["sampling"] == "cells":
        for a, b in zip(out, by_rois, strict=True):
            assert torch.equal(a, b)
    b = draw(st.integers(0, batch - 1))
    mask = None if valid is None else valid[b : b + 1]
    alone = bapnal.background_aware_pooling(
        x[b : b + 1], boxes[b : b + 1], size, **{**options, "valid": mask}
    )
    start = sum(len(y) for y in boxes[:b])
    mine = out.foreground[start : start + len(boxes[b])]
    close(alone.attention[0], out.attention[b], tolerance=last_digits(dtype))
    close(alone.foreground / scale_of(mine), mine / scale_of(mine), tolerance=1e-2)


def scale_of(x):
    return x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny) if x.numel() else 1.0


@given(data=st.data())
def test_box_losses(data, drawn):
    """Over lengths whose scores have a gradient at all."""
    drawn()
    draw = data.draw
    batch, d, classes = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = any_size(draw, dtype, (batch, d, draw(sides), draw(sides)), largest=0.2)
    size = draw(sides) * 3, draw(sides) * 3
    boxes = boxes_of(draw, batch, size)
    labels = [torch.randint(1, classes, (len(b),), generator=seeded(draw(seeds))) for b in boxes]
    weight = any_size(draw, dtype, (classes, d), largest=0.2)

    def loss(x, weight):
        out = bapnal.background_aware_pooling(x, boxes, size, grid_size=2)
        return bapnal.box_classification_loss(out, weight, labels)

    finite_gradients(loss, x, weight)
    out = bapnal.background_aware_pooling(x, boxes, size, grid_size=2)
    joined = bapnal.box_classification_loss(out, weight, torch.cat(labels))
    assert torch.equal(joined, loss(x, weight))


@given(data=st.data())
def test_boxes(data, drawn):
    drawn()
    draw = data.draw
    size = draw(st.integers(1, 600)), draw(st.integers(1, 600))
    cells = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    (corners,) = boxes_of(draw, 1, size)
    found = bapnal.box_cells(corners, size, cells)
    wide = torch.promote_types(corners.dtype, torch.float32)
    assert torch.equal(found, bapnal.box_cells(corners.to(wide), size, cells))
    assert found.flatten(1).any(1).all()
    share = bapnal.box_coverage(corners, size, cells)
    finite(share)
    assert ((share >= 0) & (share <= 1)).all()
    m = bapnal.definite_background([corners], size, cells)[0, 0]
    assert torch.equal(m == 0, found.any(0))
    bins = bapnal.box_bins(corners, draw(st.integers(1, 5)))
    finite(bins)
    assert (bins[..., :2] <= bins[..., 2:]).all()
    if cells[0] * cells[1] > 400:
        return
    labels = torch.randint(1, 9, (len(corners),), generator=seeded(draw(seeds)))
    painted = bapnal.paint_boxes(corners, labels, cells)
    expected = torch.zeros(cells, dtype=torch.long)
    c = corners.to(wide)
    area = ((c[:, 2] - c[:, 0]) * (c[:, 3] - c[:, 1])).tolist()
    for i in sorted(range(len(area)), key=lambda i: -area[i]):
        expected[bapnal.box_cells(corners[i], cells, cells)] = labels[i]
    assert torch.equal(painted, expected)


@given(data=st.data())
def test_pixel_losses(data, drawn):
    drawn()
    draw = data.draw
    batch, classes = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (batch, classes, draw(sides), draw(sides))
    # In half precision the gradient of large scores, times balance and gamma over the smallest
    # 1 + s, is beyond the range.
    half = dtype in DTYPES[:2]
    logits = any_size(draw, dtype, shape, largest=0.2 if half else 0.8)
    s = (torch.rand(shape, generator=seeded(draw(seeds)), dtype=torch.float64) * 2 - 1).to(dtype)
    s = s.round() if draw(st.booleans()) else s
    size = draw(st.sampled_from([shape[2:], (draw(sides), draw(sides))]))
    kind = draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))
    y = torch.randint(0, classes, (2, batch, *size), generator=seeded(draw(seeds))).to(kind)
    y[torch.rand(y.shape, generator=seeded(draw(seeds))) < draw(st.floats(0, 1))] = 255
    options = {"balance": draw(st.sampled_from([0.0, 0.1, 0.1 if half else 1e3]))}
    options["align_corners"] = draw(st.booleans())
    gamma = draw(st.sampled_from([1.0, 7.0] if half else [1.0, 7.0, 1e4, 1e6]))
    loss = noise_aware_loss(logits, s, *y, gamma=gamma, **options)
    finite(loss)
    functions = [
        lambda a, b: noise_aware_loss(a, b, *y, gamma=gamma, **options),
        lambda a, _: bapnal.entropy_regularization_loss(a, None, *y, **options),
        lambda a, _: bapnal.bootstrapping_loss(a, None, *y, 0.3, **options),
    ]
    finite_gradients(functions[draw(st.integers(0, 2))], logits, s)
    if size == shape[2:]:
        sigma = bapnal.confidence_map(s, y[0], gamma=gamma)
        assert ((sigma >= 0) & (sigma <= 1.001)).all()


@given(data=st.data())
def test_lattice(data, drawn):
    """Points anywhere: filtered, or refused in one line."""
    drawn()
    draw = data.draw
    n, d = draw(st.integers(0, 40)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    f = torch.randn(n, d, generator=seeded(draw(seeds)), dtype=dtype)
    f *= 10.0 ** draw(st.floats(-45, 12))
    groups = None
    if draw(st.booleans()):
        span = draw(st.sampled_from([1, 3, 2**30, 2**40, 2**63]))
        groups = torch.randint(0, span - 1 or 1, (n,), generator=seeded(draw(seeds)))
    try:
        lattice = PermutohedralLattice(f, groups)
    except ValueError as error:
        assert "must be finite and lie within" in str(error)  # noqa: PT017
        assert f.abs().max() > 2**18
        return
    v = torch.rand(n, 2, generator=seeded(draw(seeds)), dtype=dtype)
    out = lattice.filter(v)
    finite(out)
    assert (out >= 0).all()
    total = lattice.filter(torch.ones_like(v))
    if n > 0:
        assert (total > 0).all()
        assert (out / total <= 1.001).all()


@given(data=st.data())
def test_crf(data, drawn):
    drawn()
    draw = data.draw
    batch, classes = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = draw(sides), draw(sides)
    generator = seeded(draw(seeds))
    image = (torch.rand(batch, 3, *size, generator=generator) * 255).byte()
    scores = torch.randn(batch, classes, *size, generator=generator, dtype=torch.float64)
    scores *= draw(st.sampled_from([0.0, 1.0, 100.0]))
    p = scores.softmax(1).to(draw(st.sampled_from(DTYPES)))
    valid = mask_of(draw, batch, size)
    width = st.floats(-9, 9).map(lambda x: 10.0**x)
    weight = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1e30, -1e30]))
    settings = {
        "bilateral_weight": draw(weight),
        "gaussian_weight": draw(weight),
        "bilateral_xy": draw(width),
        "bilateral_rgb": draw(width),
        "gaussian_xy": draw(width),
        "iterations": draw(st.integers(0, 3)),
        "half_resolution": draw(st.booleans()),
    }
    try:
        q = DenseCRF(**settings)(image, p, valid)
    except ValueError as error:
        assert " must be >= " in str(error)  # noqa: PT017
        return
    finite(q)
    close(q.sum(1), torch.ones(batch, *size), tolerance=1e-4)
    b = draw(st.integers(0, batch - 1))
    mask = None if valid is None else valid[b : b + 1]
    alone = bapnal.dense_crf(image[b : b + 1], p[b : b + 1], mask, **settings)
    assert torch.equal(alone[0], q[b])
    if draw(st.booleans()) and abs(settings["bilateral_weight"]) < 100:
        finite_gradients(lambda s: bapnal.dense_crf(image, s.softmax(1), valid, **settings), scores)


@given(data=st.data())
def test_crf_of_any_guidance(data, drawn):
    drawn()
    draw = data.draw
    channels, classes = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    generator = seeded(draw(seeds))
    dtype = draw(st.sampled_from(DTYPES))
    guidance = any_size(draw, dtype, (1, channels, draw(sides), draw(sides)))
    p = torch.randn(1, classes, *guidance.shape[2:], generator=generator).softmax(1)
    width = st.floats(-30, 30).map(lambda x: 10.0**x)
    terms = []
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.sampled_from([None, (), (classes,), (classes, classes)]))
        weight = 1.5 if shape is None else torch.randn(shape, generator=generator)
        wide = draw(st.sampled_from([None, "one", "each"]))
        if wide is not None:
            wide = draw(width) if wide == "one" else [draw(width) for _ in range(channels)]
        terms.append(PairwiseTerm(weight, draw(st.none() | width), wide))
    try:
        q = bapnal.dense_crf(guidance, p, terms=terms, iterations=2)
    except ValueError as error:
        assert "terms[" in str(error)  # noqa: PT017
        return
    finite(q)
    close(q.sum(1), torch.ones_like(q[:, 0]), tolerance=1e-4)


@given(data=st.data())
def test_pseudo_labels(data, drawn):
    drawn()
    draw = data.draw
    dtype, batch, d = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3)), 3
    size = draw(sides) * 2, draw(sides) * 2
    x = any_size(draw, dtype, (batch, d, draw(sides), draw(sides)), largest=0.45)
    boxes = boxes_of(draw, batch, size)
    labels = [torch.randint(1, 4, (len(b),), generator=seeded(draw(seeds))) for b in boxes]
    columns = d + draw(st.integers(0, 1))
    weight = any_size(draw, dtype, (4, columns), largest=0.45) if draw(st.booleans()) else None
    presets = [{}, PRESETS["paper"], PRESETS["released"]]
    options = {
        **draw(st.sampled_from(presets)),
        "grid_size": draw(st.integers(1, 4)),
        "background": draw(st.sampled_from(["attention", "both"])),
        "unary_softmax": draw(st.sampled_from([0.1, 3.0, 1e4])),
        "align_corners": draw(st.booleans()),
    }
    crf = DenseCRF(iterations=1) if draw(st.booleans()) else None
    valid = mask_of(draw, batch, size)
    images = (torch.rand(batch, 3, *size, generator=seeded(draw(seeds))) * 255).byte()
    y = bapnal.pseudo_labels(images, x, weight, boxes, labels, crf=crf, valid=valid, **options)
    finite(y.background_unary, y.foreground_unary)
    assert ((y.background_unary >= 0) & (y.background_unary <= 1)).all()
    b = draw(st.integers(0, batch - 1))
    for maps in (y.crf, y.retrieval):
        assert set(maps[b].unique().tolist()) <= {0, 255, *labels[b].tolist()}
    part = slice(b, b + 1)
    mask = None if valid is None else valid[part]
    alone = bapnal.pseudo_labels(
        images[part], x[part], weight, boxes[part], labels[part], crf=crf, valid=mask, **options
    )
    assert torch.equal(alone.crf[0], y.crf[b])
    differ = alone.retrieval[0] != y.retrieval[b]
    if differ.any():
        assert not (differ & ~tied(x[b], weight, y.crf[b], options["align_corners"])).any()


def tied(x, weight, crf, align_corners):
    """Where the two classes of the largest cosines differ by rounding alone; ``(H, W)``.

    Products of matrices round in another order where a batch holds more classes than the image.
    """
    x = x.double() / x.double().abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    f = torch.nn.functional.interpolate(
        x[None], crf.shape, mode="bilinear", align_corners=align_corners
    )[0]
    queries = [f[:, crf == label].mean(1) for label in crf.unique().tolist() if label != 255]
    if weight is not None:
        queries += list(weight[:, : x.shape[0]].double())
    directions = torch.nn.functional.normalize(torch.stack(queries), dim=1, eps=1e-300)
    unit = torch.nn.functional.normalize(x, dim=0, eps=1e-300)
    cosines = torch.einsum("cd,dhw->chw", directions, unit)[None]
    cosines = torch.nn.functional.interpolate(
        cosines, crf.shape, mode="bilinear", align_corners=align_corners
    )[0]
    order = cosines.sort(0).values
    return (order.diff(dim=0) < 1e-5).any(0) if len(order) > 1 else torch.ones_like(crf).bool()
