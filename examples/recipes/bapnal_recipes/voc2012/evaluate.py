"""Measure what the other scripts made: one number a row of the paper's tables, written as JSON.

    python -m bapnal_recipes.voc2012.evaluate labels --folder runs/voc2012/labels --split train \
        --out runs/voc2012/labels/train.json
    python -m bapnal_recipes.voc2012.evaluate segmentation \
        --segmenter runs/voc2012/nal/segmenter.pt --out runs/voc2012/nal/val.json
    python -m bapnal_recipes.voc2012.evaluate segmentation \
        --segmenter runs/voc2012/nal/segmenter.pt --split test --modes multi+crf \
        --archive results.tgz --out runs/voc2012/nal/test.json

The others are ``cams`` (precision of class activation maps), ``boxes`` (accuracy of the box
classifier), ``filling`` (how much of each box its object fills) and ``runtime``. All shares are in
percent, all times in seconds. Every mIoU comes from one confusion matrix over the whole split.
"""

from __future__ import annotations

import json
import math
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import rich
import torch
import tyro
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from bapnal import CosineClassifier, DenseCRF, PseudoLabelGenerator, background_aware_pooling
from bapnal.boxes import box_cells
from bapnal.label.files import whole, write_json
from bapnal_recipes.data.label_maps import VOID, read_label_map, write_label_map
from bapnal_recipes.data.metrics import SegmentationScore
from bapnal_recipes.data.voc import VOC_CLASSES, Devkit, default_root
from bapnal_recipes.engine.runs import Meter, result, summary
from bapnal_recipes.engine.training import (
    Machines,
    MachinesOption,
    Together,
    launch,
    plain,
    run,
    total,
)
from bapnal_recipes.models.backbones import ALIGNED
from bapnal_recipes.voc2012.baselines import box_crf, grab_cut, stack_masks
from bapnal_recipes.voc2012.generate_labels import CrfSettings, GeneratorSettings, make_crf
from bapnal_recipes.voc2012.train_classifier import load_classifier
from bapnal_recipes.voc2012.train_segmentation import load_segmenter

MODES = ("single", "single+crf", "multi", "multi+crf")
Mode = Literal["single", "single+crf", "multi", "multi+crf"]
Kind = Literal["crf", "ret", "labels"]
# The CRFs that the papers of the two networks put on top: bilateral weight, its width over
# positions and over colours, Gaussian weight and width.
CRFS = {"deeplab_v1": (4, 121, 5, 3, 3), "deeplab_v2": (4, 67, 3, 3, 1)}


@dataclass(frozen=True)
class Labels:
    """Measure pixel labels: mIoU, IoU of each class, and the share of pixels that have a label.

    Args:
        folder: Where generate_labels.py wrote; holds ``crf`` and ``ret``, or ``labels``.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images.
        classes: Names of the classes 1..L.
        score_classes: Which classes to average over, 0 for the background; none for all.
    """

    folder: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "train"
    classes: tuple[str, ...] = VOC_CLASSES
    score_classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segmentation:
    """Measure a segmentation network, and write its predictions.

    Args:
        segmenter: The ``segmenter.pt`` of train_segmentation.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; without masks, as in the official test split, nothing is measured.
        modes: One scale or several, each with or without a CRF, all in one pass.
        scales: Of the image, in the modes that begin with "multi"; each also mirrored.
        crf: Bilateral weight, its width over positions and over colours, Gaussian weight and width;
            by default 4 67 3 3 1 for deeplab_v2 and 4 121 5 3 3 for every other network.
        iterations: Mean-field steps of the CRF.
        half_resolution: A faster, approximate CRF.
        score_classes: Which classes to average over, 0 for the background; none for all.
        predictions: Folder for the predictions, ``MODE/NAME.png``.
        archive: File for the test server, such as results.tgz, of the last of the modes; needs
            ``predictions``.
        competition: What the server calls it: comp5 trains on VOC data alone, comp6 on others too.
        machines: Where it runs; images are shared out among the devices.
    """

    segmenter: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "val"
    modes: tuple[Mode, ...] = MODES
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)
    crf: tuple[float, float, float, float, float] | None = None
    iterations: int = 10
    half_resolution: bool = False
    score_classes: tuple[int, ...] = ()
    predictions: Path | None = None
    archive: Path | None = None
    competition: Literal["comp5", "comp6"] = "comp6"
    machines: MachinesOption = field(default_factory=Machines)


