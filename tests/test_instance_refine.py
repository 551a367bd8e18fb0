"""A mask head from boxes alone: its loss against loops, its training, its errors."""

import pytest
import torch
from torch.nn import functional as F

import reference_instances as reference
from assertions import close, finite
from bapnal import (
    InstanceLabelGenerator,
    MaskHead,
    box_log_odds,
    box_mask_loss,
    fit_mask_head,
    instance_labels,
)
from bapnal.instance_refine import box_points

SIDE = 64


def colours(images):
    return F.avg_pool2d(images.float() - 100, 8)


def samples(count, seed=0):
    """Images with a bright disc in a tight box."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        image = torch.randint(30, 90, (3, 80, 96), generator=generator).to(torch.uint8)
        x, y, r = (int(torch.randint(20, 50, (), generator=generator)) for _ in range(3))
        r = 8 + r // 5
        i, j = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(96) + 0.5, indexing="ij")
        disc = (j - x - 8).square() + (i - y).square() < r * r
        image[:, disc] += 130
        yield image, torch.tensor([[x + 8.0 - r, y - r, x + 8 + r, y + r]]).clamp(min=0), disc


def boxes_of(count):
    return [(image, box) for image, box, _ in samples(count)]


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_agrees_with_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 28, 28, generator=generator, dtype=torch.float64) * 2
    lab = torch.randint(0, 3, (1, 3, 28, 28), generator=generator).double()
    valid = torch.rand(1, 28, 28, generator=generator) < 0.9
    loss = box_mask_loss(logits, lab, valid, 0.7)
    args = (logits[0].tolist(), lab[0].tolist(), valid[0].tolist(), 0.7)
    close(loss, reference.box_mask_loss(*args))


def test_loss_is_least_for_the_filled_box_of_one_colour():
    line = ((torch.arange(28) + 0.5) / 28 * 2 - 1).abs() * 1.3 < 1
    box = (line & line[:, None])[None]
    lab = box[:, None].expand(1, 3, 28, 28) * 50.0
    there = torch.ones(1, 28, 28, dtype=torch.bool)
    good = box_mask_loss(torch.where(box, 20.0, -20.0), lab, there)
    assert good < 0.01
    for wrong in (torch.where(box, -20.0, -20.0), torch.full((1, 28, 28), 20.0)):
        assert box_mask_loss(wrong, lab, there) > good + 0.5


def test_loss_has_finite_gradients_where_nothing_is_outside_or_alike():
    logits = torch.full((1, 28, 28), 100.0, requires_grad=True)
    lab = torch.arange(28 * 28.0).reshape(1, 1, 28, 28).expand(1, 3, 28, 28) * 100
    loss = box_mask_loss(logits, lab, torch.zeros(1, 28, 28, dtype=torch.bool))
    loss.backward()
    finite(loss, logits.grad)


def test_training_is_reproducible_and_uses_the_head():
    random = torch.get_rng_state()
    heads = [fit_mask_head(boxes_of(20), colours, epochs=1, side=SIDE) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), random)
    states = [head.state_dict() for head in heads]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not heads[0].training
    image, box, disc = next(samples(1, seed=5))
    plain = InstanceLabelGenerator(colours, side=SIDE)
    refined = InstanceLabelGenerator(colours, head=heads[0], side=SIDE)
    one = refined(image[None], [box], [torch.tensor([1])])
    other = plain(image[None], [box], [torch.tensor([1])])
    assert not torch.equal(one.log_odds, other.log_odds)
    assert (one.masks[0] & disc).sum() > 0.8 * (one.masks[0] | disc).sum()


def test_cells_may_be_projected_before_they_are_sampled():
    generator = torch.Generator().manual_seed(0)
    image, box, _ = next(samples(1, seed=2))

    def backbone(crops):
        return torch.cat([colours(crops) - 20, colours(crops.flip(3)) + 50], dim=1).double()

    head = MaskHead(6).double()
    head.mean.copy_(torch.randn(6, generator=generator, dtype=torch.float64))
    head.projection.copy_(torch.randn(6, 64, generator=generator, dtype=torch.float64))
    seen = []

    def look(zoomed):
        seen.append(zoomed)
        return box_log_odds(zoomed)

    labels = [torch.tensor([1])]
    instance_labels(image[None], [box], labels, backbone, head=look, side=SIDE)
    (zoomed,) = seen
    sampled = box_points(zoomed)
    assert sampled.features.shape == (1, 6, 28, 28)
    projected = torch.einsum(
        "ndhw,dc->nchw", sampled.features - head.mean[:, None, None], head.projection
    )
    assert projected.std() > 0.1
    close(head.points(zoomed).features, projected)
    close(head.project(sampled.features), projected)


def test_the_answer_is_the_mean_of_networks_of_different_seeds():
    one, other = (
        fit_mask_head(boxes_of(16), colours, networks=1, epochs=1, seed=seed, side=SIDE)
        for seed in (3, 4)
    )
    both = fit_mask_head(boxes_of(16), colours, networks=2, epochs=1, seed=3, side=SIDE)
    inputs = torch.randn(2, 73, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = (one.logits(inputs) + other.logits(inputs)) / 2
    assert (one.logits(inputs) - other.logits(inputs)).abs().max() > 1e-3
    close(both.logits(inputs), expected, tolerance=1e-5)


def test_a_mirrored_image_gets_the_mirrored_mask():
    head = fit_mask_head(boxes_of(16), colours, epochs=1, side=SIDE)
    image, _, _ = next(samples(1, seed=3))
    box = torch.tensor([[16.0, 16, 80, 64]])  # whose window is the mirrored one of its mirror
    args = ([torch.tensor([1])], colours)
    one = instance_labels(image[None], [box], *args, head=head, side=SIDE)
    other = instance_labels(image[None].flip(3), [box], *args, head=head, side=SIDE)
    assert (one.masks ^ other.masks.flip(2)).float().mean() < 0.02


def test_errors_name_argument_expectation_and_fact():
    with pytest.raises(ValueError, match="samples must hold at least 16 boxes, got 3"):
        fit_mask_head(boxes_of(3), colours, side=SIDE)
    with pytest.raises(ValueError, match="most_boxes must be >= 16, got 1"):
        fit_mask_head([], colours, most_boxes=1)
    with pytest.raises(ValueError, match="networks must be >= 1, got 0"):
        fit_mask_head([], colours, networks=0)
    with pytest.raises(ValueError, match="channels must be >= 1, got 0"):
        MaskHead(0)
    with pytest.raises(ValueError, match=r"logits must have shape \(n, 28, 28\)"):
        box_mask_loss(torch.zeros(1, 9, 9), torch.zeros(1, 3, 9, 9), torch.zeros(1, 9, 9).bool())
