"""The mask loss on valid pixels: a slow oracle, torchvision's own loss, and every zero."""

import copy
import math

import pytest
import torch
from torch import nn

roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")

from torchvision.models import detection  # noqa: E402

from bapnal.mask_rcnn import ValidRoIHeads, masked_mask_loss  # noqa: E402

SIDE = 7


def bilinear(plane, x, y):
    """RoIAlign's reading of a map at a point: 0 beyond one pixel outside, else clamped."""
    height, width = len(plane), len(plane[0])
    if not (-1 <= x <= width and -1 <= y <= height):
        return 0.0
    x, y = max(x, 0.0), max(y, 0.0)
    x0, y0 = min(int(x), width - 1), min(int(y), height - 1)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    dx = x - x0 if x0 < width - 1 else 0.0
    dy = y - y0 if y0 < height - 1 else 0.0
    top = plane[y0][x0] * (1 - dx) + plane[y0][x1] * dx
    bottom = plane[y1][x0] * (1 - dx) + plane[y1][x1] * dx
    return top * (1 - dy) + bottom * dy


def align(plane, box):
    """RoIAlign of one map and box in loops, as many samples per bin as pixels in it."""
    x1, y1, x2, y2 = box
    width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
    step_x, step_y = width / SIDE, height / SIDE
    count_x, count_y = math.ceil(step_x), math.ceil(step_y)
    found = []
    for row in range(SIDE):
        found.append([])
        for column in range(SIDE):
            total = 0.0
            for i in range(count_y):
                y = y1 + row * step_y + (i + 0.5) * step_y / count_y
                for j in range(count_x):
                    x = x1 + column * step_x + (j + 0.5) * step_x / count_x
                    total += bilinear(plane, x, y)
            found[-1].append(total / (count_x * count_y))
    return found


def oracle(logits, proposals, masks, valid, labels, matched):
    """The loss and its gradient by loops over Python floats."""
    total, weight = 0.0, 0.0
    gradient = torch.zeros(logits.shape, dtype=torch.float64)
    rows = []
    r = 0
    for boxes, own, sure, names, index in zip(
        proposals, masks, valid, labels, matched, strict=True
    ):
        for box, k in zip(boxes.tolist(), index.tolist(), strict=True):
            target = align(own[k].tolist(), box)
            certain = align(sure[k].tolist(), box)
            for y in range(SIDE):
                for x in range(SIDE):
                    score = float(logits.detach()[r, names[k], y, x])
                    share = 1 / (1 + math.exp(-score))
                    w, t = certain[y][x], target[y][x]
                    total -= w * (t * math.log(share) + (1 - t) * math.log(1 - share))
                    weight += w
                    rows.append((r, int(names[k]), y, x, w * (share - t)))
            r += 1
    if weight == 0:
        return 0.0, gradient
    for r, c, y, x, slope in rows:
        gradient[r, c, y, x] += slope / weight
    return total / weight, gradient


def case(seed, sure=0.5, dtype=torch.float64):
    """Two images with 3 and 1 objects, 4 and 2 proposals, one of them out of its image."""
    generator = torch.Generator().manual_seed(seed)
    sizes, counts = ((20, 30), (25, 17)), (3, 1)
    proposals = [
        torch.tensor([[1.0, 2, 12, 19], [0, 0, 30, 20], [14.2, 3.3, 14.9, 3.9], [20, 8, 33, 20]]),
        torch.tensor([[2.5, 3.5, 14, 24], [0, 0, 17, 25]]),
    ]
    masks, valid = [], []
    for (height, width), count in zip(sizes, counts, strict=True):
        shape = (count, height, width)
        masks.append((torch.rand(shape, generator=generator) < 0.5).to(dtype))
        valid.append((torch.rand(shape, generator=generator) < sure).to(dtype))
    labels = [torch.tensor([2, 1, 3]), torch.tensor([3])]
    matched = [torch.tensor([0, 2, 1, 0]), torch.tensor([0, 0])]
    logits = 2 * torch.randn(6, 4, SIDE, SIDE, generator=generator, dtype=dtype)
    proposals = [boxes.to(dtype) for boxes in proposals]
    return logits.requires_grad_(), proposals, masks, valid, labels, matched


def both(masks, valid):
    return [torch.cat(pair) for pair in zip(masks, valid, strict=True)]