@dataclass(frozen=True)
class Cams:
    """Measure class activation maps (suppl. Table 2): the precision of what they activate.

    A pixel is activated for a class that the image shows where the map of Eq. 5, which is 0
    outside the boxes of the class, is above a threshold. Right is what lies in the true mask of the
    class; pixels without a truth do not count.

    Args:
        classifier: The ``classifier.pt`` of train_classifier.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; the paper's are "train".
        threshold: Above which a pixel is activated, as a share of the maximum. The paper does not
            say which it takes, so numbers compare between classifiers, not with the paper's.
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
    cam_normalization: Literal["class", "box"] = "class"
    align_corners: bool | None = None
    score_classes: tuple[int, ...] = ()
    machines: MachinesOption = field(default_factory=Machines)


@dataclass(frozen=True)
class Boxes:
    """Measure the classifier on true boxes: how many it names right, out of the object classes.

    Args:
        classifier: The ``classifier.pt`` of train_classifier.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; the paper's are "val".
        background: Pool what is likely object in the box (Eq. 4) instead of the whole box.
        grid_size: N of the grid of the background's prototypes, with ``background``.
        score_classes: Boxes of which classes count, of 1..L; none for all.
        machines: Where it runs.
    """

    classifier: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "val"
    background: bool = False
    grid_size: int = 4
    score_classes: tuple[int, ...] = ()
    machines: MachinesOption = field(default_factory=Machines)


@dataclass(frozen=True)
class Filling:
    """List filling rates (Fig. 4b): the share of each box that its own class fills.

    Pixels without a truth do not count, neither for the labels nor for the truth.

    Args:
        folder: Where generate_labels.py wrote.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images.
        kind: Which of its label maps; by default ``crf`` where it is, otherwise ``labels``.
        classes: Names of the classes 1..L.
        score_classes: Boxes of which classes count, of 1..L; none for all.
    """

    folder: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "train"
    kind: Kind | None = None
    classes: tuple[str, ...] = VOC_CLASSES
    score_classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Runtime:
    """Time how long labels take an image (suppl. Table 4).

    Args:
        classifier: The ``classifier.pt`` of train_classifier.py.
        out: Result file.
        root: The devkit, by default ``$BAPNAL_VOC_ROOT`` where set.
        split: Which images; the paper's are "val".
        pictures: How many of those with boxes are timed.
        warm_up: How many are worked on before, untimed.
        generator: Settings of the labels.
        crf: Settings of the CRF.
        rivals: Which other ways to labels are timed too.
        machines: Where it runs; one device.
    """

    classifier: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "val"
    pictures: int = 20
    warm_up: int = 2
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    crf: CrfSettings = field(default_factory=CrfSettings)
    rivals: tuple[Literal["grabcut", "wssl"], ...] = ("grabcut", "wssl")
    machines: MachinesOption = field(default_factory=Machines)


Settings = (
    Annotated[Labels, tyro.conf.subcommand("labels")]
    | Annotated[Segmentation, tyro.conf.subcommand("segmentation")]
    | Annotated[Cams, tyro.conf.subcommand("cams")]
    | Annotated[Boxes, tyro.conf.subcommand("boxes")]
    | Annotated[Filling, tyro.conf.subcommand("filling")]
    | Annotated[Runtime, tyro.conf.subcommand("runtime")]
)


def main(settings: Settings) -> dict:
    """Measure, and write the result to ``settings.out`` too.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting or the content of a file does not fit.
    """
    if settings.out.is_dir():
        raise ValueError(f"out must be a file such as result.json, got the folder {settings.out}")
    return EVALUATIONS[type(settings)](settings)


# Pixel labels and segmentation networks


def evaluate_labels(settings: Labels) -> dict:
    """Measure label maps against true masks; see :class:`Labels`.

    The scores have an entry for each kind of label map: ``miou``, ``per_class`` (None for classes
    that occur nowhere), ``coverage``, and where labels do not cover everything ``miou_strict``,
    for which pixels without a label count as wrong.
    """
    devkit = Devkit(settings.root, settings.classes)
    names = devkit.names(settings.split)
    chosen = _score_classes(settings.score_classes, devkit.classes, first=0)
    found = subject(settings.folder)
    left_out = set(found.get("scores", {}).get("skipped", ()))
    kinds = [kind for kind in ("crf", "ret", "labels") if (settings.folder / kind).is_dir()]
    if not kinds:
        raise FileNotFoundError(f"{settings.folder} must hold folders crf and ret, or labels")
    tallies = {kind: _Tally(devkit.classes, chosen) for kind in kinds}
    if {"crf", "ret"} <= set(kinds):
        tallies["both"] = _Tally(devkit.classes, chosen)
    measured = [name for name in names if name not in left_out]
    with Meter() as meter:
        for name in _bar(measured, "labels"):
            truth = devkit.mask(name, devkit.size(name))
            maps = {
                kind: _labels_of(settings.folder / kind, name, truth, len(devkit.classes))
                for kind in kinds
            }
            if "both" in tallies:
                maps["both"] = maps["crf"].masked_fill(maps["crf"] != maps["ret"], VOID)
            for kind, labels in maps.items():
                tallies[kind].score.update(labels, truth)
    scores: dict[str, object] = {kind: tally.compute() for kind, tally in tallies.items()}
    scores |= {"pictures": len(measured), "left_out": len(names) - len(measured)}
    return _write(settings, found, scores, meter)


class _Tally:
    """mIoU from one confusion matrix, as the result files have it.

    Args:
        classes: Names of the classes 1..L.
        chosen: Which classes to average over.
    """

    def __init__(self, classes: Sequence[str], chosen: Sequence[int]) -> None:
        self.names = ("background", *classes)
        self.score = SegmentationScore(len(self.names), chosen)

    def compute(self, fabric: Fabric | None = None) -> dict[str, object]:
        """Return the scores in percent, over all processes."""
        if fabric is not None:
            self.score.add_up(partial(total, fabric))
        found = self.score.compute()
        per_class = zip(self.names, found.per_class.tolist(), strict=True)
        scores: dict[str, object] = {
            "miou": _percent(found.miou),
            "per_class": {name: _percent(value) for name, value in per_class},
            "coverage": _percent(found.coverage),
        }
        if found.coverage < 1:
            scores["miou_strict"] = _percent(found.strict_miou)
        return scores


def evaluate_segmentation(settings: Segmentation) -> dict:
    """Measure predictions against true masks, and write them; see :class:`Segmentation`.

    The scores have ``miou`` and ``per_class`` for each mode; they are empty for a split without
    masks.
    """
    if not settings.modes:
        raise ValueError(f"modes must name at least one of {', '.join(MODES)}, got none")
    if not settings.scales or min(settings.scales) <= 0:
        raise ValueError(f"scales must be positive numbers, got {settings.scales}")
    if settings.archive is not None and settings.predictions is None:
        raise ValueError("archive needs predictions, the folder that it is made from, got none")
    network, classes, trained = load_segmenter(settings.segmenter)
    devkit = Devkit(settings.root, classes)
    names = devkit.names(settings.split)
    chosen = _score_classes(settings.score_classes, classes, first=0)
    scored = any(devkit.has_mask(name) for name in names)
    if not scored and settings.predictions is None:
        raise ValueError(
            f"predictions must be given for the split {settings.split}, which has no masks to "
            "measure with, got none"
        )
    weights = settings.crf or CRFS.get(str(trained.get("network")), CRFS["deeplab_v1"])
    crf = DenseCRF(
        *weights, iterations=settings.iterations, half_resolution=settings.half_resolution
    )
    fabric = launch(settings.machines)
    network = network.to(fabric.device).eval()
    if trained.get("channels_last"):
        network = network.to(memory_format=torch.channels_last)
    predict = Predictor(
        network,
        settings.modes,
        settings.scales,
        crf,
        align_corners=bool(trained.get("align_corners", False)),
        fabric=fabric,
    )
    tallies = {mode: _Tally(classes, chosen) for mode in settings.modes}
    together = Together(fabric)
    with Meter() as meter, together.alike():
        for name in _shared_out(names, fabric, "segmentation"):
            image = devkit.image(name)
            truth = devkit.mask(name, (image.shape[1], image.shape[2])) if scored else None
            found = predict(image[None].to(fabric.device))
            for mode, labels in found.items():
                if scored:
                    tallies[mode].score.update(labels, truth)
                if settings.predictions is not None:
                    write_label_map(settings.predictions / mode / f"{name}.png", labels)
    scores = {mode: tally.compute(fabric) for mode, tally in tallies.items() if scored}
    results = f"{settings.competition}_{settings.split}"
    with together.alike():
        if settings.archive is not None and together.rank == 0:
            folder = settings.predictions / settings.modes[-1]
            write_archive(settings.archive, folder, names, results)
    more = {"pictures": len(names), "crf": list(weights)}
    return _write(settings, subject(settings.segmenter.parent), scores, meter, together, **more)


class Predictor:
    """The class of every pixel of an image, in several modes that share what they can.

    Cosines are averaged over scales and mirror images before the temperature; of a network with a
    classifier by dot products, the logits.

    Args:
        network: Gives logits and cosines.
        modes: Of :data:`MODES`.
        scales: Of the image, where there are several.
        crf: On top, in the modes that have one.
        align_corners: How scores are upsampled.
        fabric: For its precision; None for float32.
    """

    def __init__(
        self,
        network: nn.Module,
        modes: Sequence[str],
        scales: Sequence[float],
        crf: DenseCRF,
        *,
        align_corners: bool = False,
        fabric: Fabric | None = None,
    ) -> None:
        self.network = network
        self.modes = tuple(modes)
        self.scales = tuple(scales)
        self.crf = crf
        self.align_corners = align_corners
        self.fabric = fabric
        self.cosine = isinstance(network.classifier, CosineClassifier)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the labels ``(H, W)`` of one image ``(1, 3, H, W)`` for each mode."""
        means: dict[str, Tensor] = {}
        bases = [mode.removesuffix("+crf") for mode in self.modes]
        if "single" in bases or 1.0 in self.scales:
            means["single"] = self.scores(images, 1.0, False)
        if "multi" in bases:
            views = list(product(self.scales, (False, True)))
            parts = (
                means["single"] if view == (1.0, False) else self.scores(images, *view)
                for view in views
            )
            means["multi"] = sum(parts) / len(views)
        found = {}
        for mode, base in zip(self.modes, bases, strict=True):
            logits = means[base] * self.network.classifier.scale if self.cosine else means[base]
            if mode != base:
                logits = self.crf(images, logits.softmax(1))
            found[mode] = logits.argmax(1)[0]
        return found

    def scores(self, images: Tensor, scale: float, mirrored: bool) -> Tensor:
        """Return the cosines, or the logits, at the size of the image; ``(1, C, H, W)``."""
        size = [images.shape[2], images.shape[3]]
        resized = images
        if scale != 1:
            resized = transforms.resize(images, [max(1, round(side * scale)) for side in size])
        context = torch.no_grad() if self.fabric is None else self.fabric.autocast()
        with context:
            logits, similarity = self.network(resized.flip(3) if mirrored else resized)
        maps = (similarity if self.cosine else logits).float()
        maps = maps.flip(3) if mirrored else maps
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=self.align_corners)


