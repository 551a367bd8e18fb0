"""The classifier of stage 1 on ground-truth boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bapnal import background_aware_pooling
from bapnal_recipes.data.voc import Devkit, default_root
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch, total
from bapnal_recipes.engine.runs import Meter
from bapnal_recipes.models.classifier import Classifier, load_classifier
from bapnal_recipes.models.deeplab import Features
from bapnal_recipes.voc2012.evaluate.common import (
    percent,
    score_classes,
    shared_out,
    subject,
    write,
)


@dataclass(frozen=True)
class EvaluateBoxes:
    """Measure the classifier on ground-truth boxes: how many it gives the right object class.

    Args:
        classifier: The ``classifier.pt`` of train_classifier.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; the paper's are "val".
        background: Pool what is likely object in the box (Eq. 4) instead of the whole box.
        cropped: Cut each box out of the image and average the features of what is cut out, as the
            paper does; without any background around it, both poolings are that average.
        grid_size: N of the grid of the background's prototypes, with ``background``.
        score_classes: Boxes of which classes count, of 1..L; none for all.
        machines: Where it runs.
    """

    classifier: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "val"
    background: bool = False
    cropped: bool = False
    grid_size: int = 4
    score_classes: tuple[int, ...] = ()
    machines: MachinesOption = field(default_factory=Machines)


@torch.inference_mode()
def evaluate_boxes(settings: EvaluateBoxes) -> dict[str, Any]:
    """Measure how many boxes the classifier names right; see :class:`EvaluateBoxes`.

    The scores are ``accuracy`` over all boxes, ``per_class``, and the number of ``boxes``.
    """
    if settings.cropped and settings.background:
        raise ValueError("background must be off with cropped, which leaves none, got both")
    classifier = load_classifier(settings.classifier)
    devkit = Devkit(settings.root, classifier.classes)
    names = devkit.names(settings.split)
    chosen = score_classes(settings.score_classes, devkit.classes, first=1)
    fabric = launch(settings.machines)
    features = classifier.features.to(fabric.device).eval()
    counts = torch.zeros(2, len(devkit.classes) + 1, dtype=torch.long)
    together = Together(fabric)
    with Meter() as meter, together.alike():
        for name in shared_out(names, fabric, "boxes"):
            image, annotation = devkit.annotated(name)
            image, boxes = image.to(fabric.device), annotation.boxes.to(fabric.device)
            pool = _cropped if settings.cropped else _pooled
            vectors = pool(features, image, boxes, settings, classifier)
            named = classifier.scores(vectors)[:, 1:].argmax(1).cpu() + 1
            right = annotation.labels[named == annotation.labels]
            for row, entries in zip(counts, (right, annotation.labels), strict=True):
                row += entries.bincount(minlength=len(row))
    counts = total(fabric, counts)
    hits, all_boxes = counts[:, chosen].sum(1).tolist()
    if all_boxes == 0:
        raise ValueError(f"the split {settings.split} must hold boxes that count, has none")
    per_class = (counts[0] / counts[1])[1:].tolist()
    scores = {
        "accuracy": percent(hits / all_boxes),
        "per_class": dict(zip(devkit.classes, map(percent, per_class), strict=True)),
        "boxes": all_boxes,
    }
    return write("boxes", settings, subject(settings.classifier.parent), scores, meter, together)


def _pooled(
    features: Features,
    image: Tensor,
    boxes: Tensor,
    settings: EvaluateBoxes,
    classifier: Classifier,
) -> Tensor:
    """Return a vector of each box in its image; ``(K, D)``."""
    return background_aware_pooling(
        features(image[None]),
        [boxes],
        (image.shape[1], image.shape[2]),
        grid_size=settings.grid_size,
        attention=settings.background,
        sampling=classifier.settings.get("sampling", "cells"),
    ).foreground[:, 0]


def _cropped(
    features: Features,
    image: Tensor,
    boxes: Tensor,
    settings: EvaluateBoxes,
    classifier: Classifier,
) -> Tensor:
    """Return the mean vector of each box, cut out of its image; ``(K, D)``."""
    means = []
    for x1, y1, x2, y2 in boxes.tolist():
        rows, columns = (
            slice(math.floor(low), max(math.ceil(high), math.floor(low) + 1))
            for low, high in ((y1, y2), (x1, x2))
        )
        means.append(features(image[None, :, rows, columns])[0].mean((1, 2)))
    return torch.stack(means) if means else classifier.weight.new_zeros(0, features.channels)