@pytest.mark.parametrize("sure", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_the_oracles(seed, sure):
    logits, proposals, masks, valid, labels, matched = case(seed, sure)
    want, gradient = oracle(logits, proposals, masks, valid, labels, matched)
    got = masked_mask_loss(logits, proposals, both(masks, valid), labels, matched)
    torch.testing.assert_close(got.item(), want, rtol=1e-9, atol=1e-12)
    got.backward()
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("given", [True, False], ids=["all valid", "no valid maps"])
def test_with_everything_valid_it_is_torchvisions(given):
    logits, proposals, masks, valid, labels, matched = case(0)
    everywhere = [torch.ones_like(x) for x in valid]
    maps = both(masks, everywhere) if given else masks
    if given:  # as torchvision's proposals are: nothing beyond the border is valid
        proposals[0][:, 2].clamp_(max=30)
    want = roi_heads.maskrcnn_loss(logits, proposals, masks, labels, matched)
    (wanted,) = torch.autograd.grad(want, logits)
    got = masked_mask_loss(logits, proposals, maps, labels, matched)
    (found,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_none_valid_is_0_with_a_gradient_of_0():
    logits, proposals, masks, valid, labels, matched = case(0, sure=0.0)
    assert sum(float(x.sum()) for x in valid) == 0
    got = masked_mask_loss(logits, proposals, both(masks, valid), labels, matched)
    got.backward()
    assert got == 0
    assert (logits.grad == 0).all()


def test_without_proposals_it_is_0_with_a_gradient_of_0():
    logits = torch.zeros(0, 4, SIDE, SIDE, requires_grad=True)
    nothing = [torch.zeros(0, 4)], [torch.zeros(0, 5, 5)]
    got = masked_mask_loss(
        logits, *nothing, [torch.zeros(0).long()], [torch.zeros(0, dtype=torch.long)]
    )
    got.backward()
    assert got == 0
    assert logits.grad.shape == logits.shape


def test_what_an_invalid_pixel_is_does_not_matter():
    logits, proposals, masks, valid, labels, matched = case(1, sure=1.0)
    for sure in valid:
        sure[:, :, :10] = 0
    other = [torch.where(s > 0, m, 1 - m) for m, s in zip(masks, valid, strict=True)]
    # RoIAlign mixes neighbours: what lies one column from the edge is invalid in part.
    for box in proposals:
        box[:, 0].clamp_(min=12)
        box[:, 2].clamp_(min=16)
    values = [
        masked_mask_loss(logits, proposals, both(m, valid), labels, matched) for m in (masks, other)
    ]
    assert values[0] == values[1]
    assert values[0] > 0


def test_half_precision_is_summed_in_float32():
    logits, proposals, masks, valid, labels, matched = case(0, dtype=torch.float32)
    want = masked_mask_loss(logits, proposals, both(masks, valid), labels, matched)
    got = masked_mask_loss(logits.half(), proposals, both(masks, valid), labels, matched)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


def test_maps_of_another_number_are_one_error():
    logits, proposals, masks, _, labels, matched = case(0)
    with pytest.raises(ValueError, match=r"gt_masks\[0\] must have shape \(3, H, W\), or \(6, H"):
        masked_mask_loss(logits, proposals, [masks[0][:2], masks[1]], labels, matched)
    with pytest.raises(ValueError, match="mask_logits must have shape"):
        masked_mask_loss(logits[0], proposals, masks, labels, matched)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = 8
    return detection.MaskRCNN(
        backbone,
        num_classes=3,
        min_size=48,
        max_size=64,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=roi_heads_pool(7),
        mask_roi_pool=roi_heads_pool(14),
        box_batch_size_per_image=16,
    )


def roi_heads_pool(size):
    from torchvision.ops import MultiScaleRoIAlign

    return MultiScaleRoIAlign(["0"], size, 2)


def losses(model, images, targets):
    torch.manual_seed(1)
    return model(images, copy.deepcopy(targets))


def a_target(valid=None):
    masks = torch.zeros(2, 48, 56)
    masks[0, 10:30, 10:30] = masks[1, 20:40, 30:50] = 1
    boxes = torch.tensor([[10.0, 10, 30, 30], [30, 20, 50, 40]])
    maps = masks if valid is None else torch.cat([masks, valid])
    return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": maps.byte()}]


def test_a_network_of_torchvisions_takes_valid_maps(network):
    images = [torch.rand(3, 48, 56, generator=torch.Generator().manual_seed(2))]
    before = losses(network, images, a_target())
    changed = copy.deepcopy(network)
    changed.roi_heads.__class__ = ValidRoIHeads
    assert changed.state_dict().keys() == network.state_dict().keys()
    everything = torch.ones(2, 48, 56)
    for target in (a_target(), a_target(everything)):
        after = losses(changed, images, target)
        assert after.keys() == before.keys()
        for name, value in after.items():
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)
    nothing = losses(changed, images, a_target(0 * everything))
    assert nothing["loss_mask"] == 0
    assert nothing["loss_classifier"] == before["loss_classifier"]
    half = everything.clone()
    half[:, :, 25:] = 0
    assert losses(changed, images, a_target(half))["loss_mask"] != before["loss_mask"]
    assert roi_heads.RoIHeads.forward.__globals__["maskrcnn_loss"] is roi_heads.maskrcnn_loss


def test_it_finds_objects_as_before(network):
    images = [torch.rand(3, 48, 56, generator=torch.Generator().manual_seed(2))]
    changed = copy.deepcopy(network)
    changed.roi_heads.__class__ = ValidRoIHeads
    network.eval(), changed.eval()
    with torch.no_grad():
        want, got = network(images)[0], changed(images)[0]
    network.train()
    for name in want:
        assert torch.equal(want[name], got[name])