def write_archive(path: Path, folder: Path, names: Sequence[str], results: str) -> None:
    """Pack predictions for the test server, whole or not at all.

    Args:
        path: The archive, gzipped tar.
        folder: Holds ``NAME.png``.
        names: Of the images.
        results: What the server calls it, such as ``comp6_test``.
    """
    with whole(path) as unfinished, tarfile.open(unfinished, "w:gz") as archive:
        for name in names:
            inside = f"results/VOC2012/Segmentation/{results}_cls/{name}.png"
            archive.add(folder / f"{name}.png", inside)


# Classifiers


@torch.inference_mode()
def evaluate_cams(settings: Cams) -> dict:
    """Measure the precision of class activation maps; see :class:`Cams`.

    The scores are ``precision`` and ``recall``, each with ``mean`` and ``per_class`` (None for
    classes of which nothing is activated, or which no image holds).
    """
    if not 0 <= settings.threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {settings.threshold}")
    classifier = load_classifier(settings.classifier)
    devkit = Devkit(settings.root, classifier.classes)
    names = devkit.names(settings.split)
    chosen = _score_classes(settings.score_classes, devkit.classes, first=1)
    fabric = launch(settings.machines)
    features = classifier.features.to(fabric.device).eval()
    weight = classifier.weight.to(fabric.device)
    aligned = settings.align_corners
    if aligned is None:
        aligned = classifier.settings.get("backbone") in ALIGNED
    generate = PseudoLabelGenerator(
        crf=None, cam_normalization=settings.cam_normalization, align_corners=aligned
    )
    counts = torch.zeros(3, len(devkit.classes) + 1, dtype=torch.long)
    together = Together(fabric)
    with Meter() as meter, together.alike():
        for name in _shared_out(names, fabric, "cams"):
            image, annotation = devkit.annotated(name)
            truth = devkit.mask(name, (image.shape[1], image.shape[2]))
            image = image[None].to(fabric.device)
            boxes, labels = [annotation.boxes.to(fabric.device)], [annotation.labels]
            y = generate(image, features(image), weight, boxes, [labels[0].to(fabric.device)])
            for label, u_c in zip(y.classes[0].tolist(), y.foreground_unary[0].cpu(), strict=True):
                counts[:, label] += activated(u_c, truth, label, settings.threshold)
    hits, positives, true = total(fabric, counts).double()
    scores = {
        "precision": _mean_and_each(hits / positives, devkit.classes, chosen),
        "recall": _mean_and_each(hits / true, devkit.classes, chosen),
    }
    return _write(settings, subject(settings.classifier.parent), scores, meter, together)


