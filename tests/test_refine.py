"""The head on frozen features: its forms against loops, its training, its errors."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from assertions import close
from bapnal import (
    FeatureHead,
    PseudoLabelGenerator,
    RidgeBoxClassifier,
    fit_feature_head,
)


def ring_features(mask, generator):
    """Background in the middle, object on a circle around it: no line parts them."""
    angle = torch.rand(mask.shape, generator=generator) * 2 * math.pi
    radius = torch.where(mask, 1.0, 0.2)
    noise = torch.randn(2, *mask.shape, generator=generator) * 0.05
    return (torch.stack([radius * angle.cos(), radius * angle.sin()]) + noise)[None]


def samples(count, seed=0, labels=(1,)):
    """Images 48 x 48 with a bright disc each in a tight box, and features at a third of it."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        x, y, r = (int(torch.randint(16, 32, (), generator=generator)) for _ in range(3))
        r = 6 + r // 4
        i, j = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(48) + 0.5, indexing="ij")
        disc = (j - x).square() + (i - y).square() < r * r
        label = labels[number % len(labels)]
        image = torch.full((3, 48, 48), 60, dtype=torch.uint8)
        image[:, disc] = 200
        box = torch.tensor([[x - r, y - r, x + r, y + r]]).clamp(0, 48).float()
        features = ring_features(F.avg_pool2d(disc[None].float(), 3)[0] > 0.5, generator)
        yield image, features, box, torch.tensor([label]), disc * label


def by_brightness(images, probabilities):
    """In place of a CRF: marginals that know the disc."""
    bright = (images[:, :1] > 128).to(probabilities.dtype)
    return torch.cat([1 - bright, bright.expand(-1, probabilities.shape[1] - 1, -1, -1)], dim=1)


def given(count, **options):
    return [sample[:4] for sample in samples(count, **options)]


def ridge_of(known, num_classes=4):
    ridge = RidgeBoxClassifier(in_channels=known[0][1].shape[1], num_classes=num_classes)
    for image, features, boxes, labels in known:
        ridge.update(features, [boxes], [labels], image_size=tuple(image.shape[1:]))
    return ridge.solve()


@pytest.fixture(scope="module")
def fitted():
    known = given(24, labels=(1, 2))
    weight = ridge_of(known)
    return weight, fit_feature_head(known, weight, by_brightness, epochs=30, lr=3e-3, seed=1)


def test_head_agrees_with_loops():
    torch.manual_seed(0)
    head = FeatureHead(in_channels=3, num_classes=4, width=5).double()
    head.mean.copy_(torch.randn(3))
    head.deviation.copy_(torch.tensor(0.7))
    head.gain.copy_(torch.tensor(0.3))
    head.seen[2] = False
    f = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found = head(f)
    v, b = head.hidden.weight.tolist(), head.hidden.bias.tolist()
    for batch, y, x in itertools.product(range(2), range(2), range(2)):
        at = f[batch, :, y, x].tolist()
        for k in range(5):
            total = b[k]
            for d in range(3):
                total += v[k][d] * (at[d] - float(head.mean[d])) / float(head.deviation)
            close(found[batch, 3 + k, y, x], 0.3 * max(total, 0.0), tolerance=1e-6)
        assert found[batch, :3, y, x].tolist() == at
    rows = head.weight
    assert rows.shape == (4, 9)
    assert (rows[2] == 0).all()
    for c in (0, 1, 3):
        w, b = head.classifier.weight[c].tolist(), head.classifier.bias[c].item()
        expected = [0.0, 0.0, 0.0, *(x / 0.3 for x in w), b]
        close(rows[c], torch.tensor(expected, dtype=torch.float64), tolerance=1e-6)


def test_activations_have_a_tenth_of_the_squared_length(fitted):
    _, head = fitted
    both = torch.stack([head(features)[0] for _, features, *_ in samples(24, labels=(1, 2))])
    length, own = both[:, :2].square().sum(1).mean(), both[:, 2:].square().sum(1).mean()
    close(own / length, 0.1, tolerance=0.01)


