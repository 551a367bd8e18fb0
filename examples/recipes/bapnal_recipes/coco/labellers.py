"""From one image with its boxes to a mask per box, by every method of generate_labels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from lightning.fabric import Fabric
from torch import Tensor

from bapnal import InstanceLabelGenerator, PseudoLabels, box_cells
from bapnal_recipes.data.average_precision import read_truth
from bapnal_recipes.data.coco import annotation_path, known_names, read_prepared
from bapnal_recipes.data.dataset import Sample
from bapnal_recipes.data.instances import truth_mask
from bapnal_recipes.engine.labelling import Clock
from bapnal_recipes.models.baselines import grab_cut
from bapnal_recipes.models.classifier import Classifier, load_classifier, untrained_features
from bapnal_recipes.models.deeplab import Features
from bapnal_recipes.models.generator import make_generator

if TYPE_CHECKING:
    from bapnal_recipes.coco.generate_labels import Settings

CLASSIFIER = "classifier.pt"  # that "ridge" keeps beside its labels
MAPS = ("network", "ridge", "agnostic")  # methods of the paper's form
BOTH = (*MAPS, "instances")  # methods that give two masks per box
KINDS = ("crf", "ret", "reliable")  # what those give; all others give "masks"
Masks = dict[str, Tensor]
Labeller = Callable[[Sample, Clock], Masks]


def kinds_of(method: str) -> tuple[str, ...]:
    """Return what a method gives of each box."""
    return KINDS if method in BOTH else ("masks",)


def make_labeller(settings: Settings, fabric: Fabric, classes: tuple[str, ...]) -> Labeller:
    """Return what turns one image into masks ``(K, H, W)``, by kind."""
    if settings.method == "box":
        return filled_boxes
    if settings.method == "truth":
        return _Truth(settings)
    if settings.method == "grabcut":
        return _GrabCut(settings)
    if settings.method == "instances":
        return _Instances(settings, fabric)
    return _Maps(settings, fabric, classes)


def class_weights(
    classifier: Classifier, classes: tuple[str, ...], leave_out: tuple[str, ...] = ()
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the weights that a classifier has for classes of COCO, and which of them it knows.

    Args:
        classifier: Of COCO's classes, or of VOC's by their own names.
        classes: Names in COCO of the classes 1..L.
        leave_out: Names of classes to label as if the classifier had never seen them.

    Returns:
        ``(L + 1, D)``, with a bias where the classifier has one; zeros for a class that it does not
        know. And the names of those that it knows.
    """
    weight = classifier.weight_of(known_names(classes, classifier.classes))
    for name in leave_out:
        weight[classes.index(name) + 1] = 0
    seen = weight[1:].any(1).tolist()
    return weight, tuple(name for name, known in zip(classes, seen, strict=True) if known)


def masks_of_boxes(y: PseudoLabels, boxes: Tensor, labels: Tensor) -> Masks:
    """Turn the label maps of one image into masks: the pixels of a box's class inside the box.

    Args:
        y: Label maps of one image, ``(1, H, W)``.
        boxes: ``(K, 4)``.
        labels: ``(K,)``.

    Returns:
        ``(K, H, W)`` bool each: ``"crf"``, ``"ret"``, and ``"reliable"``, S inside the box. A mask
        is empty where none of a box is of its class.
    """
    size = (y.crf.shape[1], y.crf.shape[2])
    inside = box_cells(boxes, size, size)
    own = labels[:, None, None]
    return {
        "crf": inside & (y.crf == own),
        "ret": inside & (y.retrieval == own),
        "reliable": inside & y.reliable,
    }


def filled_boxes(sample: Sample, clock: Clock) -> Masks:
    """Take every box for its object."""
    size = (sample.image.shape[1], sample.image.shape[2])
    found = box_cells(sample.boxes, size, size)
    clock("labels")
    return {"masks": found}


class _Truth:
    """The ground-truth masks, in the form of labels."""

    def __init__(self, settings: Settings) -> None:
        self.boxes = read_prepared(settings.root, settings.prepared, settings.split)
        self.truth = read_truth(annotation_path(settings.root, settings.split))

    def __call__(self, sample: Sample, clock: Clock) -> Masks:
        size = (sample.image.shape[1], sample.image.shape[2])
        found = torch.zeros(len(sample.boxes), *size, dtype=torch.bool)
        for i, number in enumerate(self.boxes.ids_of(sample.name)):
            found[i] = truth_mask(self.truth, number, size)
        clock("labels")
        return {"masks": found}


class _GrabCut:
    """GrabCut in each box."""

    def __init__(self, settings: Settings) -> None:
        self.rounds, self.seed = settings.rounds, settings.seed

    def __call__(self, sample: Sample, clock: Clock) -> Masks:
        cuts = [
            grab_cut(sample.image, box, iterations=self.rounds, seed=self.seed)
            for box in sample.boxes
        ]
        found = torch.stack(cuts) if cuts else torch.zeros(0, *sample.valid.shape, dtype=torch.bool)
        clock("labels")
        return {"masks": found}


class _Maps:
    """The paper's form: label maps of the image, then the pixels of a box's class inside it."""

    def __init__(self, settings: Settings, fabric: Fabric, classes: tuple[str, ...]) -> None:
        self.fabric = fabric
        self.generate = make_generator(settings.generator, settings.crf)
        self.weight: Tensor | None = None
        features, classifier = load_features(settings)
        if classifier is not None and settings.method != "agnostic":
            weight, _ = class_weights(classifier, classes, settings.leave_out)
            self.weight = weight.to(fabric.device)
        self.features = features.to(fabric.device)

    @torch.inference_mode()
    def __call__(self, sample: Sample, clock: Clock) -> Masks:
        device = self.fabric.device
        images = sample.image[None].to(device)
        with self.fabric.autocast():
            features = self.features(images)
        clock("features")
        boxes, labels = sample.boxes.to(device), sample.labels.to(device)
        y = self.generate(images, features, self.weight, [boxes], [labels])
        found = {kind: mask.cpu() for kind, mask in masks_of_boxes(y, boxes, labels).items()}
        clock("labels")
        return found


class _Instances:
    """The library's instance generator, which zooms into every box."""

    def __init__(self, settings: Settings, fabric: Fabric) -> None:
        self.fabric = fabric
        features, _ = load_features(settings)
        self.generate = InstanceLabelGenerator(features.to(fabric.device))

    @torch.inference_mode()
    def __call__(self, sample: Sample, clock: Clock) -> Masks:
        device = self.fabric.device
        images = sample.image[None].to(device)
        with self.fabric.autocast():
            y = self.generate(images, [sample.boxes.to(device)], [sample.labels.to(device)])
        found = {"crf": y.masks.cpu(), "ret": y.retrieval.cpu(), "reliable": y.reliable.cpu()}
        height, width = sample.valid.shape
        found["reliable"] &= box_cells(sample.boxes, (height, width), (height, width))
        clock("labels")
        return found


def load_features(settings: Settings) -> tuple[Features, Classifier | None]:
    """Return the network that gives features, and the classifier that it belongs to, if any."""
    own = settings.method == "ridge"
    path = settings.out / CLASSIFIER if own else settings.classifier
    if path is None:
        found = untrained_features(settings.backbone, settings.weights, settings.stride)
        return found.eval(), None
    classifier = load_classifier(path)
    return classifier.features, classifier