def activated(u_c: Tensor, truth: Tensor, label: int, threshold: float) -> Tensor:
    """Count pixels: activated and of the class, activated, and of the class; ``(3,)``.

    Args:
        u_c: Normalised class activation map (Eq. 5); ``(H, W)``.
        truth: True classes, 255 where there is none; ``(H, W)``.
        label: The class.
        threshold: Above which a pixel is activated.
    """
    active = (u_c > threshold) & (truth != VOID)
    own = truth == label
    return torch.stack([(active & own).sum(), active.sum(), own.sum()])


@torch.inference_mode()
def evaluate_boxes(settings: Boxes) -> dict:
    """Measure how many true boxes the classifier names right; see :class:`Boxes`.

    The scores are ``accuracy`` over all boxes, ``per_class``, and the number of ``boxes``.
    """
    classifier = load_classifier(settings.classifier)
    devkit = Devkit(settings.root, classifier.classes)
    names = devkit.names(settings.split)
    chosen = _score_classes(settings.score_classes, devkit.classes, first=1)
    fabric = launch(settings.machines)
    features = classifier.features.to(fabric.device).eval()
    weight = classifier.weight.to(fabric.device)
    counts = torch.zeros(2, len(devkit.classes) + 1, dtype=torch.long)
    together = Together(fabric)
    with Meter() as meter, together.alike():
        for name in _shared_out(names, fabric, "boxes"):
            image, annotation = devkit.annotated(name)
            boxes = [annotation.boxes.to(fabric.device)]
            pooled = background_aware_pooling(
                features(image[None].to(fabric.device)),
                boxes,
                tuple(image.shape[1:]),
                grid_size=settings.grid_size,
                attention=settings.background,
                sampling=classifier.settings.get("sampling", "cells"),
            )
            named = (pooled.foreground[:, 0] @ weight[1:].mT).argmax(1).cpu() + 1
            right = annotation.labels[named == annotation.labels]
            for row, entries in zip(counts, (right, annotation.labels), strict=True):
                row += entries.bincount(minlength=len(row))
    counts = total(fabric, counts)
    hits, all_boxes = counts[:, chosen].sum(1).tolist()
    if all_boxes == 0:
        raise ValueError(f"the split {settings.split} must hold boxes that count, has none")
    per_class = (counts[0] / counts[1])[1:].tolist()
    scores = {
        "accuracy": _percent(hits / all_boxes),
        "per_class": dict(zip(devkit.classes, map(_percent, per_class), strict=True)),
        "boxes": all_boxes,
    }
    return _write(settings, subject(settings.classifier.parent), scores, meter, together)


