"""Images with boxes and a label map of the ground truth, from a VOC devkit or COCO's folders."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from pycocotools.coco import COCO
from torch import Tensor

from bapnal import paint_boxes
from bapnal_recipes.data.coco import CocoBoxes, annotation_path, read_split
from bapnal_recipes.data.voc import Annotation, Devkit

IGNORE_INDEX = 255


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
        self.coco = COCO(str(annotation_path(root, split)))

    def truth(self, name: str) -> Tensor:
        """Return the label map ``(H, W)``; crowds are 255."""
        number = int(self.boxes.numbers[self.boxes.place(name)])
        ids = self.coco.getAnnIds(imgIds=[number], iscrowd=False)
        found = {i: torch.from_numpy(self.coco.annToMask(self.coco.anns[i])).bool() for i in ids}
        annotation, size = self.boxes.annotation(name), self.boxes.size(name)
        own = [found[i] for i in self.boxes.ids_of(name)]
        labels = paint_boxes(annotation.boxes, annotation.labels, size, masks=torch.stack(own))
        for i in self.coco.getAnnIds(imgIds=[number], iscrowd=True):
            crowd = torch.from_numpy(self.coco.annToMask(self.coco.anns[i])).bool()
            labels[crowd & (labels == 0)] = IGNORE_INDEX
        return labels


@lru_cache
def images_of(root: Path, split: str) -> Images:
    """Read a split of whichever of the two lies in a folder."""
    return (CocoImages if (root / "annotations").is_dir() else VocImages)(root, split)
