"""Read images, boxes and masks from a folder in the layout of the PASCAL VOC devkit.

Training reads images and boxes. Masks are for evaluation (and for fully supervised training).

    ROOT/JPEGImages/NAME.jpg                  (or .png)
    ROOT/Annotations/NAME.xml                 boxes, 1-based with inclusive corners
    ROOT/SegmentationClassAug/NAME.png        (or SegmentationClass/) class indices, 255 void
    ROOT/ImageSets/Segmentation/SPLIT.txt     one NAME per line
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bapnal.label.annotations import VOC_CLASSES, VocFile, read_voc_file
from bapnal.label.files import one_line
from bapnal_recipes.data.images import image_head, open_image, read_rgb
from bapnal_recipes.data.label_maps import IGNORE_INDEX

__all__ = ["VOC_CLASSES", "Annotation", "Devkit", "default_root", "read_names"]


LONGEST_NAME = 200  # letters; file systems take 255 bytes


def default_root() -> Path:
    """Where the devkit is unless told: ``$BAPNAL_VOC_ROOT``, or ``VOCdevkit/VOC2012``."""
    return Path(os.environ.get("BAPNAL_VOC_ROOT") or "VOCdevkit/VOC2012")


class Annotation(NamedTuple):
    """The boxes of one image.

    Attributes:
        boxes: ``(K, 4)`` float, xyxy, half open, in pixels.
        labels: ``(K,)`` long, 1..L.
        difficult: ``(K,)`` bool.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class Devkit:
    """A folder in devkit layout.

    Args:
        root: The folder that holds ``JPEGImages`` and ``Annotations``, such as
            ``VOCdevkit/VOC2012``.
        classes: Names of the classes 1..L.

    Raises:
        FileNotFoundError: If ``root`` is not such a folder.
    """

    root: Path
    classes: tuple[str, ...] = VOC_CLASSES

    def __post_init__(self) -> None:
        """Check that the folder is a devkit."""
        object.__setattr__(self, "root", Path(self.root))
        for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
            if not (self.root / folder).is_dir():
                raise FileNotFoundError(f"{self.root} must hold a folder {folder}, has none")

    def names(self, split: str) -> list[str]:
        """Return the names in ``ImageSets/Segmentation/SPLIT.txt``."""
        path = self.root / "ImageSets/Segmentation" / f"{split}.txt"
        if not path.is_file():
            there = sorted(p.stem for p in path.parent.glob("*.txt"))
            raise FileNotFoundError(f"{path} does not exist; splits there: {', '.join(there)}")
        return read_names(path)

    def image_path(self, name: str) -> Path:
        """Return where the image is."""
        for suffix in (".jpg", ".png"):
            path = self.root / "JPEGImages" / f"{name}{suffix}"
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root / 'JPEGImages' / name}.jpg does not exist")

    def image(self, name: str) -> Tensor:
        """Return an image as uint8 RGB, ``(3, H, W)``, as it is stored, without EXIF rotation."""
        return read_rgb(self.image_path(name), self.size(name)).pixels

    def annotation_path(self, name: str) -> Path:
        """Return where the boxes are, or should be."""
        return self.root / "Annotations" / f"{name}.xml"

    def annotation(self, name: str) -> Annotation:
        """Return the boxes and labels of an image.

        Raises:
            FileNotFoundError: If there is no annotation.
            ValueError: If it cannot be read, or holds an unknown class or a broken box.
        """
        found = self._read(name)
        path, names = self.annotation_path(name), found.names
        for i, label in enumerate(names):
            if label not in self.classes:
                raise ValueError(
                    f"{path}: object {i} must be one of {', '.join(self.classes)}, got {label!r}"
                )
        labels = [self.classes.index(label) + 1 for label in names]
        return Annotation(
            torch.tensor(found.boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.long),
            torch.tensor(found.difficult, dtype=torch.bool),
        )

    def stated_size(self, name: str) -> tuple[int, int] | None:
        """Return height and width as the annotation states them; None where it does not."""
        return self._read(name).size

    def _read(self, name: str) -> VocFile:
        path = self.annotation_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return read_voc_file(path)

    def annotated(self, name: str) -> tuple[Tensor, Annotation]:
        """Return image and boxes, with the boxes checked against the image's size."""
        image, annotation = self.image(name), self.annotation(name)
        return image, self.inside(name, annotation, (image.shape[1], image.shape[2]))

    def inside(self, name: str, annotation: Annotation, size: tuple[int, int]) -> Annotation:
        """Return the boxes cut at the border of an image of ``size``, height and width.

        Raises:
            ValueError: If a box is outside by more than the one pixel that annotations may be off.
        """
        height, width = size
        limit = torch.tensor([width, height, width, height])
        outside = ((annotation.boxes < -1) | (annotation.boxes > limit + 1)).any(1)
        if outside.any():
            i = int(outside.nonzero()[0])
            raise ValueError(
                f"{self.annotation_path(name)}: box {i} must lie in the image of "
                f"{width} x {height}, got {_voc_text(annotation.boxes[i])}"
            )
        return annotation._replace(boxes=annotation.boxes.clamp(min=0).minimum(limit))

    def mask_path(self, name: str) -> Path:
        """Return where the mask is."""
        for folder in ("SegmentationClassAug", "SegmentationClass"):
            path = self.root / folder / f"{name}.png"
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root}/SegmentationClassAug/{name}.png does not exist")

    def has_mask(self, name: str) -> bool:
        """Return whether there is a mask."""
        folders = ("SegmentationClassAug", "SegmentationClass")
        return any((self.root / folder / f"{name}.png").is_file() for folder in folders)

    def size(self, name: str) -> tuple[int, int]:
        """Return height and width of an image, from the header of its file."""
        (width, height), _ = image_head(self.image_path(name))
        return height, width

    def mask(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Return the ground truth of every pixel, for evaluation; ``(H, W)`` long, 255 void.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not a mask, or not of ``size`` where that is given.
        """
        path = self.mask_path(name)
        image = open_image(path)
        if image.mode not in ("P", "L"):
            raise ValueError(f"{path} must hold class indices, got an image of mode {image.mode}")
        mask = torch.from_numpy(np.array(image)).long()
        wrong = mask[(mask > len(self.classes)) & (mask != IGNORE_INDEX)]
        if wrong.numel():
            raise ValueError(f"{path} must hold 0..{len(self.classes)} or 255, got {int(wrong[0])}")
        if size is not None and tuple(mask.shape) != size:
            raise ValueError(
                f"{path} must have the size of its image, {size[1]} x {size[0]}, "
                f"got {mask.shape[1]} x {mask.shape[0]}"
            )
        return mask


def read_names(path: Path) -> list[str]:
    """Read a list of image names, one per line.

    Raises:
        ValueError: If it is not such a list, is empty, or holds a name twice.
    """
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file: {error}") from error
    for name in names:
        odd = len(name) > LONGEST_NAME or not {"/", "\\", "\0"}.isdisjoint(name)
        if odd or name in (".", ".."):
            shown = one_line(name)[:80]
            raise ValueError(f"{path} must hold one image name per line, got {shown!r}")
    if not names:
        raise ValueError(f"{path} must name at least one image, got none")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} must hold each name once, got {name!r} {times} times")
    return names


def _voc_text(box: Tensor) -> str:
    """``xmin=1 ymin=1 xmax=5 ymax=5``: a box as its annotation writes it."""
    x1, y1, x2, y2 = box.tolist()
    return f"xmin={x1 + 1:g} ymin={y1 + 1:g} xmax={x2:g} ymax={y2:g}"