def evaluate_filling(settings: Filling) -> dict:
    """List the filling rates of all boxes; see :class:`Filling`.

    The scores have, under ``per_class``, the ``labels`` and the ``truth`` of each class: lists of
    shares in [0, 1], one per box in the same order. ``mean`` has their means over all boxes, and
    ``difference`` the mean absolute difference between the two.
    """
    devkit = Devkit(settings.root, settings.classes)
    names = devkit.names(settings.split)
    chosen = _score_classes(settings.score_classes, devkit.classes, first=1)
    found = subject(settings.folder)
    left_out = set(found.get("scores", {}).get("skipped", ()))
    kind = settings.kind or ("crf" if (settings.folder / "crf").is_dir() else "labels")
    if not (settings.folder / kind).is_dir():
        raise FileNotFoundError(f"{settings.folder} must hold a folder {kind}, has none")
    rates = {i: ([], []) for i in chosen}
    with Meter() as meter:
        for name in _bar([x for x in names if x not in left_out], "filling"):
            size = devkit.size(name)
            annotation = devkit.inside(name, devkit.annotation(name), size)
            truth = devkit.mask(name, size)
            labels = _labels_of(settings.folder / kind, name, truth, len(devkit.classes))
            for box, label in zip(annotation.boxes, annotation.labels.tolist(), strict=True):
                own = (
                    filling_rate(labels, box, label, truth),
                    filling_rate(truth, box, label, truth),
                )
                if label in rates and None not in own:
                    for known, rate in zip(rates[label], own, strict=True):
                        known.append(rate)
    pairs = [pair for lists in rates.values() for pair in zip(*lists, strict=True)]
    if not pairs:
        raise ValueError(f"the split {settings.split} must hold boxes that count, has none")
    scores = {
        "per_class": {
            devkit.classes[i - 1]: {"labels": labels, "truth": true}
            for i, (labels, true) in rates.items()
        },
        "mean": {
            "labels": sum(pair[0] for pair in pairs) / len(pairs),
            "truth": sum(pair[1] for pair in pairs) / len(pairs),
        },
        "difference": sum(abs(one - other) for one, other in pairs) / len(pairs),
        "kind": kind,
    }
    return _write(settings, found, scores, meter)


