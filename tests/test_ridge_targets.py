"""Coverage of cells by boxes, and targets from boxes, against the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from assertions import close, finite
from bapnal import RidgeBoxClassifier, box_coverage, box_targets
from ridge_inputs import CLASSES, oracle_targets, targets_of
from strategies import random_boxes, scenes, seeded, seeds, sizes


@given(seed=seeds, image_size=st.tuples(st.integers(1, 13), st.integers(1, 13)), map_size=sizes)
def test_coverage_agrees_with_the_oracle(seed, image_size, map_size):
    boxes = random_boxes(seeded(seed), 6, image_size)
    found = box_coverage(boxes, image_size, map_size)
    assert found.shape == (6, *map_size)
    for row, box in zip(found, boxes.tolist(), strict=True):
        close(row, reference.box_coverage(box, image_size, map_size))
    low = box_coverage(boxes.float().reshape(2, 3, 4), image_size, map_size)
    assert low.dtype == torch.float32
    close(low.flatten(0, 1), found.float(), tolerance=1e-5)


@given(seed=seeds, map_size=sizes)
def test_coverage_adds_up_to_the_area_of_the_box(seed, map_size):
    boxes = random_boxes(seeded(seed), 6, (12, 9), outside=0.0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    cell = 12 * 9 / (map_size[0] * map_size[1])
    close(box_coverage(boxes, (12, 9), map_size).sum((1, 2)) * cell, area)


def test_coverage_of_boxes_that_lie_in_no_cell():
    boxes = torch.tensor([[2.0, 2, 2, 5], [-9, -9, -1, -1], [50, 0, 60, 8], [3, 3, 3, 3]])
    assert (box_coverage(boxes, (8, 8), (4, 4)) == 0).all()
    assert (box_coverage(torch.tensor([-9.0, -9, 50, 50]), (8, 8), (4, 4)) == 1).all()
    assert box_coverage(torch.zeros(0, 4), (8, 8), (4, 4)).shape == (0, 4, 4)
    half = box_coverage(boxes.half(), (8, 8), (4, 4))
    assert half.dtype == torch.float32
    for wrong, kind in [(torch.zeros(3, 5), ValueError), (torch.zeros(4).bool(), TypeError)]:
        with pytest.raises(kind, match="corners"):
            box_coverage(wrong, (8, 8), (4, 4))


@settings(max_examples=80)
@given(scene=scenes(), n=st.integers(1, 4))
def test_targets_agree_with_the_oracle(scene, n):
    y, known = targets_of(scene, n)
    assert known.dtype == torch.bool
    for b in range(scene.batch):
        expected, cells = oracle_targets(scene, b, n)
        close(y[b], expected, tolerance=1e-8)
        assert known[b].tolist() == cells


@given(scene=scenes())
def test_targets_are_shares(scene):
    y, known = targets_of(scene)
    close(y.sum(1), torch.ones_like(y[:, 0]))
    assert y.min() >= 0
    assert y.max() <= 1
    for b in range(scene.batch):
        for c in range(1, CLASSES):
            boxes = scene.boxes[b][scene.labels[b] == c]
            covered = box_coverage(boxes, scene.image_size, scene.map_size).sum(0) > 0
            assert (y[b, c][~covered] == 0).all()
        if scene.boxes[b].shape[0] == 0:
            assert (y[b, 0] == 1).all()
            assert known[b].all() or scene.valid is not None


def test_an_image_that_its_box_covers_tells_nothing():
    features = torch.rand(2, 3, 4, 4)
    boxes = [torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 4]])]
    y, known = box_targets(features, boxes, [torch.tensor([1])] * 2, (8, 8), CLASSES)
    assert not known[0].any()
    assert known[1].all()
    finite(y)
    ridge = RidgeBoxClassifier(3, CLASSES)
    ridge.update(features[:1], boxes[:1], torch.tensor([1]), (8, 8))
    assert (ridge.gram == 0).all()
    assert (ridge.moment == 0).all()
