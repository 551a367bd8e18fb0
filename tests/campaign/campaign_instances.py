"""Random draws against masks of boxes, the mask head and the classifier in closed form.

    BAPNAL_DRAWS=10000 python -m pytest tests/campaign/campaign_instances.py \
        --hypothesis-profile=campaign

Finite, inside their boxes, never empty, and the same alone and in a batch.
"""

import torch
from campaign_library import DTYPES, any_size, boxes_of, mask_of, seeds, sides
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import bapnal
from assertions import close, finite, finite_gradients
from bapnal import PRESETS, MaskHead, RidgeBoxClassifier, ZoomedBoxes
from strategies import seeded


def labels_for(draw, boxes, classes):
    generator = seeded(draw(seeds))
    return [torch.randint(1, classes, (len(b),), generator=generator) for b in boxes]


def backbone_of(draw):
    """Colours at some stride, of any magnitude, in any dtype, perhaps all alike or all zero."""
    dtype, stride = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([4, 8, 16, 32]))
    kind = draw(st.sampled_from(["colours", "colours", "constant", "zero"]))
    scale = 10.0 ** draw(st.sampled_from([-30, -7, 0, 0, 0, 3, 17]))
    scale = min(scale, torch.finfo(dtype).max / 1e3)

    def features(crops):
        x = F.avg_pool2d(crops.double() - 100, stride) / 100
        x = torch.ones_like(x) if kind == "constant" else x * (kind != "zero")
        return (x * scale).to(dtype)

    return features


