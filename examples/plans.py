"""What differs between synthetic and real images in ``quickstart.py``: data, network, settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import shapes
import stages
from bapnal import DenseCRF, PseudoLabelGenerator
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.data.augmentation import Augmentation
from bapnal_recipes.data.dataset import BoxDataset
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.models.small import SmallFeatures

COMPARED = ("gap", "ignore", "truth")  # what --compare adds


@dataclass(frozen=True)
class Plan:
    """What differs between synthetic and real images."""

    devkit: Devkit
    train: list[str]
    val: list[str]
    classes: list[int]  # that count for the score, background included
    features: Callable[[], nn.Module]
    generator: PseudoLabelGenerator
    augment: Augmentation
    first: stages.Schedule
    third: stages.Schedule
    grid_size: int
    batch_size: int  # when nothing is trained
    keep: bool  # images in memory
    warm_start: bool  # stage 3 starts from the features of stage 1, as nothing is pretrained
    device: str
    compare: bool

    def rows(self, every: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return those of the rows of a table that are asked for."""
        return [row for row in every if self.compare or row[2] not in COMPARED]

    def dataset(self, names: Sequence[str], **options: object) -> BoxDataset:
        """Return some of the images as they are."""
        return BoxDataset(self.devkit, names, keep=False, **options)


def plan_shapes(
    root: Path, steps: int, crf_backend: str, device: str, compare: bool = False
) -> Plan:
    """Return the plan for synthetic images.

    The settings of the generator and the CRF were chosen on images of another seed than those
    that the scores are measured on.
    """
    devkit = Devkit(root, shapes.CLASSES)
    crf = DenseCRF(4, 30, 15, 3, 1, iterations=5, backend=crf_backend)
    side = devkit.image(devkit.names("train")[0]).shape[1]
    return Plan(
        devkit=devkit,
        train=devkit.names("train"),
        val=devkit.names("val"),
        classes=list(range(len(shapes.CLASSES) + 1)),
        features=lambda: SmallFeatures(64),
        generator=PseudoLabelGenerator(crf),
        augment=Augmentation(side * 6 // 7, scale=(0.8, 1.25), jitter=0),
        first=stages.Schedule(steps, batch_size=8, lr=3e-3, head_lr=3e-3),
        third=stages.Schedule(steps, batch_size=8, lr=3e-3, head_lr=3e-3),
        grid_size=2,  # 4 background vectors per image, about as many as boxes
        batch_size=20,
        keep=True,
        warm_start=True,
        device=device,
        compare=compare,
    )


def plan_devkit(
    root: Path,
    train_split: str,
    val_split: str,
    classes: Sequence[str],
    network: str,
    weights: str | None,
    steps: int,
    crf_backend: str,
    device: str,
    compare: bool = False,
) -> Plan:
    """Return the plan for real images in a VOC devkit and a pretrained backbone."""
    devkit = Devkit(root)
    unknown = [name for name in classes if name not in devkit.classes]
    if unknown:
        raise ValueError(
            f"classes must be among {', '.join(devkit.classes)}, got {', '.join(unknown)}"
        )
    chosen = classes or devkit.classes
    generator = PseudoLabelGenerator(DenseCRF(4, 55, 3, 3, 3, backend=crf_backend))
    workers = 0 if device == "cpu" else min(8, os.cpu_count() or 1)
    schedule = stages.Schedule(steps, lr=1e-3, head_lr=1e-2, optimizer="sgd", workers=workers)
    return Plan(
        devkit=devkit,
        train=devkit.names(train_split),
        val=devkit.names(val_split),
        classes=[0, *(devkit.classes.index(name) + 1 for name in chosen)],
        features=lambda: TimmFeatures(network, weights),
        generator=generator,
        augment=Augmentation(321),
        first=schedule,
        third=schedule,
        grid_size=4,
        batch_size=1,
        keep=False,
        warm_start=False,
        device=device,
        compare=compare,
    )