def filling_rate(labels: Tensor, box: Tensor, label: int, truth: Tensor) -> float | None:
    """Return which share of a box its class fills, of the pixels that have a truth.

    Args:
        labels: A label map; ``(H, W)``.
        box: ``(4,)``.
        label: Class of the box.
        truth: True classes, 255 where there is none; ``(H, W)``.

    Returns:
        The share in [0, 1], or None where no pixel of the box has a truth.
    """
    size = (truth.shape[0], truth.shape[1])
    counted = box_cells(box, size, size) & (truth != VOID)
    return round(float((labels[counted] == label).double().mean()), 5) if counted.any() else None


# Time


@torch.inference_mode()
def evaluate_runtime(settings: Runtime) -> dict:
    """Time each part of label generation; see :class:`Runtime`.

    The scores are seconds per image, the mean over the images: ``features``, ``unaries``,
    ``crf``, ``retrieval``, their sum ``total``, ``labels`` (all but the features) and the
    baselines.
    ``quartiles`` has the first and the third of each, ``pictures`` how many were timed.
    """
    if settings.pictures < 1 or settings.warm_up < 0:
        raise ValueError(
            "pictures must be at least 1 and warm_up at least 0, got "
            f"{settings.pictures} and {settings.warm_up}"
        )
    classifier = load_classifier(settings.classifier)
    devkit = Devkit(settings.root, classifier.classes)
    names = devkit.names(settings.split)
    fabric = launch(settings.machines)
    if fabric.world_size > 1:
        raise ValueError(f"devices must be 1, got {fabric.world_size}")
    device = fabric.device
    stopwatch = _Stopwatch(device)
    crf = make_crf(settings.crf)
    generate = PseudoLabelGenerator(stopwatch.around(crf), **asdict(settings.generator))
    features = classifier.features.to(device).eval()
    weight = classifier.weight.to(device)
    rows: list[dict[str, float]] = []
    with Meter() as meter:
        for name in _bar(_with_boxes(devkit, names, settings), "runtime"):
            image, annotation = devkit.annotated(name)
            stopwatch.start()
            images = image[None].to(device)
            boxes, labels = [annotation.boxes.to(device)], [annotation.labels.to(device)]
            with fabric.autocast():
                found = features(images)
            stopwatch.stop("features")
            generate(images, found, weight, boxes, labels)
            stopwatch.stop("retrieval")
            for baseline in settings.rivals:
                RIVALS[baseline](images[0], annotation.boxes, annotation.labels, crf)
                stopwatch.stop(baseline)
            rows.append(stopwatch.seconds)
    timed = rows[-settings.pictures :]
    own = ("unaries", "crf", "retrieval")
    for row in timed:
        row["labels"] = sum(row[part] for part in own)
        row["total"] = row["features"] + row["labels"]
    columns = {part: torch.tensor([row[part] for row in timed]) for part in timed[0]}
    quarters = torch.tensor([0.25, 0.75])
    scores = {part: round(float(column.mean()), 5) for part, column in columns.items()}
    scores["quartiles"] = {
        part: [round(x, 5) for x in column.quantile(quarters).tolist()]
        for part, column in columns.items()
    }
    scores["pictures"] = len(timed)
    return _write(settings, subject(settings.classifier.parent), scores, meter)


