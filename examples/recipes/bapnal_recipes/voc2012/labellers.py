"""From one image with its boxes to label maps, by every method of generate_labels.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from bapnal import DenseCRF, paint_boxes
from bapnal_recipes.data.dataset import Sample
from bapnal_recipes.data.images import image_head
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine.labelling import Clock
from bapnal_recipes.models import baselines
from bapnal_recipes.models.classifier import load_classifier, untrained_features
from bapnal_recipes.models.generator import make_crf, make_generator

if TYPE_CHECKING:
    from bapnal_recipes.voc2012.generate_labels import Settings

CLASSIFIER = "classifier.pt"  # that "ridge" keeps beside its labels
TWO_MAPS = ("network", "ridge", "agnostic")  # the methods that give Y_crf and Y_ret
LabelMaps = dict[str, Tensor | dict[str, np.ndarray]]
Labeller = Callable[[Sample, Clock], LabelMaps]


def check_folders(settings: Settings, devkit: Devkit, names: list[str]) -> None:
    """Check for proposals or masks of every image, where the method needs them.

    Raises:
        FileNotFoundError: If some are missing.
        ValueError: If no folder is given, or a mask has another size than its image.
    """
    if settings.method in ("mcg", "sdi"):
        folder = _folder("proposals", settings.proposals, settings.method)
        lacking = [name for name in names if not (folder / f"{name}.mat").is_file()]
        _complain("proposals", f"{folder} must hold NAME.mat", lacking, names)
    if settings.method == "masks":
        _check_masks(settings, _folder("masks", settings.masks, "masks"), devkit, names)


def _folder(argument: str, folder: Path | None, method: str) -> Path:
    if folder is None:
        raise ValueError(f'{argument} must be a folder where method is "{method}", got none')
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} {folder} does not exist")
    return folder


def _complain(argument: str, must: str, lacking: list[str], names: list[str]) -> None:
    if lacking:
        some = ", ".join(lacking[:5]) + ", ..." * (len(lacking) > 5)
        raise FileNotFoundError(
            f"{argument} {must} for every image, {len(lacking)} of {len(names)} are missing: {some}"
        )


def _check_masks(settings: Settings, folder: Path, devkit: Devkit, names: list[str]) -> None:
    """Check that masks are there and as large as their images, without decoding any."""
    lacking = []
    for name in names:
        try:
            numbers = _numbers(settings, devkit, name)
            size, _ = image_head(devkit.image_path(name))
        except (ValueError, OSError):
            continue  # a broken image is skipped later
        try:
            for path in baselines.mask_files(folder, name, numbers):
                found, _ = image_head(path)
                if found != size:
                    raise ValueError(
                        f"masks {path} must have the size of its image, {size[0]} x {size[1]}, "
                        f"got {found[0]} x {found[1]}"
                    )
        except FileNotFoundError:
            lacking.append(name)
    _complain("masks", f"{folder} must hold NAME.png or NAME_0.png, ...,", lacking, names)


def make_labeller(settings: Settings, fabric: Fabric) -> Labeller:
    """Return what turns one image into its label maps, by the folders they go to."""
    if settings.method in TWO_MAPS:
        return _NetworkLabeller(settings, fabric)
    makers: dict[str, Callable[..., Tensor]] = {
        "box": _box,
        "grabcut": _grab_cut,
        "wssl": functools.partial(_wssl, crf=make_crf(settings.crf), device=fabric.device),
        "mcg": _mcg,
        "sdi": _sdi,
        "masks": functools.partial(_masks, devkit=Devkit(settings.root, settings.classes)),
    }
    maker = makers[settings.method]

    def label(sample: Sample, clock: Clock) -> LabelMaps:
        found = maker(settings, sample)
        clock("labels")
        return {"labels": found}

    return label


def _box(settings: Settings, sample: Sample) -> Tensor:
    return paint_boxes(sample.boxes, sample.labels, _shape(sample))


def _grab_cut(settings: Settings, sample: Sample) -> Tensor:
    cuts = _cuts(settings, sample)
    return baselines.stack_masks(cuts, sample.boxes, sample.labels, _shape(sample))


def _wssl(settings: Settings, sample: Sample, crf: DenseCRF | None, device: torch.device) -> Tensor:
    image = sample.image.to(device)
    return baselines.box_crf(image, sample.boxes, sample.labels, crf, centre=settings.centre)


def _mcg(settings: Settings, sample: Sample) -> Tensor:
    chosen = _chosen(settings, sample)
    return baselines.stack_masks(chosen, sample.boxes, sample.labels, _shape(sample))


def _sdi(settings: Settings, sample: Sample) -> Tensor:
    pairs = _chosen(settings, sample), _cuts(settings, sample)
    return baselines.stack_agreeing(*pairs, sample.boxes, sample.labels, _shape(sample))


def _masks(settings: Settings, sample: Sample, devkit: Devkit) -> Tensor:
    numbers = _numbers(settings, devkit, sample.name)
    assert settings.masks is not None  # was checked
    files = baselines.mask_files(settings.masks, sample.name, numbers)
    return baselines.read_masks(
        files, sample.name, sample.boxes, sample.labels, _shape(sample), len(devkit.classes)
    )


def _numbers(settings: Settings, devkit: Devkit, name: str) -> list[int]:
    """Which objects of an annotation count."""
    difficult = devkit.annotation(name).difficult.tolist()
    return [i for i, hard in enumerate(difficult) if settings.difficult or not hard]


def _cuts(settings: Settings, sample: Sample) -> list[Tensor]:
    return [
        baselines.grab_cut(sample.image, box, iterations=settings.rounds, seed=settings.seed)
        for box in sample.boxes
    ]


def _chosen(settings: Settings, sample: Sample) -> list[Tensor]:
    assert settings.proposals is not None  # was checked
    found = baselines.read_proposals(settings.proposals / f"{sample.name}.mat")
    return baselines.best_proposals(found, sample.boxes, _shape(sample))


def _shape(sample: Sample) -> tuple[int, int]:
    return sample.image.shape[1], sample.image.shape[2]


class _NetworkLabeller:
    """Labels from features: the methods "network" and "agnostic"."""

    def __init__(self, settings: Settings, fabric: Fabric) -> None:
        self.fabric = fabric
        self.unaries = settings.unaries
        self.generate = make_generator(settings.generator, settings.crf)
        self.weight: Tensor | None = None
        own = settings.method == "ridge"
        path = settings.out / CLASSIFIER if own else settings.classifier
        if path is None:
            features = untrained_features(settings.backbone, settings.weights, settings.stride)
        else:
            classifier = load_classifier(path)
            features = classifier.features
            if settings.method != "agnostic":
                self.weight = classifier.weight_of(settings.classes).to(fabric.device)
        self.features = features.eval().to(fabric.device)

    @torch.inference_mode()
    def __call__(self, sample: Sample, clock: Clock) -> LabelMaps:
        device = self.fabric.device
        images = sample.image[None].to(device)
        with self.fabric.autocast():
            features = self.features(images)
        _wait(device)
        clock("features")
        boxes, labels = [sample.boxes.to(device)], [sample.labels.to(device)]
        y = self.generate(images, features, self.weight, boxes, labels)
        crf, ret = y.crf[0].cpu(), y.retrieval[0].cpu()
        clock("labels")
        found: LabelMaps = {
            "crf": crf,
            "ret": ret,
            "reliable": crf.masked_fill(crf != ret, IGNORE_INDEX),
        }
        if self.unaries:
            found["unaries"] = {
                "background": y.background_unary[0].cpu().numpy().astype(np.float16),
                "foreground": y.foreground_unary[0].cpu().numpy().astype(np.float16),
                "classes": y.classes[0].cpu().numpy(),
            }
        return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
