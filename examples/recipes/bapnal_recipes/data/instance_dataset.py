"""Images with a mask per box, for training: boxes as annotated, masks from a folder of labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bapnal import box_cells
from bapnal.label.export import decode
from bapnal.label.files import expecting
from bapnal_recipes.data.coco import CocoBoxes
from bapnal_recipes.data.instances import FOLDER, instance_path, read_instances

Supervision = Literal["crf", "ret", "both", "masks"]
KINDS = {"crf": ("crf",), "ret": ("ret",), "both": ("crf", "reliable"), "masks": ("masks",)}
Target = dict[str, Tensor]


class DetectionSample(NamedTuple):
    """One image with the masks of its boxes.

    Attributes:
        name: Its name.
        image: ``(3, H, W)`` uint8.
        target: ``boxes`` ``(K, 4)``, ``labels`` ``(K,)``, and ``masks`` uint8: ``(K, H, W)``, or
            ``(2 K, H, W)`` with maps of valid pixels after the masks.
    """

    name: str
    image: Tensor
    target: Target


class DetectionBatch(NamedTuple):
    """Images padded to one size, with their own sizes and targets."""

    names: list[str]
    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target]

    def list_images(self) -> list[Tensor]:
        """Return the images without padding, in [0, 1]."""
        pairs = zip(self.images, self.sizes, strict=True)
        return [image[:, :height, :width].float() / 255 for image, (height, width) in pairs]


class InstanceDataset(Dataset[DetectionSample]):
    """Images with a mask per box; each is read when asked for.

    Args:
        boxes: Images and boxes.
        folder: Of the labels.
        supervision: ``"crf"``, ``"ret"``, ``"both"``: masks of Y_crf, valid where Y_ret agrees, or
            ``"masks"`` for labels that have one mask per box.
        flip: Whether to mirror half of the images, by torch's random numbers.
    """

    def __init__(
        self, boxes: CocoBoxes, folder: Path, supervision: Supervision, *, flip: bool = True
    ) -> None:
        self.boxes = boxes
        self.folder = folder
        self.supervision = supervision
        self.flip = flip
        self.names = boxes.names

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> DetectionSample:
        """Return one image, mirrored or not."""
        name = self.names[index]
        image, annotation = self.boxes.annotated(name)
        target = {
            "boxes": annotation.boxes,
            "labels": annotation.labels,
            "masks": self._maps(name, annotation.boxes),
        }
        if self.flip and torch.rand(()) < 0.5:
            image, target = mirrored(image, target)
        return DetectionSample(name, image, target)

    @staticmethod
    def collate(samples: Sequence[DetectionSample]) -> DetectionBatch:
        """Pad images on the right and below to one size."""
        sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        images = [
            torch.nn.functional.pad(sample.image, (0, width - w, 0, height - h))
            for sample, (h, w) in zip(samples, sizes, strict=True)
        ]
        targets = [sample.target for sample in samples]
        return DetectionBatch([x.name for x in samples], torch.stack(images), sizes, targets)

    def _maps(self, name: str, corners: Tensor) -> Tensor:
        kinds = KINDS[self.supervision]
        size = self.boxes.size(name)
        entries = read_instances(self.folder, self.boxes, name, kinds)
        with expecting(instance_path(self.folder, name), f"masks ({', '.join(kinds)}) of an image"):
            maps = [decode(entry[kind], size) for kind in kinds for entry in entries]
        if not maps:
            return torch.zeros(0, *size, dtype=torch.uint8)
        found = torch.from_numpy(np.stack(maps))
        if self.supervision == "both":  # outside its box nothing is the object, which is certain
            found[len(corners) :] |= ~box_cells(corners, size, size)
        return found.to(torch.uint8)

    def check_files(self) -> None:
        """Look for the labels of all images.

        Raises:
            FileNotFoundError: If some have none.
        """
        folder = self.folder / FOLDER
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        lacking = [name for name in self.names if f"{name}.json" not in there]
        if lacking:
            raise FileNotFoundError(
                f"{folder} must hold masks of every image, {len(lacking)} of {len(self.names)} are "
                f"missing: {', '.join(lacking[:5])}"
            )


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Return an image and its target with left and right exchanged."""
    width = image.shape[2]
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    masks = target["masks"].flip(2)
    return image.flip(2), {"boxes": boxes, "labels": target["labels"], "masks": masks}


def to_device(targets: Sequence[Target], device: Any) -> list[Target]:
    """Return targets on a device."""
    return [{key: value.to(device) for key, value in target.items()} for target in targets]