@given(data=st.data())
def test_instances(data, drawn):
    drawn()
    draw = data.draw
    batch, size = draw(st.integers(1, 2)), (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    images = (torch.rand(batch, 3, *size, generator=seeded(draw(seeds))) * 255).byte()
    boxes = boxes_of(draw, batch, size, most=3)
    labels = labels_for(draw, boxes, 4)
    crfs = [bapnal.instance_crf(iterations=1), lambda guidance, p: p]
    options = {
        "crf": draw(st.sampled_from(crfs)),
        "head": MaskHead(3, 8) if draw(st.integers(0, 3)) == 0 else None,
        "stretch": draw(st.sampled_from([0.0, 0.15, 0.5])),
        "side": draw(st.sampled_from([32, 64])),
        "batch_size": draw(st.integers(1, 4)),
    }
    backbone = backbone_of(draw)
    y = bapnal.instance_labels(images, boxes, labels, backbone, **options)
    owner = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
    joined = torch.cat([b.double() for b in boxes])
    inside = bapnal.box_cells(joined, size, size)
    assert y.masks.shape == y.log_odds.shape == (len(owner), *size)
    assert y.masks.flatten(1).any(1).all()
    assert not (y.masks & ~inside).any()
    covered = torch.isfinite(y.log_odds)
    assert not (y.log_odds.isnan() | (y.log_odds == torch.inf)).any()
    assert not (covered & ~inside).any()
    assert not (y.masks & ~covered).any()
    assert torch.equal(y.reliable, y.masks == y.retrieval)
    assert ((y.doubt >= 0) & (y.doubt <= 1)).all()
    for b in range(batch):
        classes = {0, *labels[b].tolist()}
        assert set(y.semantic[b].unique().tolist()) <= classes
        held = y.masks[owner == b].any(0)
        assert torch.equal(y.semantic[b] > 0, held)
    module = bapnal.InstanceLabelGenerator(backbone, **options)
    again = module(images, boxes, labels)
    assert torch.equal(again.masks, y.masks)
    b = draw(st.integers(0, batch - 1))
    alone = bapnal.instance_labels(
        images[b : b + 1], boxes[b : b + 1], labels[b : b + 1], backbone, **options
    )
    # In float64 there is no rounding that the order of crops could change.
    if backbone(images.new_zeros(1, 3, 32, 32)).dtype == torch.float64 and options["head"] is None:
        close(alone.log_odds.sigmoid(), y.log_odds[owner == b].sigmoid(), tolerance=1e-3)


@given(data=st.data())
def test_mask_head(data, drawn):
    drawn()
    draw = data.draw
    n, size = draw(st.integers(0, 3)), (draw(st.integers(2, 24)), draw(st.integers(2, 24)))
    generator = seeded(draw(seeds))
    x = F.normalize(any_size(draw, torch.float32, (n, 5, 4, 4), largest=0.4), dim=1)
    u, v = (torch.linspace(-1.5, 1.5, side) for side in (size[1], size[0]))
    shape = (n, *size)
    zoomed = ZoomedBoxes(
        (torch.rand(n, 3, *size, generator=generator) * 255).byte(),
        x,
        u.expand(shape),
        v[:, None].expand(shape),
        torch.rand(shape, generator=generator) < 0.5,
        torch.rand(n, generator=generator),
        torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 1.0, 1e3])),
        torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 1.0, 6.0])),
        torch.rand(n, generator=generator),
    )
    head = MaskHead(5, 8, networks=draw(st.integers(1, 2)))
    finite(bapnal.box_log_odds(zoomed), head(zoomed))
    head.set_projection(torch.randn(20, 5, generator=generator) * draw(st.sampled_from([0.0, 1e9])))
    finite(head(zoomed))
    logits = any_size(draw, draw(st.sampled_from(DTYPES)), (n, 28, 28), largest=0.4)
    lab = torch.randn(n, 3, 28, 28, generator=generator) * 50
    valid = torch.rand(n, 28, 28, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    pairs = draw(st.sampled_from([0.0, 1.0]))
    if n > 0:
        finite_gradients(lambda x: bapnal.box_mask_loss(x, lab, valid, pairs), logits)


@given(data=st.data())
def test_ridge(data, drawn):
    drawn()
    draw = data.draw
    dtype, batch, d = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3)), 3
    size = draw(sides) * 3, draw(sides) * 3
    x = any_size(draw, dtype, (batch, d, draw(sides), draw(sides)), largest=0.45)
    boxes = boxes_of(draw, batch, size)
    labels = labels_for(draw, boxes, 4)
    valid = mask_of(draw, batch, size)
    grid = draw(st.integers(1, 4))
    y, known = bapnal.box_targets(x, boxes, labels, size, 4, valid=valid, grid_size=grid)
    finite(y)
    assert ((y >= 0) & (y <= 1)).all()
    close(y.sum(1), torch.ones_like(known), tolerance=1e-5)
    ridge = RidgeBoxClassifier(d, 4, penalty=draw(st.sampled_from([1e-3, 1.0])), grid_size=grid)
    parts = RidgeBoxClassifier(d, 4)
    ridge.update(x, boxes, labels, size, valid)
    for b in range(batch):
        part = slice(b, b + 1)
        mask = None if valid is None else valid[part]
        alone = bapnal.box_targets(
            x[part], boxes[part], labels[part], size, 4, valid=mask, grid_size=grid
        )
        assert torch.equal(alone[1][0], known[b])
        close(alone[0][0], y[b], tolerance=1e-4)
        other = RidgeBoxClassifier(d, 4, grid_size=grid)
        other.update(x[part], boxes[part], labels[part], size, mask)
        parts.add(other)
    finite(ridge.gram, ridge.moment)
    scale = ridge.gram.abs().amax().clamp(min=1e-300)
    close(parts.gram / scale, ridge.gram / scale)
    try:
        weight = ridge.solve()
    except ValueError as error:
        assert str(error) == "update must have seen a box beside background, got none"  # noqa: PT017
        return
    finite(weight)
    images = (torch.rand(batch, 3, *size, generator=seeded(draw(seeds))) * 255).byte()
    options = draw(st.sampled_from([{}, PRESETS["paper"]]))
    y = bapnal.pseudo_labels(images, x, weight, boxes, labels, crf=None, valid=valid, **options)
    finite(y.background_unary, y.foreground_unary)
