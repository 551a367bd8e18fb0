"""Images with boxes for the tests of the classifier in closed form."""

import torch

import reference_labels
from bapnal import RidgeBoxClassifier, box_targets
from strategies import Scene, random_boxes, seeded

CLASSES = 4  # with the background
NONE = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


# --------------------------------------------------------------------------------------- targets


def targets_of(scene, n=4, **kwargs):
    return box_targets(
        scene.features,
        scene.boxes,
        scene.labels,
        scene.image_size,
        CLASSES,
        valid=scene.valid,
        grid_size=n,
        **kwargs,
    )


def oracle_targets(scene, b, n=4):
    features, boxes, valid = scene.image(b)
    labels = scene.labels[b].tolist()
    return reference_labels.box_targets(
        features, boxes, labels, scene.image_size, CLASSES, n, valid
    )


# ---------------------------------------------------------------------------------------- weights


def fixed(seed=0, channels=3):
    """Six images, of which one has no box and one no background; class 3 has no box at all."""
    generator = seeded(seed)
    boxes = [random_boxes(generator, k, (12, 14), 0.0) for k in (2, 1, 3, 0, 2, 1)]
    boxes[5] = torch.tensor([[-1.0, -1, 20, 20]], dtype=torch.float64)
    labels = [torch.randint(1, 3, (len(x),), generator=generator) for x in boxes]
    labels[0] = torch.tensor([1, 2])
    features = torch.randn(6, channels, 5, 6, generator=generator, dtype=torch.float64) + 0.5
    return Scene(
        features=features,
        boxes=boxes,
        labels=labels,
        image_size=(12, 14),
        valid=None,
        classes=3,
        generator=generator,
    )


def update(ridge, scene, rows=slice(None)):
    valid = None if scene.valid is None else scene.valid[rows]
    boxes, labels = scene.boxes[rows], scene.labels[rows]
    ridge.update(scene.features[rows], boxes, labels, scene.image_size, valid)


def collected(scene, *parts, **kwargs):
    ridge = RidgeBoxClassifier(scene.features.shape[1], CLASSES, **kwargs)
    for rows in parts or [slice(None)]:
        update(ridge, scene, rows)
    return ridge


# ------------------------------------------------------------------------- sums, in parts and ranks

HALVES = (slice(0, 3), slice(3, 6))
