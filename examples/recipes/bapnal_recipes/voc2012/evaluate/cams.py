"""Class activation maps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.voc import Devkit, default_root
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch, total
from bapnal_recipes.engine.runs import Meter
from bapnal_recipes.models.backbones import ALIGNED
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.generator import PAPER, CrfSettings, Normalization, make_generator
from bapnal_recipes.voc2012.evaluate.common import (
    mean_and_each,
    score_classes,
    shared_out,
    subject,
    write,
)


@dataclass(frozen=True)
class EvaluateCams:
    """Measure class activation maps (suppl. Table 2): the precision of what they activate.

    A pixel is activated for a class that the image shows where the map of Eq. 5, which is 0
    outside the boxes of the class, is above a threshold. It is right where the ground truth has
    the class; pixels without ground truth do not count.

    Args:
        classifier: The ``classifier.pt`` of train_classifier.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; the paper's are "train".
        threshold: Above which a pixel is activated, as a share of the maximum. The paper does not
            state its own, so numbers compare between classifiers, not with the paper's.
        cam_normalization: Maximum of Eq. 5 over all boxes of a class, or over each box.
        align_corners: How maps are upsampled; by default as in the preset of the backbone.
        score_classes: Which classes to average over, of 1..L; none for all.
        machines: Where it runs.
    """

    classifier: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "train"
    threshold: float = 0.5
    cam_normalization: Normalization = "class"
    align_corners: bool | None = None
    score_classes: tuple[int, ...] = ()
    machines: MachinesOption = field(default_factory=Machines)


@torch.inference_mode()
def evaluate_cams(settings: EvaluateCams) -> dict[str, Any]:
    """Measure the precision of class activation maps; see :class:`EvaluateCams`.

    The scores are ``precision`` and ``recall``, each with ``mean`` and ``per_class`` (None for
    classes of which nothing is activated, or which no image holds).
    """
    if not 0 <= settings.threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {settings.threshold}")
    classifier = load_classifier(settings.classifier)
    devkit = Devkit(settings.root, classifier.classes)
    names = devkit.names(settings.split)
    chosen = score_classes(settings.score_classes, devkit.classes, first=1)
    fabric = launch(settings.machines)
    features = classifier.features.to(fabric.device).eval()
    weight = classifier.weight.to(fabric.device)
    aligned = settings.align_corners
    if aligned is None:
        aligned = classifier.settings.get("backbone") in ALIGNED
    normalized = replace(PAPER, cam_normalization=settings.cam_normalization)
    generate = make_generator(replace(normalized, align_corners=aligned), CrfSettings(none=True))
    counts = torch.zeros(3, len(devkit.classes) + 1, dtype=torch.long)
    together = Together(fabric)
    with Meter() as meter, together.alike():
        for name in shared_out(names, fabric, "cams"):
            image, annotation = devkit.annotated(name)
            truth = devkit.mask(name, (image.shape[1], image.shape[2]))
            image = image[None].to(fabric.device)
            boxes, labels = [annotation.boxes.to(fabric.device)], [annotation.labels]
            y = generate(image, features(image), weight, boxes, [labels[0].to(fabric.device)])
            for label, u_c in zip(y.classes[0].tolist(), y.foreground_unary[0].cpu(), strict=True):
                counts[:, label] += activated(u_c, truth, label, settings.threshold)
    hits, positives, true = total(fabric, counts).double()
    scores = {
        "precision": mean_and_each(hits / positives, devkit.classes, chosen),
        "recall": mean_and_each(hits / true, devkit.classes, chosen),
    }
    return write("cams", settings, subject(settings.classifier.parent), scores, meter, together)


def activated(u_c: Tensor, truth: Tensor, label: int, threshold: float) -> Tensor:
    """Count pixels: activated and of the class, activated, and of the class; ``(3,)``.

    Args:
        u_c: Normalised class activation map (Eq. 5); ``(H, W)``.
        truth: Ground truth, 255 where there is none; ``(H, W)``.
        label: The class.
        threshold: Above which a pixel is activated.
    """
    active = (u_c > threshold) & (truth != IGNORE_INDEX)
    own = truth == label
    return torch.stack([(active & own).sum(), active.sum(), own.sum()])
