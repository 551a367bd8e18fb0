"""Pseudo labels of no images and no boxes, in every dtype and layout."""

import pytest
import torch

from assertions import close
from bapnal import pseudo_labels
from labelling import blurring, fixed, images_of, labels_of, weight_of

# --------------------------------------------------------------------------------------- corners


@pytest.mark.parametrize("agnostic", [False, True])
def test_no_images_and_no_boxes(agnostic):
    weight = None if agnostic else torch.rand(4, 3)
    for boxes, labels in [([], []), (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]:
        y = pseudo_labels(
            torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(0, 3, 4, 4),
            weight,
            boxes,
            labels,
            crf=blurring,
        )
        assert y.crf.shape == y.retrieval.shape == y.reliable.shape == (0, 8, 8)
        assert y.background_unary.shape == (0, 8, 8)
        assert y.foreground_unary.shape == (0, 0, 8, 8)
        assert y.classes.shape == (0, 0)
    empty = torch.zeros(0, dtype=torch.long)
    for boxes, labels in [
        ([torch.zeros(0, 4)] * 2, [empty] * 2),
        (torch.zeros(0, 5), empty),
    ]:
        y = pseudo_labels(
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            torch.rand(2, 3, 4, 4),
            weight,
            boxes,
            labels,
            crf=blurring,
        )
        assert (y.crf == 0).all()
        assert (y.retrieval == 0).all()
        assert y.reliable.all()
        assert (y.background_unary == 1).all()
        assert y.foreground_unary.shape == (2, 0, 8, 8)


# ------------------------------------------------------------------------------ dtypes and memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    scene = fixed(channels=16)
    low = scene.replace(features=scene.features.to(dtype))
    weight = weight_of(low).to(dtype)
    y = labels_of(low, weight, crf=blurring, background_threshold=0.5)
    exact = labels_of(
        low.replace(features=low.features.double()),
        weight.double(),
        crf=blurring,
        background_threshold=0.5,
    )
    assert y.background_unary.dtype == y.foreground_unary.dtype == dtype
    assert (y.crf == exact.crf).float().mean() > 0.99
    assert (y.retrieval == exact.retrieval).float().mean() > 0.99
    mixed = labels_of(low, weight.float(), crf=blurring, background_threshold=0.5)
    assert torch.equal(mixed.crf, y.crf)


def test_autocast_changes_nothing():
    scene = fixed()
    scene = scene.replace(features=scene.features.float())
    weight = weight_of(scene).float()
    plain = labels_of(scene, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = labels_of(scene, weight)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_layouts():
    scene = fixed()
    plain = labels_of(scene, crf=blurring)
    last = scene.features.to(memory_format=torch.channels_last)
    for features in (last, scene.features.mT.contiguous().mT):
        other = labels_of(scene.replace(features=features), crf=blurring)
        for a, b in zip(plain, other, strict=True):
            close(a, b)


def test_no_gradient_is_kept():
    scene = fixed()
    leaf = scene.features.requires_grad_()
    weight = weight_of(scene).requires_grad_()
    y = labels_of(scene.replace(features=leaf), weight)
    assert not any(part.requires_grad for part in y)


def test_inputs_are_not_written_to():
    scene = fixed()
    weight, images = weight_of(scene), images_of(scene)
    before = scene.features.clone(), weight.clone(), images.clone()
    for kwargs in ({}, {"foreground": "cam", "background_minmax": False}):
        pseudo_labels(images, scene.features, weight, scene.boxes, scene.labels, crf=None, **kwargs)
    for a, b in zip(before, (scene.features, weight, images), strict=True):
        assert torch.equal(a, b)
