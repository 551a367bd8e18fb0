"""The box data set: images with boxes, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bapnal_recipes.data.label_maps import IGNORE_INDEX, read_label_map
from bapnal_recipes.data.voc import Annotation


class Sample(NamedTuple):
    """One image with its boxes, and whatever label maps go with it.

    Attributes:
        name: Its name in the devkit.
        image: ``(3, H, W)`` uint8.
        boxes: ``(K, 4)`` float.
        labels: ``(K,)`` long.
        valid: ``(H, W)`` bool; False is padding, and what augmentation left of boxes too small to
            keep.
        maps: ``(M, H, W)`` long label maps, 255 in the padding.
    """

    name: str
    image: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    maps: Tensor


class Batch(NamedTuple):
    """Images padded to one size; fields as in :class:`Sample`, boxes and labels as lists."""

    names: list[str]
    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    valid: Tensor
    maps: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the padded images."""
        return self.images.shape[2], self.images.shape[3]


class BoxSource(Protocol):
    """Where images with boxes come from, such as a devkit."""

    def annotated(self, name: str) -> tuple[Tensor, Annotation]:
        """Return an image and its boxes."""


@runtime_checkable
class MaskSource(Protocol):
    """Where ground-truth masks come from."""

    def mask(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Return the ground-truth class of every pixel."""


class BoxDataset(Dataset[Sample]):
    """Images with boxes, and optionally label maps; each is read on access.

    Args:
        devkit: Where the images are, and the masks if they are asked for.
        names: Which of them.
        augment: How to augment them; None leaves them as they are.
        label_maps: Folders of PNG label maps ``NAME.png`` to go with each image.
        masks: Whether the ground truth goes with each image, after ``label_maps``.
        keep: Keep what was read in memory, for data sets that fit.
        difficult: Whether to keep the boxes that are marked as difficult.
        margin: How far to loosen the boxes; see :func:`loosen`.
    """

    def __init__(
        self,
        devkit: BoxSource,
        names: Sequence[str],
        augment: Callable[[Sample], Sample] | None = None,
        *,
        label_maps: Sequence[Path] = (),
        masks: bool = False,
        keep: bool = False,
        difficult: bool = True,
        margin: float = 0.0,
    ) -> None:
        _check_margin(margin)
        self.devkit = devkit
        self.names = list(names)
        self.augment = augment
        self.label_maps = list(label_maps)
        self.masks: MaskSource | None = None
        if masks:
            if not isinstance(devkit, MaskSource):
                raise ValueError("masks must come with a devkit that has them, got boxes alone")
            self.masks = devkit
        self.kept: dict[int, Sample] | None = {} if keep else None
        self.difficult = difficult
        self.margin = margin

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Return one image, augmented if asked for."""
        if self.kept is None:
            sample = self._read(self.names[index])
        else:
            if index not in self.kept:
                self.kept[index] = self._read(self.names[index])
            sample = self.kept[index]
        return self.augment(sample) if self.augment else sample

    def _read(self, name: str) -> Sample:
        image, annotation = self.devkit.annotated(name)
        size = (image.shape[1], image.shape[2])
        chosen = torch.ones_like(annotation.difficult) if self.difficult else ~annotation.difficult
        boxes = loosen(annotation.boxes[chosen], self.margin, size)
        maps = [read_label_map(folder / f"{name}.png") for folder in self.label_maps]
        for found in maps:
            if found.shape != size:
                raise ValueError(
                    f"label maps of {name} must have size {size}, got {tuple(found.shape)}"
                )
        if self.masks is not None:
            maps.append(self.masks.mask(name, size))
        stacked = torch.stack(maps) if maps else torch.zeros(0, *size, dtype=torch.long)
        valid = torch.ones(size, dtype=torch.bool)
        return Sample(name, image, boxes, annotation.labels[chosen], valid, stacked)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad images on the right and below to one size, and keep boxes and labels as lists."""
    height = max(sample.image.shape[1] for sample in samples)
    width = max(sample.image.shape[2] for sample in samples)

    def pad(plane: Tensor, fill: int | bool) -> Tensor:
        lack = (0, width - plane.shape[-1], 0, height - plane.shape[-2])
        return torch.nn.functional.pad(plane, lack, value=fill) if any(lack) else plane

    return Batch(
        [sample.name for sample in samples],
        torch.stack([pad(sample.image, 0) for sample in samples]),
        [sample.boxes for sample in samples],
        [sample.labels for sample in samples],
        torch.stack([pad(sample.valid, False) for sample in samples]),
        torch.stack([pad(sample.maps, IGNORE_INDEX) for sample in samples]),
    )


def loosen(boxes: Tensor, margin: float, size: tuple[int, int]) -> Tensor:
    """Move every side of every box outward, to measure what loose boxes cost.

    Args:
        boxes: ``(K, 4)``, xyxy.
        margin: How far, as a share of the box's width (left and right) and height.
        size: Height and width of the image, at whose border the boxes end.

    Returns:
        ``(K, 4)``.

    Raises:
        ValueError: If ``margin`` is negative or not finite.
    """
    _check_margin(margin)
    height, width = size
    outward = margin * (boxes[:, 2:] - boxes[:, :2])
    looser = torch.cat([boxes[:, :2] - outward, boxes[:, 2:] + outward], dim=1)
    return looser.clamp(min=0).minimum(looser.new_tensor([width, height, width, height]))


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a finite number of at least 0, got {margin}")