class _Stopwatch:
    """Seconds of parts that follow one another, on whatever device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Begin with a new image."""
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def stop(self, part: str) -> None:
        """A part has ended, the next one begins."""
        now = self._now()
        self.seconds[part] = now - self._last
        self._last = now

    def around(self, crf: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        """Return a CRF whose call ends the unaries, and whose return ends the CRF."""

        def timed(images: Tensor, probabilities: Tensor) -> Tensor:
            self.stop("unaries")
            marginals = probabilities if crf is None else crf(images, probabilities)
            self.stop("crf")
            return marginals

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _with_boxes(devkit: Devkit, names: Sequence[str], settings: Runtime) -> list[str]:
    """Images with at least one box: those to warm up with, then those to time."""
    found = []
    for name in names:
        if len(devkit.annotation(name).labels):
            found.append(name)
        if len(found) == settings.pictures:
            return found[: settings.warm_up] + found
    raise ValueError(
        f"pictures must be at most {len(found)}, the number with boxes in the split "
        f"{settings.split}, got {settings.pictures}"
    )


def _grab_cut(image: Tensor, boxes: Tensor, labels: Tensor, _: DenseCRF | None) -> Tensor:
    image = image.cpu()
    masks = [grab_cut(image, box) for box in boxes]
    return stack_masks(masks, boxes, labels, tuple(image.shape[1:]))


RIVALS = {"grabcut": _grab_cut, "wssl": box_crf}


# What all of them share


def subject(folder: Path) -> dict:
    """Return what the result file in a folder says of what was made there.

    Returns:
        The file's entries; none where there is no such file, as with labels made elsewhere.
    """
    path = folder / "result.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a result file: {error}") from error