def test_head_learns_what_the_closed_form_cannot(fitted):
    weight, head = fitted
    # What the weights know, without a CRF and a prior.
    generate = PseudoLabelGenerator(None, background="cam", background_prior=0.0)
    wrong = torch.zeros(2)
    for image, features, boxes, labels, truth in samples(10, seed=5):
        one = generate(image[None], features, weight, [boxes], [labels])
        other = generate(image[None], head(features), head.weight, [boxes], [labels])
        wrong += torch.tensor([float((y.crf[0] != truth).float().mean()) for y in (one, other)])
    assert wrong[0] > 1.0  # a tenth of the pixels
    assert wrong[1] < 0.3


def test_scores_approach_the_marginals(fitted):
    _, head = fitted
    for image, features, _, labels, _ in samples(4, seed=5):
        g = head(features)[0]
        scores = torch.tensordot(head.weight[:, :-1], g, 1) + head.weight[:, -1, None, None]
        own = F.interpolate(scores[None, [0, *labels]], image.shape[1:])[0]
        marginals = by_brightness(image[None], own[None])[0]
        assert (own - marginals).abs().mean() < 0.12


def test_training_is_reproducible_and_leaves_the_random_state():
    known = given(6)
    weight = ridge_of(known)
    state = torch.get_rng_state()
    one, two = (fit_feature_head(known, weight, epochs=1, seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    other = fit_feature_head(known, weight, epochs=1, seed=4)
    assert not one.training
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(one.hidden.weight, other.hidden.weight)
    loaded = FeatureHead(2, 4)
    loaded.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(loaded.weight, one.weight)


@pytest.mark.parametrize("scale", [2.0**40, 2.0**-40])
def test_scale_of_the_features_does_not_matter(scale):
    known = given(6)
    large = [(image, features * scale, boxes, labels) for image, features, boxes, labels in known]
    # Weights of the pair (features, bias): only the first part sees the scale.
    weight = ridge_of(known)
    scaled = torch.cat([weight[:, :-1] / scale, weight[:, -1:]], dim=1)
    one = fit_feature_head(known, weight, by_brightness, epochs=1)
    other = fit_feature_head(large, scaled, by_brightness, epochs=1)
    close(other(large[0][1]) / scale, one(known[0][1]), tolerance=1e-5)
    close(other.weight * scale, one.weight * torch.tensor([1.0] * 258 + [scale]), tolerance=1e-5)


def test_classes_that_no_image_shows_stay_unseen(fitted):
    _, head = fitted
    assert head.seen.tolist() == [True, True, True, False]
    assert (head.weight[3] == 0).all()
    assert (head.weight[1] != 0).any()


def test_reads_until_there_are_enough_cells_and_passes_over_images_without_boxes():
    known = given(6)
    weight = ridge_of(known)
    image, features = known[0][:2]
    empty = (image, features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    stream = iter([empty, *known])
    calls = []

    def crf(images, probabilities):
        calls.append(images.shape[0])
        return probabilities

    options = {"cells_per_image": 100, "most_cells": 250, "epochs": 1}
    fit_feature_head(stream, weight, crf, **options)
    assert calls == [1, 1, 1]
    assert len(list(stream)) == 3


def test_refusals():
    known = given(1)
    weight = ridge_of(known)
    with pytest.raises(ValueError, match="samples must hold an image with a box, got none"):
        fit_feature_head([], weight)
    for name in ("width", "cells_per_image", "most_cells", "epochs"):
        with pytest.raises(ValueError, match=name):
            fit_feature_head(known, weight, **{name: 0})
    with pytest.raises(ValueError, match="lr"):
        fit_feature_head(known, weight, lr=0.0)
    with pytest.raises(TypeError, match="weight"):
        fit_feature_head(known, weight.long())
    with pytest.raises(ValueError, match="features"):
        FeatureHead(3, 2)(torch.zeros(1, 4, 2, 2))
    with pytest.raises(TypeError, match="features"):
        FeatureHead(3, 2)(torch.zeros(1, 3, 2, 2).long())
    with pytest.raises(ValueError, match="num_classes"):
        FeatureHead(3, 1)
