"""Images with boxes and a label map of the ground truth, from a VOC devkit or COCO's folders."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bapnal import paint_boxes
from bapnal_recipes.data.average_precision import read_truth
from bapnal_recipes.data.coco import CocoBoxes, annotation_path, read_split
from bapnal_recipes.data.instances import truth_mask
from bapnal_recipes.data.label_maps import IGNORE_INDEX
from bapnal_recipes.data.voc import Annotation, Devkit


class Images(Protocol):
    """The images of a split."""

    classes: tuple[str, ...]
    names: list[str]

    def annotated(self, name: str) -> tuple[Tensor, Annotation]:
        """Return image ``(3, H, W)`` and boxes."""

    def truth(self, name: str) -> Tensor:
        """Return the label map ``(H, W)``, 255 where nothing is known."""


class VocImages:
    """The images of a split of a devkit."""

    def __init__(self, root: Path, split: str) -> None:
        self.devkit = Devkit(root)
        self.classes, self.names = self.devkit.classes, self.devkit.names(split)
        self.annotated, self.truth = self.devkit.annotated, self.devkit.mask


class CocoImages:
    """The images of a split of MS-COCO; of overlapping objects the smaller one is on top."""

    def __init__(self, root: Path, split: str) -> None:
        self.boxes: CocoBoxes = read_split(root, split)
        self.classes = tuple(self.boxes.classes)
        self.names = [x for x in self.boxes.names if len(self.boxes.annotation(x).labels)]
        self.annotated = self.boxes.annotated
        self.coco = read_truth(annotation_path(root, split))

    def truth(self, name: str) -> Tensor:
        """Return the label map ``(H, W)``; crowds are 255."""
        number = int(self.boxes.numbers[self.boxes.place(name)])
        annotation, size = self.boxes.annotation(name), self.boxes.size(name)
        own = [truth_mask(self.coco, i, size) for i in self.boxes.ids_of(name)]
        labels = paint_boxes(annotation.boxes, annotation.labels, size, masks=torch.stack(own))
        for i in self.coco.getAnnIds(imgIds=[number], iscrowd=True):
            labels[truth_mask(self.coco, i, size) & (labels == 0)] = IGNORE_INDEX
        return labels


@lru_cache
def images_of(root: Path, split: str) -> Images:
    """Read a split of whichever of the two lies in a folder."""
    return (CocoImages if (root / "annotations").is_dir() else VocImages)(root, split)
