"""Segmentation networks, and archives for the test server."""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from bapnal import CosineClassifier, DenseCRF
from bapnal.label.files import whole
from bapnal_recipes.data.label_maps import write_label_map
from bapnal_recipes.data.voc import Devkit, default_root
from bapnal_recipes.engine.machines import Machines, MachinesOption, Together, launch
from bapnal_recipes.engine.runs import Meter
from bapnal_recipes.models.deeplab import Segmenter
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012.evaluate.common import (
    Tally,
    score_classes,
    shared_out,
    subject,
    without,
    write,
)

Mode = Literal["single", "single+crf", "multi", "multi+crf"]
MODES: tuple[Mode, ...] = ("single", "single+crf", "multi", "multi+crf")
# CRFs of the papers of the two networks: bilateral weight, its width over
# positions and over colours, Gaussian weight and width.
CrfWeights = tuple[float, float, float, float, float]
CRFS: dict[str, CrfWeights] = {"deeplab_v1": (4, 121, 5, 3, 3), "deeplab_v2": (4, 67, 3, 3, 1)}


@dataclass(frozen=True)
class EvaluateSegmentation:
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
        exclude: List of images to leave out, such as the images.txt of search.py.
        machines: Where it runs; images are divided among the devices.
    """

    segmenter: Path
    out: Path
    root: Path = field(default_factory=default_root)
    split: str = "val"
    modes: tuple[Mode, ...] = MODES
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)
    crf: CrfWeights | None = None
    iterations: int = 10
    half_resolution: bool = False
    score_classes: tuple[int, ...] = ()
    predictions: Path | None = None
    archive: Path | None = None
    competition: Literal["comp5", "comp6"] = "comp6"
    exclude: Path | None = None
    machines: MachinesOption = field(default_factory=Machines)


def evaluate_segmentation(settings: EvaluateSegmentation) -> dict[str, Any]:
    """Measure predictions against ground truth, and write them; see :class:`EvaluateSegmentation`.

    The scores have ``miou`` and ``per_class`` for each mode; they are empty for a split without
    masks.
    """
    _check(settings)
    network, classes, trained = load_segmenter(settings.segmenter)
    devkit = Devkit(settings.root, classes)
    every = devkit.names(settings.split)
    names = without(every, settings.exclude, settings.split)
    chosen = score_classes(settings.score_classes, classes, first=0)
    scored = any(devkit.has_mask(name) for name in names)
    if not scored and settings.predictions is None:
        raise ValueError(
            f"predictions must be given for the split {settings.split}, which has no masks to "
            "measure with, got none"
        )
    fabric = launch(settings.machines)
    predict = _predictor(settings, network, trained, fabric)
    tallies = {mode: Tally(classes, chosen) for mode in settings.modes}
    together = Together(fabric)
    with Meter() as meter, together.alike():
        for name in shared_out(names, fabric, "segmentation"):
            image = devkit.image(name)
            found = predict(image[None].to(fabric.device))
            if scored:
                truth = devkit.mask(name, (image.shape[1], image.shape[2]))
                for mode, tally in tallies.items():
                    tally.score.update(found[mode], truth)
            if settings.predictions is not None:
                for folder, labels in found.items():
                    write_label_map(settings.predictions / folder / f"{name}.png", labels)
    scores = {str(mode): tally.compute(fabric) for mode, tally in tallies.items() if scored}
    with together.alike():
        if settings.archive and settings.predictions and together.rank == 0:
            last = settings.predictions / settings.modes[-1]
            results = f"{settings.competition}_{settings.split}"
            write_archive(settings.archive, last, names, results)
    made, crf = subject(settings.segmenter.parent), list(_crf_weights(settings, trained))
    more = {"excluded": len(every) - len(names), "crf": crf}
    return write("segmentation", settings, made, scores, meter, together, **more)


def _check(settings: EvaluateSegmentation) -> None:
    if not settings.modes:
        raise ValueError(f"modes must name at least one of {', '.join(MODES)}, got none")
    if not settings.scales or min(settings.scales) <= 0:
        raise ValueError(f"scales must be positive numbers, got {settings.scales}")
    if settings.archive is not None and settings.predictions is None:
        raise ValueError("archive needs predictions, the folder that it is made from, got none")


def _crf_weights(settings: EvaluateSegmentation, trained: dict[str, Any]) -> CrfWeights:
    """Those asked for, or those of the network's paper."""
    return settings.crf or CRFS.get(str(trained.get("network")), CRFS["deeplab_v1"])


def _predictor(
    settings: EvaluateSegmentation, network: Segmenter, trained: dict[str, Any], fabric: Fabric
) -> Predictor:
    weight, xy, rgb, gaussian_weight, gaussian_xy = _crf_weights(settings, trained)
    crf = DenseCRF(
        weight,
        xy,
        rgb,
        gaussian_weight,
        gaussian_xy,
        iterations=settings.iterations,
        half_resolution=settings.half_resolution,
    )
    network = network.to(fabric.device).eval()
    if trained.get("channels_last"):
        network = network.to(memory_format=torch.channels_last)
    return Predictor(
        network,
        settings.modes,
        settings.scales,
        crf,
        align_corners=bool(trained.get("align_corners", False)),
        fabric=fabric,
    )


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
        network: Segmenter,
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
        classifier = network.classifier
        self.scale = classifier.scale if isinstance(classifier, CosineClassifier) else None

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
            means["multi"] = functools.reduce(torch.add, parts) / len(views)
        found = {}
        for mode, base in zip(self.modes, bases, strict=True):
            logits = means[base] if self.scale is None else means[base] * self.scale
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
        maps = (logits if self.scale is None else similarity).float()
        maps = maps.flip(3) if mirrored else maps
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=self.align_corners)


def write_archive(path: Path, folder: Path, names: Sequence[str], results: str) -> None:
    """Write the archive of predictions for the test server, atomically.

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