def _write(
    settings: Settings,
    made: dict,
    scores: dict,
    meter: Meter,
    together: Together | None = None,
    **more: object,
) -> dict:
    """Put the result together, write it and print the numbers that stand for all others; once."""
    found = result(
        "evaluation",
        plain(settings),
        scores,
        meter,
        what=EVALUATIONS[type(settings)].__name__.removeprefix("evaluate_"),
        split=settings.split,
        inputs={made["kind"]: summary(made)} if "kind" in made else {},
        **more,
    )
    first = together is None or together.rank == 0
    with nullcontext() if together is None else together.alike():
        if first:
            write_json(settings.out, found)
    if first:
        for name, value in found["scores"].items():
            if isinstance(value, dict):  # of a label map, a mode, or the mean over classes
                value = value.get("miou", value.get("mean"))
            if isinstance(value, (int, float)):
                rich.print(f"{name}: {value:g}")
        rich.print(f"see {settings.out}")
    return found


def _score_classes(chosen: Sequence[int], classes: Sequence[str], *, first: int) -> list[int]:
    """Which classes count; all from ``first`` on by default."""
    every = range(first, len(classes) + 1)
    for index in chosen:
        if index not in every:
            raise ValueError(f"score_classes must be in {first}..{len(classes)}, got {index}")
    return list(chosen) or list(every)


def _labels_of(folder: Path, name: str, truth: Tensor, num_classes: int) -> Tensor:
    """Read a label map that must fit its true mask."""
    path = folder / f"{name}.png"
    labels = read_label_map(path)
    if labels.shape != truth.shape:
        raise ValueError(f"{path} must have size {tuple(truth.shape)}, got {tuple(labels.shape)}")
    largest = int(labels.masked_fill(labels == VOID, 0).max())
    if largest > num_classes:
        raise ValueError(f"{path} must hold 0..{num_classes} or {VOID}, got {largest}")
    return labels


def _shared_out(names: Sequence[str], fabric: Fabric, title: str) -> Iterable[str]:
    """This process's share of the images, with a progress bar on the first."""
    mine = names[fabric.global_rank :: fabric.world_size]
    return _bar(mine, title, hidden=not fabric.is_global_zero)


def _bar(names: Sequence[str], title: str, *, hidden: bool = False) -> Iterable[str]:
    return track(names, title, console=Console(stderr=True), transient=True, disable=hidden)


def _percent(share: float) -> float | None:
    """Return a share in percent, None for 0/0."""
    return None if math.isnan(share) else round(100 * share, 3)


def _mean_and_each(
    shares: Tensor, classes: Sequence[str], chosen: Sequence[int]
) -> dict[str, object]:
    """Mean over the chosen classes that occur, and each class from 1 on."""
    return {
        "mean": _percent(float(shares[chosen].nanmean())),
        "per_class": dict(zip(classes, map(_percent, shares[1:].tolist()), strict=True)),
    }


EVALUATIONS: dict[type, Callable[..., dict]] = {
    Labels: evaluate_labels,
    Segmentation: evaluate_segmentation,
    Cams: evaluate_cams,
    Boxes: evaluate_boxes,
    Filling: evaluate_filling,
    Runtime: evaluate_runtime,
}


if __name__ == "__main__":
    run(main, tyro.cli(Settings, description=__doc__))
